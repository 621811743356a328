"""Which picture and questions `ivtp demo` shows: ``python -m recipes.micro.choose_demo``.

The rule: of the validation scenes in order, the first one with two questions of different kinds about different
objects that the embedded model answers with all tokens, with IVTP and with IVTP+, but not with TopK, at 64 tokens, and
of whose objects IVTP keeps a quarter of the patches each. Kinds whose answer can be guessed (yes or no, counts,
letters) are left out. The share of the patches was added after a first search, which chose a question that IVTP
answered rightly without one patch of the asked sign: such an answer shows nothing. IVTP+ came into the rule when the
demo began to show it; the scene that was shown before has a question that it does not answer.

The whole range is searched whatever is found, and how often either method alone is right is printed and stored with
the choice: a demonstration is one example, and not how the methods compare. With ``--write`` the scene becomes the
demo's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from ivtp.cli.door import quiet, run
from ivtp.generate import ask, load
from ivtp.micro.formats.base import normalise
from ivtp.micro.world.questions import OPEN_KINDS, Question, questions, two_apart
from ivtp.micro.world.render import render
from ivtp.micro.world.samples import describe
from ivtp.micro.world.scene import Scene, patches_of, sample_scene, split_seed

METHODS = ("none", "topk", "ivtp", "ivtp+")
SHARE = 0.25
FOLDER = Path(__file__).parents[2] / "src" / "ivtp" / "micro" / "samples"


@dataclass(frozen=True)
class Asked:
    """A question about a scene, and which of `METHODS` answered it rightly."""

    scene: Scene
    question: Question
    right: tuple[bool, ...]
    seen: float
    """The smallest share of an asked object's patches that IVTP kept."""

    @property
    def telling(self) -> bool:
        """Whether TopK alone is wrong, and IVTP kept what was asked for."""
        return self.right == (True, False, True, True) and self.seen >= SHARE


def asked_about(model: Any, processor: Any, index: int, most: int, keep: int) -> list[Asked]:
    """At most ``most`` questions about validation scene ``index``, answered with every method."""
    scene = sample_scene(split_seed("validation", index), min_objects=3)
    picture = render(scene)
    suitable = [question for question in questions(scene, seed=0, count=12) if question.kind in OPEN_KINDS][:most]
    return [_asked(model, processor, scene, picture, question, keep) for question in suitable]


def _asked(model: Any, processor: Any, scene: Scene, picture: Image.Image, question: Question, keep: int) -> Asked:
    answers = [ask(model, processor, picture, question.text, method=method, keep=keep) for method in METHODS]
    right = tuple(normalise(answer.text) == normalise(question.answer) for answer in answers)
    trace = answers[METHODS.index("ivtp")].trace
    assert trace is not None
    kept = set(trace.kept()[0].tolist())
    patches = [set(patches_of(scene, [number])) for number in question.objects]
    return Asked(scene, question, right, min(len(own & kept) / len(own) for own in patches))


def pair_in(found: list[Asked]) -> tuple[Question, Question] | None:
    """The first two questions of one scene that show what the demo is to show."""
    return two_apart(asked.question for asked in found if asked.telling)


def summary(found: list[list[Asked]], keep: int) -> str:
    """How often each outcome occurred in the search."""
    rights = [asked.right for scene in found for asked in scene]
    every, topk, ivtp, plus = (sum(column) for column in zip(*rights, strict=True))
    seen = sum(asked.telling for scene in found for asked in scene)
    better, worse = (sum(right[0] and right[a] and not right[b] for right in rights) for a, b in ((2, 1), (1, 2)))
    return (
        f"{len(rights)} questions about {len(found)} validation scenes, {keep} tokens: all tokens right in {every}, "
        f"TopK in {topk}, IVTP in {ivtp}, IVTP+ in {plus}; where all tokens are right, IVTP is and TopK is not in "
        f"{better} ({seen} of them with IVTP+ right, too, and a quarter of each asked object kept), and TopK is and "
        f"IVTP is not in {worse}"
    )


app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


@app.command(help=__doc__)
def main(
    scenes: Annotated[int, typer.Option(min=1, help="validation scenes to search, from the first")] = 60,
    most: Annotated[int, typer.Option(min=2, help="questions of each scene")] = 4,
    keep: Annotated[int, typer.Option(min=1, help="visual tokens that stay")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    write: Annotated[bool, typer.Option("--write", help="make the scene the demo's")] = False,
) -> None:
    torch.set_num_threads(threads)
    quiet()
    model, processor = load("micro")
    numbers = track(range(scenes), "scenes", console=Console(stderr=True))
    found = [asked_about(model, processor, index, most, keep) for index in numbers]
    said = summary(found, keep)
    console.print(said, soft_wrap=True)
    pairs = [(index, pair) for index, scene in enumerate(found) if (pair := pair_in(scene))]
    console.print(f"scenes with two telling questions: {[index for index, _ in pairs]}", soft_wrap=True)
    if not pairs:
        raise SystemExit(1)
    index, pair = pairs[0]
    for question in pair:
        console.print(f"scene {index}: {question.text} ({question.answer})", markup=False, soft_wrap=True)
    if write:
        scene = found[index][0].scene
        for old in FOLDER.glob("validation-*.png"):
            old.unlink()
        file = FOLDER / f"validation-{index:05d}.png"
        render(scene).save(file)
        entry = {**describe(scene, file.name, pair), "chosen": said}
        (FOLDER / "demo.json").write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(app)

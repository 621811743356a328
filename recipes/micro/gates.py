"""Is the micro model good enough to measure with? The gates: ``python -m recipes.micro.gates``.

1. All formats with all tokens, on the test split and the two shifted ones, and without the image.
2. Oracle: patches of the asked objects against random ones, at 64 and at 16 tokens.
3. CLIP: image-text retrieval, and words for visible things above words for absent ones (Eq. 5).
4. The CLS token's attention covers objects better than chance.
5. Seconds to load, milliseconds to answer.
6. The CLS token knows every object: coverage of objects by its choice of patches, and a linear probe.
7. Methods rank as they do on LLaVA-1.5-7B: the correlation that `ivtp reproduce published` wrote to `results/`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, CLIPModel

from ivtp.cli.door import quiet, run
from ivtp.files.checkpoint import LOADING
from ivtp.files.machine import processor_name
from ivtp.files.outputs import check_output, write_text
from ivtp.files.sidecar import MICRO
from ivtp.generate import ask, load
from ivtp.micro import world
from ivtp.micro.answering import answer_about
from ivtp.micro.formats.base import Example
from ivtp.micro.world.photo import take_photo
from recipes.micro.coverage import coverage, presence_probe
from recipes.micro.published import like_published
from recipes.micro.scoring import Dtype, Table, bootstrap, interval, wilson, write_json
from recipes.micro.units import Unit, by_format, collect, gap
from recipes.micro.vision_data import keyword_table, make_batch
from recipes.micro.vision_eval import retrieved, roc_auc, word_scores
from recipes.micro.vision_model import encode_windows

Report = Callable[[], None]
GREY = Image.new("RGB", (world.SIZE, world.SIZE), (128, 128, 128))


def all_answers(
    model: Any,
    processor: Any,
    groups: list[list[Unit]],
    choose: Callable[[Example], list[int]] | None = None,
    *,
    image: Literal["photo", "grey", "none"] = "photo",
    report: Report = lambda: None,
) -> list[tuple[Unit, list[float]]]:
    """Scores of every unit, with its photo, a grey picture or none; ``choose`` names the patches to be seen."""
    scored = []
    for units in groups:
        examples = [example for unit in units for example in unit.examples]
        picture = GREY if image == "grey" else examples[0].photo.picture() if image == "photo" else None
        patches = None if choose is None else [choose(example) for example in examples]
        answers = iter(answer_about(model, processor, picture, [e.prompt for e in examples], patches=patches))
        for unit in units:
            scored.append((unit, [unit.form.score(example, next(answers)) for example in unit.examples]))
        report()
    return scored


def merged(columns: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a format out of several by_format results; the number of questions is the first one's."""
    first = next(iter(columns.values()))
    return [
        {"format": title}
        | {"questions": first[title]["questions"]}
        | {k: v for rows in columns.values() for k, v in rows.get(title, {}).items() if k != "questions"}
        for title in first
    ]


def oracle_patches(example: Example, keep: int, rng: random.Random) -> list[int]:
    """``keep`` patches that best cover the asked objects: theirs first, spread over the objects, then random ones."""
    left = [_central_last(example, index) for index in example.objects]
    chosen: list[int] = []
    while any(left) and len(chosen) < keep:  # one of each object in turn, its centre first
        for patches in left:
            patch = patches.pop() if patches else None
            if patch is not None and patch not in chosen and len(chosen) < keep:
                chosen.append(patch)
    others = [patch for patch in range(world.GRID**2) if patch not in set(chosen)]
    return sorted(chosen + rng.sample(others, keep - len(chosen)))


def _central_last(example: Example, index: int) -> list[int]:
    """An object's patches, from its edge to its centre."""
    x, y = (value / world.PATCH - 0.5 for value in example.photo.scene.objects[index].centre)
    patches = world.patches_of(example.photo.scene, [index])
    return sorted(patches, key=lambda p: -((p % world.GRID - x) ** 2 + (p // world.GRID - y) ** 2))


def cls_coverage(model: Any, processor: Any, photos: int, report: Report) -> Table:
    """Share of the CLS token's top 64 patches that lie on objects, beside the objects' share of all patches."""
    found, chance = [], []
    for index in range(photos):
        photo = take_photo("test", index)
        on = set(world.patches_of(photo.scene, range(len(photo.scene.objects))))
        trace = ask(model, processor, photo.picture(), "read.", method="topk", keep=64, max_new_tokens=1).trace
        assert trace is not None
        kept = trace.kept()[0].tolist()
        found.append(sum(patch in on for patch in kept) / len(kept))
        chance.append(len(on) / world.GRID**2)
        report()
    both = (("top 64 by CLS attention", found), ("all (chance)", chance))
    rows = [{"patches": name} | bootstrap("on objects", shares, statistics.fmean) for name, shares in both]
    more = bootstrap("on objects", list(zip(found, chance, strict=True)), _mean_difference)
    return Table(f"CLS attention on {photos} test photos", [*rows, {"patches": "difference"} | more])


def _mean_difference(pairs: list[tuple[float, float]]) -> float:
    return statistics.fmean(a - b for a, b in pairs)


def clip_gate(folder: Path, photos: int) -> Table:
    """Retrieval among ``photos`` test photos, and how well words for visible objects are told from absent ones."""
    with LOADING:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = keyword_table(tokenizer)
    taken = [take_photo("test", index) for index in range(photos)]
    images, present = [], []
    for start in range(0, photos, 8):
        batch = make_batch(taken[start : start + 8], world.GRID, tokenizer, table)
        with torch.inference_mode():
            images.append(encode_windows(clip, batch.patches, batch.positions)[1])
        present.append(batch.present)
    image, true = torch.cat(images), torch.cat(present)
    with torch.inference_mode():
        hits = retrieved(clip, tokenizer, image, taken)
        scores = word_scores(clip, tokenizer, table, image, true, taken)
    low, high = wilson(sum(hits), photos)
    row = {"photos": photos, "retrieval": sum(hits) / photos, "retrieval low": low, "retrieval high": high}
    return Table("CLIP", [row | bootstrap("word ROC AUC", scores, _auc)])


def _auc(scores: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return roc_auc(*(torch.cat(part) for part in zip(*scores, strict=True)))


def speed(name: str, dtype: str) -> Table:
    """Seconds to load, and milliseconds of an answer with all tokens: medians of 3 and of 20, and their ranges."""
    loading, answering = [], []
    for _ in range(3):
        began = time.perf_counter()
        quiet()
        model, processor = load(name, dtype=dtype)
        loading.append(time.perf_counter() - began)
    for index in range(21):
        picture = take_photo("test", index).picture()
        began = time.perf_counter()
        ask(model, processor, picture, "Is there a dog in the image?", method="none")
        answering.append(1000 * (time.perf_counter() - began))
    row: dict[str, Any] = {"dtype": str(model.dtype)}
    for label, values, digits in (("loading, s", loading, 2), ("answer, ms", answering[1:], 0)):
        row[label] = statistics.median(values)
        row[f"{label.split(',')[0]} from - to"] = f"{min(values):.{digits}f} - {max(values):.{digits}f}"
    return Table("Speed", [row])


app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help='"micro", or a folder with an exported model')] = "micro",
    questions: Annotated[int, typer.Option(min=1, help="questions of every format")] = 300,
    gate: Annotated[list[int] | None, typer.Option(help="gates to measure (repeat); default: all")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    split: Annotated[str, typer.Option(help="test, or validation: photos of gate 6")] = "test",
    dtype: Annotated[Dtype, typer.Option(help="what to compute in; auto is float32")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file for all numbers")] = None,
    markdown: Annotated[Path | None, typer.Option(help="file for the tables")] = None,
) -> None:
    gates = gate or [1, 2, 3, 4, 5, 6, 7]
    if unknown := [number for number in gates if number not in range(1, 8)]:
        raise typer.BadParameter(f"no gate {unknown[0]}; use 1 to 7")
    check_output(output, "--output", inputs=(model,))
    check_output(markdown, "--markdown", inputs=(model, output))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tables = [speed(model, dtype)] if 5 in gates else []
    quiet()
    lvlm, processor = load(model, dtype=dtype)
    columns = (TextColumn("photos"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not {1, 2, 4, 6} & set(gates)) as progress:
        task = progress.add_task("", total=None)

        def report() -> None:
            progress.advance(task)

        if 1 in gates:
            tables.append(formats_gate(lvlm, processor, questions, report))
        if 2 in gates:
            tables += oracle_gate(lvlm, processor, questions, report)
        clip = (MICRO if model == "micro" else Path(model)) / "clip"
        if 3 in gates:
            tables.append(clip_gate(clip, 64))
        if 4 in gates:
            tables.append(cls_coverage(lvlm, processor, min(questions, 200), report))
        if 6 in gates:
            tables.append(coverage(lvlm, processor, split, questions, report))
            tables.append(presence_probe(clip, split, 8 * questions, questions, report))
    if 7 in gates:
        tables += like_published()
    text = "\n".join(table.markdown() for table in tables)
    console.print(Markdown(text))
    about = {
        "model": model,
        "questions": questions,
        "split": split,
        "dtype": str(lvlm.dtype),
        "torch": torch.__version__,
    }
    about["machine"] = f"{processor_name()}, {threads} CPU threads"
    if output is not None:
        write_json(output, tables, about)
    if markdown is not None:
        write_text(markdown, text, "--markdown")


def formats_gate(model: Any, processor: Any, questions: int, report: Report) -> Table:
    """Every format on the test split, the shifted splits, and without the image."""
    columns = {}
    runs: tuple[tuple[str, str, Literal["photo", "grey", "none"]], ...] = (
        ("test", "test", "photo"),
        ("unseen pairs", "pairs", "photo"),
        ("unseen styles", "styles", "photo"),
        ("grey picture", "test", "grey"),
        ("no image", "test", "none"),
    )
    for label, split, image in runs:
        scored = all_answers(model, processor, collect(split, questions), image=image, report=report)
        columns[label] = by_format(scored, label)
    return Table(f"Formats, all {world.GRID**2} tokens", merged(columns))


def oracle_gate(model: Any, processor: Any, questions: int, report: Report) -> list[Table]:
    """Every format with all tokens, and with covering or random patches at 64 and 16; then the paired differences."""
    groups, rng = collect("test", questions), random.Random(0)
    scored = {"all tokens": all_answers(model, processor, groups, report=report)}
    for keep in (64, 16):
        for label, choose in (
            (f"oracle {keep}", lambda example, keep=keep: oracle_patches(example, keep, rng)),
            (f"random {keep}", lambda example, keep=keep: sorted(rng.sample(range(world.GRID**2), keep))),
        ):
            scored[label] = all_answers(model, processor, groups, choose, report=report)
    columns = {label: by_format(answers, label) for label, answers in scored.items()}
    gaps = [("oracle 64", "random 64"), ("all tokens", "oracle 64"), ("oracle 16", "random 16")]
    rows = [{"difference": f"{a} - {b}"} | interval("points", *gap(scored[a], scored[b])) for a, b in gaps]
    return [
        Table("Patches of the asked objects against random ones", merged(columns)),
        Table("Differences of the means over the formats, by question", rows),
    ]


if __name__ == "__main__":
    run(app)

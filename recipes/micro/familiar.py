"""When does the embedded model say that a picture is none of its world? ``python -m recipes.micro.familiar``.

Its own CLIP cannot tell by captions or words: noise is as near to some word as a scene is. What tells is a linear rule
on the vision tower's pooled output, fitted (ridge) to train photos of the world against pictures drawn here: gradients,
noise, coloured 1/f noise, overlapping discs, landscapes and pages of text. The limit lets 2% of the validation photos
pass as strange. Printed are the false alarms on test photos, the share of drawn pictures that is missed, of each kind
by a rule that was fitted without it, and both with pruning at 64 tokens; with matplotlib also crops of the photograph
that it ships. With ``--write`` the rule goes beside the model, as ``familiar.json``; exporting the model anew
writes an ``ivtp.json`` without it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from rich.console import Console
from torch import Tensor

from ivtp.cli.door import quiet, run
from ivtp.files.sidecar import MICRO, SIDECAR, read_json
from ivtp.generate import load, prompt_for
from ivtp.guide.familiar import KEY
from ivtp.micro import world
from ivtp.micro.world.photo import take_photo
from ivtp.plug import attach, find_host
from recipes.micro.scoring import wilson

NOTE = (
    "this picture does not look like one of the embedded model's world of glyphs, discs, frames and signs, all that it "
    "knows: its answer is worth nothing; ask a model that was trained on photographs"
)
ALARMS = 0.02
"""Share of the validation photos that the limit takes for strange."""
SIZE = world.SIZE
Pixels = NDArray[Any]


def gradient(rng: np.random.Generator) -> Pixels:
    """Four colours in the corners."""
    y, x = (part[..., None] / SIZE for part in np.mgrid[0:SIZE, 0:SIZE])
    a, b, c, d = rng.uniform(0, 255, (4, 3))
    return np.asarray(a * (1 - x) * (1 - y) + b * x * (1 - y) + c * (1 - x) * y + d * x * y)


def noise(rng: np.random.Generator) -> Pixels:
    """Every pixel by itself."""
    return rng.integers(0, 256, (SIZE, SIZE, 3))


def clouds(rng: np.random.Generator) -> Pixels:
    """Noise with the 1/f spectrum of photographs, its channels alike."""
    frequency = np.fft.fftfreq(SIZE)
    distance = np.hypot(frequency[:, None], frequency[None])
    distance[0, 0] = 1
    spectra = (np.fft.fft2(rng.normal(size=(SIZE, SIZE))) / distance for _ in range(3))
    field = np.stack([np.fft.ifft2(spectrum).real for spectrum in spectra], axis=-1)
    field = 0.6 * field + field.mean(axis=-1, keepdims=True)
    return np.asarray(255 * (field - field.min()) / (field.max() - field.min()))


def discs(rng: np.random.Generator) -> Pixels:
    """Discs of all sizes that hide each other, which have the edges of photographs."""
    image = Image.new("RGB", (SIZE, SIZE))
    pen = ImageDraw.Draw(image)
    for _ in range(400):
        side = float(np.clip(6 / rng.uniform(0.02, 1), 6, 200))
        x, y = rng.uniform(-50, SIZE + 50, 2)
        height = side * rng.uniform(0.4, 1)
        pen.ellipse([x - side, y - height, x + side, y + height], fill=tuple(map(int, rng.integers(0, 256, 3))))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2))))


def landscape(rng: np.random.Generator) -> Pixels:
    """A bright half above a dark one, with a rough texture."""
    pixels = np.zeros((SIZE, SIZE, 3))
    horizon = int(rng.integers(90, 250))
    pixels[:horizon], pixels[horizon:] = rng.uniform(120, 255, 3), rng.uniform(20, 150, 3)
    rough = Image.fromarray(rng.integers(0, 255, (42, 42)).astype(np.uint8)).resize((SIZE, SIZE))
    return np.asarray(pixels + rng.uniform(0.2, 0.8) * (np.asarray(rough, dtype=float) - 128)[..., None])


def page(rng: np.random.Generator) -> Pixels:
    """Lines of letters on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    for y in range(10, SIZE - 6, 14):
        pen.text((10, y), "".join(rng.choice(list("abcdefgh ijklmn opqrs"), 50)), fill="black")
    return np.asarray(image)


KINDS: tuple[Callable[[np.random.Generator], Pixels], ...] = (gradient, noise, clouds, discs, landscape, page)


def drawn(kind: Callable[[np.random.Generator], Pixels], count: int, seed: int) -> list[Image.Image]:
    """``count`` pictures of a kind."""
    numbers = (np.random.default_rng([seed, KINDS.index(kind), index]) for index in range(count))
    return [Image.fromarray(kind(rng).clip(0, 255).astype(np.uint8)) for rng in numbers]


@dataclass(frozen=True)
class Rule:
    """Above zero a picture is strange."""

    weight: Tensor  # (D,)
    bias: float

    @classmethod
    def fit(cls, known: Tensor, strange: Tensor, validation: Tensor) -> Rule:
        """Ridge regression of -1 and 1, each side weighing the same; the limit is set on ``validation`` (n, D)."""
        mean, spread = known.mean(0), known.std(0) + 1e-6
        rows = torch.cat([known, strange])
        rows = torch.cat([(rows - mean) / spread, torch.ones(len(rows), 1)], dim=1)
        wanted = torch.cat([-torch.ones(len(known)), torch.ones(len(strange))])
        share = torch.cat([torch.full((len(part),), 1 / len(part)) for part in (known, strange)])
        ridge = 0.05 * torch.eye(rows.shape[1])
        found = torch.linalg.solve(rows.T @ (rows * share[:, None]) + ridge, rows.T @ (wanted * share))
        weight = found[:-1] / spread
        return cls(weight, -float((validation @ weight).quantile(1 - ALARMS)))

    def strange(self, pooled: Tensor) -> list[bool]:
        """Of each picture (n, D)."""
        return [bool(value > 0) for value in pooled @ self.weight + self.bias]


class Tower:
    """Pooled outputs (n, D) of the embedded model's vision tower, by itself or inside a pruned prefill."""

    def __init__(self) -> None:
        quiet()
        self.model, self.processor = load("micro")
        self.tower: Any = find_host(self.model).vision.module

    def alone(self, pictures: Sequence[Image.Image]) -> Tensor:
        """With all tokens."""
        found = []
        for start in range(0, len(pictures), 8):
            pixels = self.processor.image_processor(list(pictures[start : start + 8]), return_tensors="pt")
            with torch.inference_mode():
                found.append(self.tower(pixels["pixel_values"]).pooler_output.clone())
        return torch.cat(found)

    def pruned(self, pictures: Sequence[Image.Image], method: str) -> Tensor:
        """With the tokens that a method keeps, 64 of them at the end."""
        found: list[Tensor] = []
        handle = self.tower.register_forward_hook(lambda module, args, output: found.append(output.pooler_output))
        prompt = prompt_for(self.processor, "what is in the image?")
        with attach(self.model, self.processor, method=method, keep=64), torch.inference_mode():
            for picture in pictures:
                self.model(**self.processor(images=picture, text=prompt, return_tensors="pt"), logits_to_keep=1)
        handle.remove()
        return torch.cat(found)


def photographs(count: int) -> list[Image.Image]:
    """Square crops of the photograph that matplotlib ships; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.cbook import get_sample_data

    file: Any = get_sample_data("grace_hopper.jpg")
    whole, rng = Image.open(file).convert("RGB"), np.random.default_rng(0)
    crops = []
    for _ in range(count):
        side = int(rng.uniform(0.35, 1) * min(whole.size))
        left, top = (int(rng.integers(0, length - side + 1)) for length in whole.size)
        crops.append(whole.crop((left, top, left + side, top + side)))
    return crops


app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


def _say(what: str, wrong: list[bool]) -> str:
    low, high = wilson(sum(wrong), len(wrong))
    return f"{what}: {sum(wrong)} of {len(wrong)} ({100 * low:.0f} to {100 * high:.0f}% in the long run)"


@app.command(help=__doc__)
def main(
    photos: Annotated[int, typer.Option(min=50, help="train photos; validation and test are half as many")] = 480,
    each: Annotated[int, typer.Option(min=4, help="drawn pictures of each kind")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    write: Annotated[bool, typer.Option("--write", help="put the rule beside the embedded model")] = False,
) -> None:
    torch.set_num_threads(threads)
    tower = Tower()
    train, validation, test = (
        tower.alone([take_photo(split, index).picture() for index in range(count)])
        for split, count in (("train", photos), ("validation", photos // 2), ("test", photos // 2))
    )
    fitted = {kind: tower.alone(drawn(kind, each, seed=0)) for kind in KINDS}
    rule = Rule.fit(train, torch.cat(list(fitted.values())), validation)
    lines = [_say("false alarms, test photos", rule.strange(test))]
    fresh = {kind: tower.alone(drawn(kind, each, seed=1)) for kind in KINDS}
    for kind in KINDS:
        others = torch.cat([features for other, features in fitted.items() if other is not kind])
        lines.append(_say(f"missed, {kind.__name__}, seen by the fit", _missed(rule, fresh[kind])))
        lines.append(
            _say(f"missed, {kind.__name__}, not seen", _missed(Rule.fit(train, others, validation), fresh[kind]))
        )
    crops = photographs(16)
    if crops:
        lines.append(_say("missed, crops of one photograph, not seen", _missed(rule, tower.alone(crops))))
    few, strange = [take_photo("test", index).picture() for index in range(40)], [drawn(k, 4, seed=2) for k in KINDS]
    for method in ("ivtp", "topk", "tome"):
        alarms = rule.strange(tower.pruned(few, method))
        missed = _missed(rule, tower.pruned([picture for kind in strange for picture in kind], method))
        lines += [_say(f"{method}, false alarms", alarms), _say(f"{method}, missed, seen by the fit", missed)]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if write:
        _write(rule, lines)


def _missed(rule: Rule, pooled: Tensor) -> list[bool]:
    return [not strange for strange in rule.strange(pooled)]


def _write(rule: Rule, lines: list[str]) -> None:
    weight = [float(f"{value:.6g}") for value in rule.weight.tolist()]
    content = {"note": NOTE, "bias": rule.bias, "weight": weight, "measured": lines}
    (MICRO / "familiar.json").write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
    options = {**read_json(MICRO / SIDECAR), KEY: "familiar.json"}
    (MICRO / SIDECAR).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(app)

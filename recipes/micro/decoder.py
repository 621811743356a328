"""Symbolic pre-training: the decoder learns to answer from scene graphs before it ever sees an image.

Pseudo visual tokens are sums of learned embeddings of what a patch shows. They stand in raster order at the
position ids that the real patches will have, their number varies, and many patches are missing, as after pruning.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ivtp.micro import world
from ivtp.micro.world.photo import Photo, take_photo
from ivtp.micro.world.vocabulary import BACKGROUNDS
from recipes.micro.blocks import forward_blocks
from recipes.micro.instruct import PATCHES, Template, answer_loss
from recipes.micro.loop import BatchResult, KindTracker, LoopOptions, rank, rng_for, train_loop
from recipes.micro.optim import Optimisers, compute_dtype, split_parameters
from recipes.micro.tasks import ask_many

_NAMES = {name: i for i, name in enumerate(world.NAMES)}
BACKGROUND = len(_NAMES)
"""The first symbol of a patch that shows no object."""
_COLOURS = {name: i + 1 for i, name in enumerate(world.COLOURS)}
_TEXTS = {text: i + 1 for i, text in enumerate(world.SIGN_TEXTS)}
_BACKINGS = {"none": 0, "disc": 1, "frame": 2}
FIELDS: dict[str, int] = {
    "name": BACKGROUND + 1,
    "colour": len(_COLOURS) + 1,
    "backing": len(_BACKINGS),
    "text": len(_TEXTS) + 1,
    "row": world.GRID,
    "column": world.GRID,
    "centre_row": world.GRID + 1,  # index 0 of these four: background
    "centre_column": world.GRID + 1,
    "height": 25,
    "width": 25,
    "background": len(BACKGROUNDS),
}
_SIZE_STEP = 7  # pixels: "larger" is asked from a ratio of 1.2 on


def symbol_map(scene: world.Scene) -> NDArray[np.int64]:
    """What each patch shows, as indices into ``FIELDS``: (576, 11) int64, raster order."""
    grid = np.zeros((world.GRID, world.GRID, len(FIELDS)), dtype=np.int64)
    grid[..., 0] = BACKGROUND
    grid[..., 4] = np.arange(world.GRID)[:, None]
    grid[..., 5] = np.arange(world.GRID)[None, :]
    grid[..., 10] = BACKGROUNDS.index(scene.background.kind)
    for item in scene.objects:
        rows, columns = _span(item.box[1], item.box[3]), _span(item.box[0], item.box[2])
        grid[rows, columns, 0] = _NAMES[item.name]
        grid[rows, columns, 1] = _COLOURS[item.colour] if item.colour else 0
        grid[rows, columns, 2] = _BACKINGS[item.backing]
        grid[rows, columns, 3] = _TEXTS[item.text] if item.text else 0
        x, y = item.centre
        grid[rows, columns, 6] = 1 + _cell(y)
        grid[rows, columns, 7] = 1 + _cell(x)
        grid[rows, columns, 8] = 1 + min(23, round((item.box[3] - item.box[1]) / _SIZE_STEP))
        grid[rows, columns, 9] = 1 + min(23, round((item.box[2] - item.box[0]) / _SIZE_STEP))
    return grid.reshape(PATCHES, len(FIELDS))


def photo_symbols(photo: Photo) -> NDArray[np.int64]:
    """The symbols of a photo's scene; an unreadable one shows nothing but background."""
    return symbol_map(photo.scene if photo.readable else replace(photo.scene, objects=()))


def _cell(pixel: float) -> int:
    """The row or column of a centre; that of an object that is cut off may lie outside of the picture."""
    return min(max(0, int(pixel / world.PATCH)), world.GRID - 1)


def _span(start: int, end: int) -> slice:
    """The patches that a pixel interval covers at least by half (at least one), within the picture."""
    first = min(max(0, round(start / world.PATCH)), world.GRID - 1)
    return slice(first, max(first + 1, round(end / world.PATCH)))


def choose_patches(symbols: np.ndarray, objects: int, rng: random.Random, count: int) -> list[int]:
    """``count`` patch indices in raster order: at least one of every object, more of some, and some background."""
    shown = np.flatnonzero(symbols[:, 0] != BACKGROUND).tolist()
    centres = symbols[:, 6] * 100 + symbols[:, 7]
    first: dict[int, int] = {}
    for patch in rng.sample(shown, len(shown)):
        first.setdefault(int(centres[patch]), patch)
    chosen = set(first.values())
    wanted = max(objects, int(count * rng.uniform(0.3, 0.95)))
    for patch in rng.sample(shown, len(shown)):
        if len(chosen) >= min(wanted, count):
            break
        chosen.add(patch)
    for patch in rng.sample(range(PATCHES), PATCHES):
        if len(chosen) >= count:
            break
        chosen.add(patch)
    return sorted(chosen)[:count]


_ORDINAL = frozenset(FIELDS) - {"name", "colour", "backing", "text", "background"}


def _free(size: int, width: int) -> Tensor:
    return 0.3 * torch.randn(size, width)


def _ordinal(size: int, width: int, waves: int = 6) -> Tensor:
    """Embeddings of ordered values: random mixtures of a few cosines, so that neighbours begin alike."""
    phase = torch.pi * (torch.arange(size)[:, None] + 0.5) / size * torch.arange(1, waves + 1)
    mixed: Tensor = 0.3 * (2 / waves) ** 0.5 * phase.cos() @ torch.randn(waves, width)
    return mixed


class SymbolicImage(nn.Module):
    """Pseudo visual tokens: the sum of one learned embedding for each field of a patch's symbols."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in FIELDS.values())
        with torch.no_grad():
            for (name, size), table in zip(FIELDS.items(), self.tables, strict=True):
                table.weight.copy_((_ordinal if name in _ORDINAL else _free)(size, width))  # type: ignore[operator]

    @torch.no_grad()
    def speak_like(self, decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        """Lets names, colours and sign texts start as the decoder's embeddings of their words.

        Matching a word with a patch, and saying what a patch shows, then begin as one shared identity instead of
        one association for every word: what a language model meets when its vision tower was trained with text.
        """
        for field, words in (("name", world.NAMES), ("colour", tuple(world.COLOURS)), ("text", world.SIGN_TEXTS)):
            table = self.tables[list(FIELDS).index(field)]
            first = 0 if field == "name" else 1
            for row, word in enumerate(words):
                token = tokenizer(" " + word, add_special_tokens=False).input_ids[0]
                table.weight[first + row] = decoder.model.embed_tokens.weight[token]  # type: ignore[operator]

    def forward(self, symbols: Tensor, noise: float = 0.0) -> Tensor:
        """(..., 11) indices -> (..., width); ``noise`` adds Gaussian noise of that fraction of the RMS."""
        out = torch.stack([table(symbols[..., i]) for i, table in enumerate(self.tables)]).sum(0)
        if noise:
            out = out + noise * out.detach().square().mean().sqrt() * torch.randn_like(out)
        return out


@dataclass(frozen=True)
class Level:
    """A step of the curriculum."""

    objects: int
    tokens: tuple[int, int]
    latest: float
    """Fraction of the run at which the next level starts even if this one is not mastered."""


LEVELS = (
    Level(3, (12, 36), 0.1),
    Level(5, (20, 56), 0.5),
    Level(8, (24, 90), 0.7),
    Level(12, (24, 220), 9.0),
)
MASTERED = 0.92


@dataclass(frozen=True)
class DecoderOptions:
    """Options of the symbolic pre-training beside those of the loop."""

    scenes: int = 16
    questions: int = 12
    noise: float = 0.1
    level: int = 0


def train_decoder(
    decoder: LlamaForCausalLM,
    symbolic: SymbolicImage,
    tokenizer: PreTrainedTokenizerBase,
    options: DecoderOptions,
    loop: LoopOptions,
    checkpoint: Path,
    *,
    resume: bool = False,
    report: Callable[[float, str], None] = lambda fraction, text: None,
) -> KindTracker:
    """Trains the decoder and the symbolic embeddings; returns the running exact match by kind."""
    decoder.train()
    matrices, others = split_parameters(decoder)
    others += list(symbolic.parameters())
    optimisers = Optimisers(matrices, others, muon_lr=loop.muon_lr, adam_lr=loop.adam_lr)
    template, tracker = Template(tokenizer), KindTracker(level=options.level)

    def batch(step: int) -> BatchResult:
        tokens = rng_for(loop.seed, step).randint(*LEVELS[tracker.level].tokens)  # the processes wait for one another
        rng = rng_for(loop.seed, step, rank())
        return _batch(decoder, symbolic, template, options, tracker, tokens, rng)

    def advance(fraction: float) -> None:
        level = tracker.level
        if level + 1 < len(LEVELS) and (tracker.short_mean > MASTERED or fraction > LEVELS[level].latest):
            tracker.level += 1

    modules = {"decoder": decoder, "symbolic": symbolic}
    train_loop(batch, modules, optimisers, tracker, loop, checkpoint, resume=resume, after=advance, report=report)
    return tracker


def _batch(
    decoder: LlamaForCausalLM,
    symbolic: SymbolicImage,
    template: Template,
    options: DecoderOptions,
    tracker: KindTracker,
    tokens: int,
    rng: random.Random,
) -> BatchResult:
    """Forward and backward of one batch of fresh scenes, each of ``tokens`` pseudo visual tokens."""
    device = decoder.lm_head.weight.device
    torch.manual_seed(rng.getrandbits(31))
    level = LEVELS[tracker.level]
    weights = tracker.weights(0.15, formats=0.5)  # their prompts are three times as long
    symbols, patches, asked = [], [], []
    for _ in range(options.scenes):
        index = rng.getrandbits(39)
        photo = take_photo("train", index, most=level.objects, bad=rng.random() < 1 / 8)
        grid = photo_symbols(photo)
        chosen = choose_patches(grid, len(photo.scene.objects), rng, tokens)
        symbols.append(grid[chosen])
        patches.append(chosen)
        asked.append(ask_many(photo, rng, options.questions, weights))
    text = template.blocks(asked).to(device)
    head = torch.tensor(template.head, device=device)
    image = symbolic(torch.from_numpy(np.stack(symbols)).to(device), options.noise)
    prefix = torch.cat((decoder.model.embed_tokens(head).expand(len(asked), -1, -1), image), dim=1)
    positions = torch.tensor(patches, device=device) + len(head)
    positions = torch.cat((torch.arange(len(head), device=device).expand(len(asked), -1), positions), dim=1)
    prefix = prefix.to(compute_dtype(device))
    hidden = forward_blocks(decoder.model, prefix, positions, text, template.text_start)
    loss, right, total = answer_loss(decoder.lm_head, hidden, text)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), right, total

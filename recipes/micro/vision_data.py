"""Batches for training the CLIP: windows of scenes with a label for every patch, texts of known truth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ivtp.micro.formats import list_formats
from ivtp.micro.world import COLOURS, GRID, KINDS, NAMES, PATCH, SIGN_TEXTS, SIZE, Scene, caption, patches_of
from ivtp.micro.world.chinese import COLOURS_ZH, NAMES_ZH
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.vocabulary import plural
from recipes.micro.tasks import ask_task

IGNORE = -100
KEYWORDS: tuple[str, ...] = (*NAMES, *COLOURS, *SIGN_TEXTS)
BACKINGS = ("none", "disc", "frame")
CLASSES = {
    "object": len(NAMES) + 1,
    "colour": len(COLOURS) + 1,
    "backing": 3,
    "text": len(SIGN_TEXTS) + 1,
    "centre_row": GRID,  # of the object that a patch shows
    "centre_column": GRID,
    "row": GRID,  # of the patch itself
    "column": GRID,
}
_NAME = {name: i + 1 for i, name in enumerate(NAMES)}  # 0 = background
_COLOUR = {colour: i + 1 for i, colour in enumerate(COLOURS)}  # 0 = no backing
_TEXT = {text: i + 1 for i, text in enumerate(SIGN_TEXTS)}  # 0 = not a sign
_MEAN = np.array(OPENAI_CLIP_MEAN, dtype=np.float32) * 255
_STD = np.array(OPENAI_CLIP_STD, dtype=np.float32) * 255


@dataclass
class Batch:
    """B windows of P patches each, with T texts of which text i < B describes window i."""

    patches: Tensor  # (B, P, 588) normalised pixels, ordered as a convolution weight (channel, row, column)
    positions: Tensor  # (B, P) raster index of each patch in the whole image
    labels: dict[str, Tensor]  # one of CLASSES for each patch: (B, P) long, IGNORE where undecided
    box: Tensor  # (B, P, 4) offsets from the patch's centre to its object's left, top, right, bottom / 336
    present: Tensor  # (B, K) which KEYWORDS are true of a window
    input_ids: Tensor  # (T, L)
    attention_mask: Tensor  # (T, L)
    keywords: Tensor  # (T, L) index into KEYWORDS, -1 for a word that names nothing, -2 for special tokens
    scenes: tuple[Scene, ...]  # the objects that each window shows

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, labels={k: v.to(device) for k, v in self.labels.items()}, **moved)


def keyword_table(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) for each token id the keyword that it spells, -1 for none, -2 for special tokens."""
    table = torch.full((len(tokenizer),), -1, dtype=torch.long)
    for index, word in enumerate(KEYWORDS):
        forms = {word, plural(word)} if word in NAMES else {word}
        for form in forms | {table_zh[word] for table_zh in (NAMES_ZH, COLOURS_ZH) if word in table_zh}:
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            table[ids[-1]] = index
    table[list(tokenizer.all_special_ids)] = -2
    return table


def make_batch(
    photos: Sequence[Photo],
    window: int,
    tokenizer: PreTrainedTokenizerBase,
    table: Tensor,
    *,
    keep: int | None = None,
) -> Batch:
    """Photos through windows of ``window`` x ``window`` patches, each placed over an object.

    With ``keep``, only that many patches of each window stay: whole objects in random order as long as they
    fit, then background. Such a thinned image teaches many objects at long range for a third of the cost.
    """
    views = [_view(photo, window, keep) for photo in photos]
    rngs = [random.Random(f"text/{photo.scene.seed}") for photo in photos]
    texts = [caption(v.scene, rng) for v, rng in zip(views, rngs, strict=True)]
    for view, rng in zip(views, rngs, strict=True):
        texts.append(_prompt(view.scene, rng))
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    keywords = torch.where(encoded["attention_mask"].bool(), table[ids], -2)
    labels = {key: torch.from_numpy(np.stack([v.labels[key] for v in views])) for key in views[0].labels}
    return Batch(
        patches=torch.from_numpy(np.stack([v.patches for v in views])),
        positions=torch.from_numpy(np.stack([v.positions for v in views])),
        labels=labels,
        box=torch.from_numpy(np.stack([v.box for v in views])),
        present=torch.from_numpy(np.stack([_present(v.scene) for v in views])),
        input_ids=ids,
        attention_mask=encoded["attention_mask"],
        keywords=keywords,
        scenes=tuple(view.scene for view in views),
    )


@dataclass
class _View:
    scene: Scene  # only the objects that the window shows, where they are in the whole image
    patches: NDArray[np.float32]
    positions: NDArray[np.int64]
    labels: dict[str, NDArray[np.int64]]
    box: NDArray[np.float32]


def _prompt(scene: Scene, rng: random.Random) -> str:
    """A question about what the window shows: mostly plain, sometimes in a format's words or in Chinese."""
    for task in rng.choices(("plain", "mmbench_cn", *list_formats()), (24, 4, *[1] * len(list_formats())), k=8):
        asked = ask_task(Photo(scene), rng, rng.choice(KINDS) if task == "plain" else task)
        if asked:
            return asked[0].text
    return ask_task(Photo(scene), rng, "existence")[0].text


def _view(photo: Photo, window: int, keep: int | None) -> _View:
    scene = photo.scene
    row, column = _place_window(scene, window)
    pixels = np.asarray(photo.picture(), dtype=np.float32)
    side = window * PATCH
    pixels = pixels[row * PATCH : row * PATCH + side, column * PATCH : column * PATCH + side]
    pixels = (pixels - _MEAN) / _STD
    patches = pixels.reshape(window, PATCH, window, PATCH, 3).transpose(0, 2, 4, 1, 3)  # (w, w, 3, 14, 14)
    rows, columns = np.arange(row, row + window), np.arange(column, column + window)
    labels, box, shown = _label(scene, rows, columns)
    positions = (rows[:, None] * GRID + columns[None]).reshape(-1)
    chosen: NDArray[np.int64] = np.arange(window * window)
    if keep is not None:
        chosen, shown = _thin(scene, positions, shown, keep)
    return _View(
        scene=replace(scene, objects=tuple(scene.objects[i] for i in shown)),
        patches=np.ascontiguousarray(patches.reshape(window * window, -1)[chosen]),
        positions=positions[chosen],
        labels={key: values.reshape(-1)[chosen] for key, values in labels.items()},
        box=box.reshape(-1, 4)[chosen],
    )


def _thin(
    scene: Scene, positions: NDArray[np.int64], shown: list[int], keep: int
) -> tuple[NDArray[np.int64], list[int]]:
    """(indices of the ``keep`` patches that stay, ascending; the objects that stay, all of them whole)."""
    rng = random.Random(f"thin/{scene.seed}")
    where = {int(position): i for i, position in enumerate(positions)}
    chosen: set[int] = set()
    stay: list[int] = []
    gone: set[int] = set()
    for index in rng.sample(range(len(scene.objects)), len(scene.objects)):
        touched = {where[p] for p in patches_of(scene, [index]) if p in where}
        if index in shown and len(chosen | touched) <= keep:
            chosen |= touched
            stay.append(index)
        else:
            gone |= touched
    background = [i for i in range(len(positions)) if i not in chosen and i not in gone]
    rng.shuffle(background)
    filler = background + sorted(gone - chosen)
    chosen |= set(filler[: keep - len(chosen)])
    return np.array(sorted(chosen)), sorted(stay)


def _place_window(scene: Scene, window: int) -> tuple[int, int]:
    """Row and column (in patches) of a random window that holds most of one random object."""
    rng = random.Random(f"window/{scene.seed}")
    x0, y0, x1, y1 = rng.choice(scene.objects).box
    corner = []
    for start, end in ((max(y0, 0), min(y1, SIZE)), (max(x0, 0), min(x1, SIZE))):
        low = max(0, -(-end // PATCH) - window)
        high = min(GRID - window, start // PATCH)
        corner.append(rng.randint(min(low, high), max(low, high)))
    return corner[0], corner[1]


def _cover(start: int, end: int, cells: NDArray[np.int64]) -> NDArray[np.float32]:
    """Share of each patch row (or column) that the interval start..end covers."""
    low, high = np.maximum(cells * PATCH, start), np.minimum((cells + 1) * PATCH, end)
    share: NDArray[np.float32] = (np.maximum(high - low, 0) / PATCH).astype(np.float32)
    return share


def _label(
    scene: Scene, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.float32], list[int]]:
    """Labels of the window's patches: an object where it covers 40% of a patch; thinner edges undecided."""
    shape = (len(rows), len(columns))
    labels = {key: np.zeros(shape, dtype=np.int64) for key in CLASSES}
    box = np.zeros((*shape, 4), dtype=np.float32)
    labels["row"][:], labels["column"][:] = rows[:, None], columns[None]
    seen: dict[int, float] = {}  # visible share of each object in the window
    for index, item in enumerate(scene.objects):
        x0, y0, x1, y1 = item.box
        share = _cover(y0, y1, rows)[:, None] * _cover(x0, x1, columns)[None]
        visible = float(share.sum()) * PATCH * PATCH / ((x1 - x0) * (y1 - y0))
        if visible == 0:
            continue
        inside = share >= 0.4 if visible >= 0.5 else np.zeros(shape, dtype=bool)
        values = {
            "object": _NAME[item.name],
            "colour": _COLOUR[item.colour] if item.colour is not None else 0,
            "backing": BACKINGS.index(item.backing),
            "text": _TEXT[item.text] if item.text is not None else 0,
            "centre_row": min(max(0, int(item.centre[1] / PATCH)), GRID - 1),
            "centre_column": min(max(0, int(item.centre[0] / PATCH)), GRID - 1),
        }
        for key, value in values.items():
            labels[key][(share > 0) & ~inside & (labels[key] == 0)] = IGNORE
            labels[key][inside] = value
        centre_x, centre_y = (columns + 0.5) * PATCH, (rows + 0.5) * PATCH
        centre = np.stack(np.meshgrid(centre_x, centre_y), axis=-1)  # (rows, columns, 2)
        offsets = np.concatenate([(x0, y0) - centre, (x1, y1) - centre], axis=-1) / SIZE
        box[inside] = offsets[inside]
        seen[index] = visible
    shown = [index for index, visible in seen.items() if visible >= 0.5] or [max(seen, key=seen.__getitem__)]
    return labels, box, shown


def _present(scene: Scene) -> NDArray[np.bool_]:
    """(K,) which KEYWORDS are true of the scene."""
    words = {word for item in scene.objects for word in (item.name, item.colour, item.text)}
    return np.array([word in words for word in KEYWORDS])

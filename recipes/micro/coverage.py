"""Does the CLS token know every object? Coverage of the objects by its choice of patches, and a linear probe."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer, CLIPModel

from ivtp.files.checkpoint import LOADING
from ivtp.generate import ask
from ivtp.micro import world
from ivtp.micro.world.crowds import CROWDS, crowd_name
from ivtp.micro.world.photo import Photo, take_photo
from recipes.micro.cls import SHOWN, shown
from recipes.micro.scoring import Table, bootstrap
from recipes.micro.vision_data import keyword_table, make_batch
from recipes.micro.vision_model import encode_windows

KEEP = 64
Found = list[tuple[int, int]]
"""How many of a photo's objects have a patch among those chosen, and how many there are."""


def coverage(model: Any, processor: Any, split: str, photos: int, report: Callable[[], None]) -> Table:
    """Share of all objects with a patch among those that the CLS chooses: its top 64, and what stage 1 of IVTP keeps.

    Beside them the same numbers of random patches; for all photos, and by their number of objects.
    """
    rng, found = random.Random(0), dict[str, Found]()
    for index in range(photos):
        photo = take_photo(split, index)
        top = ask(model, processor, photo.picture(), "read.", method="topk", keep=KEEP, max_new_tokens=1).trace
        ivtp = ask(model, processor, photo.picture(), "read.", method="ivtp", keep=KEEP, max_new_tokens=1).trace
        assert top is not None
        assert ivtp is not None
        first = [stage.kept[0].tolist() for stage in ivtp.stages if stage.where == "vision"][-1]
        chosen = {f"top {KEEP} by CLS attention": top.kept()[0].tolist(), f"stage 1 of IVTP, {len(first)}": first}
        for count in (KEEP, len(first)):
            chosen[f"random {count}"] = rng.sample(range(world.GRID**2), count)
        for name, patches in chosen.items():
            found.setdefault(name, []).append(covered(photo, patches))
        report()
    return Table(
        f"Objects with a patch among those chosen, {photos} photos ({split})",
        [{"patches": name} | _shares(counts) for name, counts in found.items()],
    )


def covered(photo: Photo, patches: Sequence[int]) -> tuple[int, int]:
    """How many of the photo's objects have a patch among these, and how many there are."""
    kept, objects = set(patches), range(len(photo.scene.objects))
    return sum(not kept.isdisjoint(world.patches_of(photo.scene, [i])) for i in objects), len(objects)


def _shares(counts: Found) -> dict[str, float]:
    """The share of all objects, and of those in photos of so many; resampled by photo."""
    shares = bootstrap("all", counts, _share)
    for crowd, (low, high) in enumerate(CROWDS):
        mine = [pair for pair in counts if low <= pair[1] <= high]
        if mine:
            shares |= bootstrap(crowd_name(crowd), mine, _share)
    return shares


def _share(counts: Found) -> float:
    return sum(hit for hit, _ in counts) / sum(number for _, number in counts)


def presence_probe(folder: Path, split: str, train: int, photos: int, report: Callable[[], None]) -> Table:
    """Average precision, class by class, of a linear probe of what photos show, from the projected CLS token.

    The probe learns from ``train`` training photos. The mean is over the classes that the photos of the split show;
    its interval resamples the classes.
    """
    with LOADING:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    sets = [_embedded(clip, folder, *what, report) for what in (("train", train), (split, photos))]
    scores = fit_linear(*sets[0])(sets[1][0])
    truth = sets[1][1]
    kinds: dict[str, list[float]] = {"all": []}
    for column, (kind, _) in enumerate(SHOWN):
        if truth[:, column].any():
            precision = average_precision(scores[:, column], truth[:, column])
            kinds["all"].append(precision)
            kinds.setdefault(kind, []).append(precision)
    rows = [
        {"shown": kind, "classes": len(values)} | bootstrap("average precision", values, statistics.fmean)
        for kind, values in kinds.items()
    ]
    return Table(f"Linear probe of the CLS token, {train} training photos, {photos} photos ({split})", rows)


@torch.inference_mode()
def _embedded(
    clip: CLIPModel, folder: Path, split: str, photos: int, report: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Unit image embeddings (n, 128) and what the photos show (n, SHOWN)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = keyword_table(tokenizer)
    images, truth = [], []
    for start in range(0, photos, 8):
        taken = [take_photo(split, index) for index in range(start, min(start + 8, photos))]
        batch = make_batch(taken, world.GRID, tokenizer, table)
        images.append(encode_windows(clip, batch.patches, batch.positions)[1])
        truth += [shown(photo.scene) for photo in taken]
        report()
    return torch.cat(images), torch.stack(truth)


def fit_linear(features: Tensor, truth: Tensor, decay: float = 1e-3) -> Callable[[Tensor], Tensor]:
    """Logistic regression of truth (n, K) on standardised features (n, C); gives logits for others."""
    features, truth = features.clone(), truth.float()  # out of inference mode
    mean, std = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / std
    weight = torch.zeros(inputs.shape[1], truth.shape[1], requires_grad=True)
    bias = torch.zeros(truth.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(inputs @ weight + bias, truth, reduction="none").mean(0).sum()
        loss = loss + decay * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return lambda others: ((others - mean) / std @ weight + bias).detach()


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean precision at the places of the true ones, best score first."""
    right = truth[scores.argsort(descending=True)]
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    return float(precision[right].mean())

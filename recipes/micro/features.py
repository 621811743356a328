"""Patch features of the frozen vision tower, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from ivtp.micro import world
from ivtp.micro.world.photo import Photo, take_photo
from recipes.micro.loop import rank, world_size


def photo_of(index: int) -> Photo:
    """Training photo of a row of the store; every eighth is a bad one."""
    return take_photo("train", index, bad=index % 8 == 0)


def pixels_of(photos: list[Photo], mean: list[float], std: list[float]) -> Tensor:
    """Rendered and normalised images, as LLaVA's image processor gives them: (B, 3, 336, 336)."""
    images = np.stack([np.asarray(photo.picture(), dtype=np.float32) for photo in photos]) / 255
    normal = (images - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return torch.from_numpy(normal).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def patch_features(tower: CLIPVisionModel, pixels: Tensor, layer: int = -2) -> Tensor:
    """What LLaVA's projector reads: hidden state ``layer`` without the class token, (B, 576, C)."""
    states = tower(pixels.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
    features: Tensor = states[layer][:, 1:]
    return features


class FeatureStore:
    """Features of the first ``count`` training photos in one memory-mapped bfloat16 file."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "features.json").read_text())
        self.count, self.width = int(meta["count"]), int(meta["width"])
        shape = (self.count, world.GRID**2, self.width)
        self._data = np.memmap(folder / "features.bin", dtype=np.int16, mode="r", shape=shape)

    def __getitem__(self, rows: list[int]) -> Tensor:
        """Features of several photos: (B, 576, C) bfloat16."""
        return torch.from_numpy(np.stack([self._data[row] for row in rows])).view(torch.bfloat16)

    def statistics(self, photos: int = 64) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each feature over photos spread through the store: (C,) float32 each."""
        features = self[list(range(0, self.count, max(1, self.count // photos)))].float().flatten(0, 1)
        return features.mean(0), features.std(0) + 1e-4


def fingerprint(tower: CLIPVisionModel, count: int) -> str:
    """What a store is made of: the tower's weights, the photos and their number."""
    digest = hashlib.sha256(f"{count} {photo_of(0)} {photo_of(1)}".encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def build_store(
    tower: CLIPVisionModel,
    mean: list[float],
    std: list[float],
    folder: Path,
    count: int,
    *,
    batch: int = 8,
    report: Callable[[float, str], None] = lambda fraction, text: None,
) -> None:
    """Fills the store; every process takes its share.

    A part that the same tower made from the same photos already is not computed again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    width = tower.config.hidden_size
    shape = (count, world.GRID**2, width)
    size = 2 * shape[0] * shape[1] * shape[2]
    path = folder / "features.bin"
    with path.open("ab") as file:
        file.truncate(size)
    data = np.memmap(path, dtype=np.int16, mode="r+", shape=shape)
    progress = folder / f"done-{rank()}-of-{world_size()}.json"
    rows = list(range(rank(), count, world_size()))
    made_of = fingerprint(tower, count)
    state = json.loads(progress.read_text()) if progress.is_file() else {}
    done = state["rows"] if state.get("made_of") == made_of else 0
    for start in range(done, len(rows), batch):
        mine = rows[start : start + batch]
        features = patch_features(tower, pixels_of([photo_of(row) for row in mine], mean, std))
        data[mine] = features.to("cpu", torch.bfloat16).view(torch.int16).numpy()
        if start // batch % 16 == 0:
            data.flush()
            progress.write_text(json.dumps({"made_of": made_of, "rows": start + len(mine)}))
        report((start + len(mine)) / len(rows), f"{start + len(mine)} images")
    data.flush()
    progress.write_text(json.dumps({"made_of": made_of, "rows": len(rows)}))
    (folder / "features.json").write_text(json.dumps({"count": count, "width": width}))

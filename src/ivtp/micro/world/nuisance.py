"""What goes wrong with photographs: blur, noise, darkness and JPEG artefacts, each with a strength and a seed."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter


@dataclass(frozen=True)
class Nuisance:
    """One disturbance: ``kind`` is one of NUISANCES, ``strength`` 0..1 goes from hardly visible to unreadable."""

    kind: str
    strength: float
    seed: int


def _blur(image: Image.Image, strength: float, rng: np.random.RandomState) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.5 + 28 * strength**2.5))


def _noise(image: Image.Image, strength: float, rng: np.random.RandomState) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    grain = rng.standard_normal(pixels.shape).astype(np.float32)
    return Image.fromarray((pixels + 700 * strength**2.2 * grain).clip(0, 255).astype(np.uint8))


def _dark(image: Image.Image, strength: float, rng: np.random.RandomState) -> Image.Image:
    """Less light, and the sensor's noise, in which the rest drowns at full strength."""
    pixels = np.asarray(image, dtype=np.float32) * 0.7 * (1 - strength) ** 2
    grain = 12 * strength**2 * rng.standard_normal(pixels.shape).astype(np.float32)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, strength: float, rng: np.random.RandomState) -> Image.Image:
    """Strong compression of a smaller picture; at full strength little more than a few blocks are left."""
    side = max(8, round(image.width * (1 - strength) ** 1.3))
    packed = io.BytesIO()
    image.resize((side, side), Image.Resampling.BILINEAR).save(packed, "JPEG", quality=round(50 - 45 * strength))
    with Image.open(packed) as opened:
        return opened.convert("RGB").resize(image.size, Image.Resampling.BILINEAR)


NUISANCES: dict[str, Callable[[Image.Image, float, np.random.RandomState], Image.Image]] = {
    "blur": _blur,
    "noise": _noise,
    "dark": _dark,
    "jpeg": _jpeg,
}
MILD = (0.05, 0.3)
"""Strengths at which every question still has its answer."""
SEVERE = (0.9, 1.0)
"""Strengths at which none has."""


def sample_nuisance(rng: random.Random, *, severe: bool) -> Nuisance:
    """One disturbance, mild or severe; nothing between, where it would be a matter of opinion."""
    return Nuisance(
        rng.choice(list(NUISANCES)), round(rng.uniform(*(SEVERE if severe else MILD)), 3), rng.getrandbits(31)
    )


def disturb(image: Image.Image, nuisance: Nuisance) -> Image.Image:
    """The picture with one disturbance; the same one gives the same pixels."""
    rng = np.random.RandomState(nuisance.seed)  # its streams are frozen across numpy versions
    return NUISANCES[nuisance.kind](image, nuisance.strength, rng)

"""Photos by their number of objects: simple and crowded ones are different worlds to a method."""

from __future__ import annotations

from ivtp.micro.world.photo import Photo

CROWDS = ((1, 3), (4, 7), (8, 12))
"""Simple, middling and crowded ones."""


def crowd_of(photo: Photo) -> int:
    """Index of the photo's number of objects among CROWDS."""
    return sum(len(photo.scene.objects) > last for _, last in CROWDS[:-1])


def crowd_name(crowd: int) -> str:
    """How tables call one of CROWDS: ``8-12 objects``."""
    return "{}-{} objects".format(*CROWDS[crowd])

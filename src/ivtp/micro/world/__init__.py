"""The micro world: synthetic scenes of glyphs, discs, frames and signs, with questions and captions."""

from ivtp.micro.world.captions import canonical_caption, caption
from ivtp.micro.world.questions import KINDS, OPEN_KINDS, Question, ask, questions, two_apart
from ivtp.micro.world.render import render
from ivtp.micro.world.samples import write_samples
from ivtp.micro.world.scene import (
    GRID,
    PATCH,
    SIZE,
    Background,
    Scene,
    SceneObject,
    patches_of,
    position_of,
    sample_scene,
    split_seed,
)
from ivtp.micro.world.vocabulary import COLOURS, NAMES, NUMBERS, POSITIONS, SIGN_TEXTS, WORDS

__all__ = [
    "COLOURS",
    "GRID",
    "KINDS",
    "NAMES",
    "NUMBERS",
    "OPEN_KINDS",
    "PATCH",
    "POSITIONS",
    "SIGN_TEXTS",
    "SIZE",
    "WORDS",
    "Background",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "canonical_caption",
    "caption",
    "patches_of",
    "position_of",
    "questions",
    "render",
    "sample_scene",
    "split_seed",
    "two_apart",
    "write_samples",
]

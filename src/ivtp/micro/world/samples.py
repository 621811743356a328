"""Write scenes as PNG files with their questions, answers and boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ivtp.micro.world.captions import canonical_caption
from ivtp.micro.world.questions import Question, questions
from ivtp.micro.world.render import render
from ivtp.micro.world.scene import Scene, patches_of, sample_scene, split_seed


def write_samples(
    folder: str | Path, count: int, split: str = "test", seed: int = 0, questions_each: int = 6
) -> list[Path]:
    """Write scenes ``seed`` .. ``seed + count - 1`` of a split to ``folder``.

    Returns the image files. ``samples.json`` beside them holds, for each, the objects with their boxes in
    pixels, the canonical caption, and questions with answer, kind, object indices and patch indices.
    """
    split_seed(split, seed + count - 1)  # refuses a scene that there is not before a folder is made
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files, entries = [], []
    for index in range(seed, seed + count):
        scene = sample_scene(split_seed(split, index), min_objects=3)
        file = target / f"{split}-{index:05d}.png"
        render(scene).save(file)
        files.append(file)
        entries.append(describe(scene, file.name, questions(scene, seed=0, count=questions_each)))
    (target / "samples.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return files


def describe(scene: Scene, image: str, asked: Sequence[Question]) -> dict[str, Any]:
    """What `samples.json` says of one scene, which was drawn as the file `image`."""
    return {
        "image": image,
        "seed": scene.seed,
        "caption": canonical_caption(scene),
        "objects": [asdict(item) for item in scene.objects],
        "questions": [{**asdict(question), "patches": patches_of(scene, question.objects)} for question in asked],
    }

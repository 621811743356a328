"""A small data set in LLaVA's format, and a checkpoint to train."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny import image

import ivtp
from ivtp.training.records import Record, read_records
from ivtp.training.run import Asked
from ivtp.training.stages import FINETUNE

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
QUESTIONS = ("<image>\nWhat is left of the dog?", "How many bananas are there?\n<image>", "<image>\nIs it a cat?")


@dataclass
class Mix:
    """32 records as llava_v1_5_mix665k.json has them: one or several turns, every fourth with text alone."""

    folder: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "mix.json"

    def records(self) -> list[Record]:
        good, bad = read_records(self.file, self.folder, needs_image=False)
        assert not bad
        return good

    def changed(self, folder: Path, place: int, **changes: Any) -> Path:
        """A file whose record at `place` says something else; None takes a key away."""
        entries = json.loads(json.dumps(self.entries))
        entries[place] = {k: v for k, v in {**entries[place], **changes}.items() if v is not None}
        file = folder / "changed.json"
        file.write_text(json.dumps(entries))
        return file


@pytest.fixture(scope="session")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Mix:
    made = Mix(tmp_path_factory.mktemp("mix"))
    (made.folder / "coco").mkdir()
    for number in range(32):
        turns = [
            {"from": "human", "value": QUESTIONS[number % 3]},
            {"from": "gpt", "value": f"It is house {number}. " * (1 + number % 4)},
        ]
        for more in range(number % 3):
            turns += [{"from": "human", "value": f"And {more}?"}, {"from": "gpt", "value": "A cat; blue."}]
        entry: dict[str, Any] = {"id": f"{number:012d}", "image": f"coco/{number:012d}.png", "conversations": turns}
        if number % 4 == 3:  # ShareGPT
            del entry["image"]
            turns[0]["value"] = "Is it a cat?"
            entry["model"] = ""
        else:
            image(number).save(made.folder / entry["image"])
        made.entries.append(entry)
    made.file.write_text(json.dumps(made.entries))
    return made


@pytest.fixture(scope="session")
def captions(mix: Mix) -> Path:
    """As LAION-CC-SBU 558k has them."""
    file = mix.folder / "captions.json"
    file.write_text(json.dumps([e | {"conversations": e["conversations"][:2]} for e in mix.entries if "image" in e]))
    return file


@pytest.fixture(scope="session")
def compressed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a compressor, as the page on training has it made; of 36 patches it gives 9 tokens."""
    folder = tmp_path_factory.mktemp("compressed")
    model, processor = ivtp.load(checkpoint)
    known = {"ivtp": ivtp, "model": model, "processor": processor, "FOLDER": folder}
    lines = re.findall(r"`(ivtp\.(?:compress|save)\(.*?\))`", PAGE.read_text(encoding="utf-8"))
    assert len(lines) == 2
    for line in lines:
        exec(line.replace("tokens=64", "tokens=9"), known)
    return folder


@pytest.fixture
def asked(mix: Mix, checkpoint: Path, tmp_path: Path) -> Asked:
    """A short run of the second stage."""
    return Asked(
        FINETUNE,
        mix.file,
        mix.folder,
        str(checkpoint),
        tmp_path / "run",
        max_steps=2,
        batch=4,
        per_device=2,
        arguments={"disable_tqdm": True, "learning_rate": 1e-3},
    )

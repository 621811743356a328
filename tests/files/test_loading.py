"""Several threads load and ask: a source is read once, one at a time, and the process stays as it was."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUESTIONS, Tiny, image
from transformers import AutoModelForImageTextToText, CLIPModel

import ivtp
from ivtp.guide import clip


class Loads:
    """What was read, and how many were being read at once."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {"clip": 0, "model": 0}
        self.most = self._now = 0
        self._lock = threading.Lock()

    def counted(self, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        """`load`, slow enough for the others to come in."""

        def from_pretrained(*arguments: Any, **more: Any) -> Any:
            with self._lock:
                self.count[name] += 1
                self._now += 1
                self.most = max(self.most, self._now)
            time.sleep(0.05)
            try:
                return load(*arguments, **more)
            finally:
                with self._lock:
                    self._now -= 1

        return from_pretrained


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loads]:
    clip._load_clip.cache_clear()
    loads = Loads()
    for name, kind in (("clip", CLIPModel), ("model", AutoModelForImageTextToText)):
        monkeypatch.setattr(kind, "from_pretrained", loads.counted(name, kind.from_pretrained))
    yield loads
    clip._load_clip.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the embedded one: weights in bfloat16, with a CLIP side."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model(dtype=torch.bfloat16).save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    copy.deepcopy(tiny.clip[0]).to(torch.bfloat16).save_pretrained(folder / "clip")
    tiny.clip[1].save_pretrained(folder / "clip")
    (folder / "ivtp.json").write_text(json.dumps({"llm_layers": 6, "threshold": 0.06, "clip": "clip"}))
    return folder


def ask(model: Any, processor: Any) -> ivtp.Answer:
    return ivtp.ask(model, processor, image(3), QUESTIONS[0], keep=8, max_new_tokens=2)


def test_clip_is_read_once_for_many_questions(checkpoint: Path, loads: Loads) -> None:
    model, processor = ivtp.load(checkpoint)
    answers = [ask(model, processor) for _ in range(3)]
    assert len({answer.text for answer in answers}) == 1
    assert loads.count["clip"] == 1
    other, _ = ivtp.load(checkpoint)
    ask(other, processor)
    assert loads.count["clip"] == 1
    half, _ = ivtp.load(checkpoint, dtype=torch.bfloat16)
    ask(half, processor)
    assert loads.count["clip"] == 2  # another dtype


def test_not_every_clip_is_kept(tiny: Tiny, loads: Loads, tmp_path: Path) -> None:
    for name in "abc":
        tiny.clip[0].save_pretrained(tmp_path / name)
        tiny.clip[1].save_pretrained(tmp_path / name)
    for name in "abca":
        ivtp.attach(tiny.model(), tiny.processor, tiny.config(), clip=tmp_path / name).detach()
    assert loads.count["clip"] == 4
    ivtp.attach(tiny.model(), tiny.processor, tiny.config(), clip=tmp_path / "b" / ".." / "a").detach()
    assert loads.count["clip"] == 4


def test_loading_and_asking_in_threads_leaves_the_process_alone(checkpoint: Path, loads: Loads) -> None:
    def work(number: int) -> str:
        model, processor = ivtp.load(checkpoint, dtype=torch.bfloat16 if number % 2 else "auto")
        return ask(model, processor).text if number % 2 == 0 else ""

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(work, range(6)))
    assert len(set(answers[::2])) == 1
    assert loads.count == {"clip": 1, "model": 6}
    assert loads.most == 1
    assert torch.get_default_dtype() == torch.float32


def test_threads_that_ask_one_model_wait_for_each_other(checkpoint: Path) -> None:
    model, processor = ivtp.load(checkpoint)
    alone = {
        method: ivtp.ask(model, processor, image(3), QUESTIONS[0], method=method, keep=8, max_new_tokens=3)
        for method in ("ivtp", "topk", "none")
    }

    def work(method: str) -> bool:
        answer = ivtp.ask(model, processor, image(3), QUESTIONS[0], method=method, keep=8, max_new_tokens=3)
        before = alone[method]
        if answer.trace is None or before.trace is None:
            return answer.text == before.text and answer.trace is before.trace
        return answer.text == before.text and answer.trace.kept().tolist() == before.trace.kept().tolist()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, ["ivtp", "topk", "none", "ivtp"] * 3))


def test_a_side_that_was_read_in_inference_mode_serves_training(tiny: Tiny, checkpoint: Path, loads: Loads) -> None:
    model, processor = ivtp.load(checkpoint)
    with torch.inference_mode():
        ivtp.attach(model, processor, keep=8).detach()
    inputs = tiny.inputs(tiny.sample())
    with ivtp.attach(model, processor, keep=8, guide="weighted"):
        model(**inputs).logits.sum().backward()
    assert loads.count["clip"] == 1
    assert any(p.grad is not None for p in model.parameters())

"""Load a checkpoint, ask it about an image file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import Tiny

import ivtp
from ivtp.errors import ImageError, LoadError


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model().save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.effect_noise((90, 60), 90).convert("RGB").save(file)
    return file


def test_a_folder_loads_as_a_stock_model_in_evaluation_mode(checkpoint: Path) -> None:
    model, processor = ivtp.load(checkpoint)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training
    assert processor.chat_template


def test_the_dtype_can_be_chosen(checkpoint: Path) -> None:
    model, _ = ivtp.load(checkpoint, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_a_missing_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="micro") as caught:
        ivtp.load(tmp_path / "nothing-here")
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LoadError, match="could not be loaded") as caught:
        ivtp.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "device",
    ["warp", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))],
)
def test_a_missing_device_is_one_clear_line(checkpoint: Path, device: str) -> None:
    with pytest.raises(LoadError, match=f"device '{device}'") as caught:
        ivtp.load(checkpoint, device=device)
    assert "\n" not in str(caught.value)


def test_asking_about_a_file(tiny: Tiny, checkpoint: Path, photo: Path) -> None:
    model, processor = ivtp.load(checkpoint)
    asked = {"keep": 8, "clip": tiny.clip, "llm_layers": 6, "max_new_tokens": 4}
    answer = ivtp.ask(model, processor, photo, "Is it a cat?", **asked)
    assert isinstance(answer.text, str)
    assert answer.seconds > 0
    assert answer.trace is not None
    assert answer.trace.kept().shape == (1, 8)
    assert [word.text for word in answer.trace.words[0]] == ["Is", "it", "a", "cat", "?"]
    again = ivtp.ask(model, processor, photo, "Is it a cat?", **asked)
    assert again.text == answer.text


def test_without_pruning_there_is_no_trace(checkpoint: Path, photo: Path) -> None:
    model, processor = ivtp.load(checkpoint)
    answer = ivtp.ask(model, processor, photo, "Is it a cat?", method="none", max_new_tokens=2)
    assert answer.trace is None


def test_a_missing_image_is_named(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = ivtp.load(checkpoint)
    with pytest.raises(ImageError, match="gone"):
        ivtp.ask(model, processor, tmp_path / "gone.png", "Is it a cat?")

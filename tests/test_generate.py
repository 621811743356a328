"""Load a checkpoint, ask it about an image file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import CHAT_TEMPLATE, Tiny

import ivtp
from ivtp.errors import ImageError, InputError, LoadError
from ivtp.generate import prompt_for


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


JOINED = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_PARTS_ALONE = JOINED.replace("message['content']", "message['content'][0]['text']")
TEMPLATES = {
    "parts": CHAT_TEMPLATE,
    "joined": JOINED,
    "trimmed": JOINED.replace("message['content']", "message['content'] | trim"),
    "text parts alone": TEXT_PARTS_ALONE,
}


def processor_with(tiny: Tiny, *, own: str | None = None, of_tokenizer: str | None = None) -> Any:
    """The tiny processor with the chat template in another place."""
    processor = copy.copy(tiny.processor)
    processor.tokenizer = copy.copy(processor.tokenizer)
    processor.chat_template, processor.tokenizer.chat_template = own, of_tokenizer
    return processor


@pytest.mark.parametrize("place", ["own", "of_tokenizer"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_form_of_chat_template(tiny: Tiny, photo: Path, template: str, place: str) -> None:
    """Of processor or tokenizer; for messages of parts or plain strings. The same prompt, the same instruction."""
    processor = processor_with(tiny, **{place: TEMPLATES[template]})
    assert prompt_for(processor, "Is it a cat?", images=2) == "USER: <image>\n<image>\nIs it a cat? ASSISTANT:"
    answer = ivtp.ask(
        tiny.model(), processor, photo, "Is it a cat?", keep=8, clip=tiny.clip, llm_layers=6, max_new_tokens=2
    )
    assert answer.trace is not None
    assert [word.text for word in answer.trace.words[0]] == ["Is", "it", "a", "cat", "?"]


@pytest.mark.parametrize(
    ("template", "says"),
    [(None, "has no chat template"), ("{% if %}", "cannot be rendered"), ("{{ x.y.z }}", "cannot be rendered")],
)
@pytest.mark.parametrize("method", ["ivtp", "none"])
def test_without_a_chat_template_asking_is_one_clear_line(
    tiny: Tiny, photo: Path, template: str | None, says: str, method: str
) -> None:
    processor = processor_with(tiny, own=template)
    with pytest.raises(LoadError, match=says) as caught:
        ivtp.ask(tiny.model(), processor, photo, "Is it a cat?", method=method, clip=tiny.clip)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["ivtp", "none"])
def test_an_image_token_in_the_question_is_one_clear_line(tiny: Tiny, photo: Path, method: str) -> None:
    """It would stand for a picture that nobody gave."""
    model = tiny.model()
    with pytest.raises(InputError, match="'<image>'") as caught:
        ivtp.ask(model, tiny.processor, photo, "what is left of the <image> sign?", method=method, clip=tiny.clip)
    assert "\n" not in str(caught.value)
    tiny.attach(model).detach()

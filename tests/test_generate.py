"""Load a checkpoint, ask it about an image file."""

from __future__ import annotations

import copy
import json
import shutil
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATE, Tiny

import ivtp
from ivtp.cost.answer import Cost
from ivtp.cost.sizes import sizes
from ivtp.errors import ImageError, InputError, LoadError
from ivtp.files.checkpoint import check_finite
from ivtp.generate import prompt_for
from ivtp.registry import host_class, list_hosts


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


@pytest.mark.parametrize("name", list_hosts())
@pytest.mark.parametrize("count", [1, 2])
def test_images_of_a_question_cost_what_a_prefill_counts(name: str, count: int) -> None:
    """A family may read one of several in another way than the only one; here they are wide enough for tiles."""
    model, processor = host_class(name).tiny()
    question, pictures = "What is left of the dog?", [Image.new("RGB", (60, 30))] * count
    prompt, tokenizer = prompt_for(processor, question, images=count), processor.tokenizer
    made = host_class(name).process(processor, [prompt], [pictures])["input_ids"][0].tolist()
    marks = set(tokenizer.all_special_ids) - {model.config.image_token_id, tokenizer.bos_token_id}
    spelled = tokenizer(prompt)["input_ids"]
    written = sum(i in marks for i in made) - sum(i in marks for i in spelled)  # around images
    if model.config.image_token_id not in spelled:  # what stands for an image is one of the marks
        written += count
    text = sum(i != model.config.image_token_id for i in made) - written + count
    visual = sizes(model).visual((60, 30), count)
    if visual is not None and count * len(visual.token) != made.count(model.config.image_token_id):
        pytest.skip("its tiny processor scales images to other sizes than the released ones")
    expected = ivtp.flops(model, method="none", text_tokens=text, images=count, image_size=(60, 30)).total
    answer = ivtp.ask(model, processor, pictures, question, method="none", max_new_tokens=1)
    assert Cost.of(model, answer).full == pytest.approx(expected, rel=1e-12)


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


# ---- checkpoints that must not answer ------------------------------------------------------------------------


def refused(name: object) -> str:
    """The one line."""
    with pytest.raises(LoadError, match="could not be loaded") as caught:
        ivtp.load(name)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json: `part__name=value`."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (config[part] if part else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config__num_hidden_layers": 12}, "weights are missing, such as model.language_model.layers.10"),
        ({"text_config__num_hidden_layers": 4}, "no place for"),
        ({"vision_config__num_hidden_layers": 5}, "no place for"),
        ({"text_config__hidden_size": 96}, "other shapes"),
        ({"vision_feature_layer": [-2, -3]}, "other shapes"),
        ({"text_config__hidden_size": "wide"}, "hidden_size"),
        ({"text_config__num_attention_heads": 0}, "zero"),
        ({"model_type": "nothing"}, "nothing"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_configuration(copied: Path, changes: dict[str, Any], words: str) -> None:
    edit(copied, **changes)
    assert words in refused(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copied: Path, value: float) -> None:
    file = copied / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    weights[name][0, 0] = value
    save_file(weights, file, {"format": "pt"})
    assert "not finite" in refused(copied)


@pytest.mark.parametrize(("value", "dtype"), [(3e38, torch.float32), (6e4, torch.float16)])
def test_large_weights_are_finite_whatever_their_sum_is(value: float, dtype: torch.dtype) -> None:
    weights = torch.full((1000,), value, dtype=dtype)
    check_finite([("w", weights), ("n", torch.ones(3, dtype=torch.int64))])
    weights[7] = float("inf")
    with pytest.raises(ValueError, match="its weight w"):
        check_finite([("w", weights)])


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "line 1"),
        ("config.json", "[]", "mapping"),
        ("config.json", None, "no config.json"),
        ("model.safetensors", None, "model.safetensors"),
        ("tokenizer.json", "{}", "lack"),
        ("processor_config.json", None, "processor"),
        ("chat_template.jinja", "{% for %}", "chat template is broken in line 1"),
    ],
)
def test_files_that_are_missing_or_broken(copied: Path, file: str, text: str | None, words: str) -> None:
    if text is None:
        (copied / file).unlink()
    else:
        (copied / file).write_text(text)
    assert words in refused(copied)


def test_names_that_name_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "a file, not a folder" in refused(tmp_path / "file")
    assert "no config.json" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "missing")
    assert "NoneType" in refused(None)
    assert "int" in refused(7)
    assert "no name" in refused(" ")
    assert "HF_HUB_OFFLINE" in refused("some/model")


@pytest.fixture
def dead_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """A hub that hangs up on everyone, and an empty cache; the list grows with each connection."""
    connections: list[int] = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connections.append(1)

    with socketserver.TCPServer(("127.0.0.1", 0), HangUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        place = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
        template = place + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield connections
        server.shutdown()


def test_a_hub_that_does_not_answer_is_asked_once(dead_hub: list[int]) -> None:
    began = time.perf_counter()
    assert "cannot be reached" in refused("some/model")
    assert time.perf_counter() - began < 20  # without the check: two and a half minutes of retries
    assert len(dead_hub) == 1


def test_what_was_downloaded_serves_without_the_hub(
    dead_hub: list[int], checkpoint: Path, tmp_path: Path, photo: Path
) -> None:
    folder = tmp_path / "cache" / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoint, folder / "snapshots" / ("0" * 40))
    _, processor = ivtp.load("some/model")
    assert processor.chat_template
    assert len(dead_hub) == 1


@pytest.mark.parametrize("damage", ["truncated", "not finite", "no text side"])
def test_a_damaged_clip_is_one_clear_line(tiny: Tiny, checkpoint: Path, tmp_path: Path, damage: str) -> None:
    clip, tokenizer = copy.deepcopy(tiny.clip[0]), tiny.clip[1]
    if damage == "not finite":
        torch.nn.init.constant_(clip.text_projection.weight, float("nan"))
    clip.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "no text side":
        weights = {name: weight for name, weight in load_file(file).items() if not name.startswith("text_model")}
        save_file(weights, file, {"format": "pt"})
    model, processor = ivtp.load(checkpoint)
    with pytest.raises(LoadError, match="CLIP text side") as caught:
        ivtp.attach(model, processor, keep=8, llm_layers=6, clip=tmp_path)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_ivtp_pruner")

"""What a Python user expects of the small objects: short to print, ready for JSON, easy to find again and to draw."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NUM_PATCHES, QUESTIONS, Tiny, image, samples

import ivtp
from ivtp.errors import ConfigError, ImageError, LoadError, OutputError
from ivtp.images import load_image

ASKED: dict[str, Any] = {"keep": 8, "llm_layers": 6, "max_new_tokens": 3}


@pytest.fixture
def answer(tiny: Tiny) -> ivtp.Answer:
    return ivtp.ask(tiny.model(), tiny.processor, image(3), QUESTIONS[0], clip=tiny.clip, **ASKED)


# ---- printing and storing -------------------------------------------------------------------------------------


def test_what_is_printed_is_one_short_line(tiny: Tiny, answer: ivtp.Answer) -> None:
    model = tiny.model()
    assert answer.trace is not None
    with tiny.attach(model) as pruner:
        shown = [repr(answer), repr(answer.trace), repr(answer.trace.stages[0]), repr(pruner)]
        assert "attached to LlavaForConditionalGeneration" in shown[-1]
    assert all(len(text) < 200 and "\n" not in text for text in shown)
    assert f"kept 8 of {NUM_PATCHES} visual tokens" in shown[1]
    assert repr(answer.text) in shown[0]
    assert "vision layer" in shown[2]
    assert "detached" in repr(pruner)


def test_a_trace_goes_through_json(answer: ivtp.Answer) -> None:
    assert answer.trace is not None
    found = json.loads(json.dumps(answer.trace.to_dict(), allow_nan=False))
    assert found["stages"][-1]["kept"] == answer.trace.kept().tolist()
    assert len(found["stages"]) == len(answer.trace.stages)
    assert [word["text"] for word in found["words"][0]] == [word.text for word in answer.trace.words[0]]
    assert found["tokens_per_layer"]["projector"] == answer.trace.tokens_per_layer.projector


def test_infinite_scores_are_none_in_json() -> None:
    scores = torch.tensor([[1.0, float("-inf")]])
    stage = ivtp.StageTrace("llm", 1, torch.tensor([[0]]), scores, torch.tensor([[0, -1]]))
    assert stage.to_dict()["scores"] == [[1.0, None]]


# ---- finding a pruner again -----------------------------------------------------------------------------------


def test_a_lost_pruner_is_found_and_taken_off(tiny: Tiny) -> None:
    model = tiny.model()
    assert ivtp.pruner_of(model) is None
    ivtp.detach(model)
    pruner = tiny.attach(model)
    assert ivtp.pruner_of(model) is pruner
    assert ivtp.pruner_of(torch.nn.Sequential(model)) is pruner
    ivtp.detach(model)
    assert ivtp.pruner_of(model) is None
    tiny.attach(model).detach()


# ---- pictures -------------------------------------------------------------------------------------------------


def test_an_answer_draws_itself(answer: ivtp.Answer, tmp_path: Path) -> None:
    drawn = answer.draw(tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as written:
        assert written.size == drawn.size
    assert answer.trace is not None
    again = ivtp.draw(image(3), answer.trace, question=QUESTIONS[0], answer=answer.text, threshold=answer.threshold)
    assert drawn.tobytes() == again.tobytes()
    with pytest.raises(OutputError, match="the picture"):
        answer.draw(tmp_path / "no folder" / "kept.png")


def test_a_trace_draws_itself(tiny: Tiny, answer: ivtp.Answer, tmp_path: Path) -> None:
    """An answer's trace knows the pictures; that of a call of the model, which saw pixels, has to be given them."""
    assert answer.trace is not None
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model) as pruner:
        model(**tiny.inputs(*samples(tiny, "two images")))
    expected = ivtp.draw(image(3), answer.trace, question="Cat?")
    assert answer.trace.draw(tmp_path / "kept.png", question="Cat?").tobytes() == expected.tobytes()
    with Image.open(tmp_path / "kept.png") as written:
        assert written.convert("RGB").tobytes() == expected.tobytes()
    pictures = [image(3), image(4)]
    assert pruner.trace.draw(image=pictures).tobytes() == ivtp.draw(pictures, pruner.trace).tobytes()
    with pytest.raises(ConfigError, match="pass the picture"):
        pruner.trace.draw(tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
    for name in ("kept", "kept.txt"):
        with pytest.raises(ConfigError, match="suffixes"):
            answer.trace.draw(tmp_path / name)


def test_an_answer_of_all_tokens_has_nothing_to_draw(tiny: Tiny) -> None:
    answer = ivtp.ask(tiny.model(), tiny.processor, image(3), "Cat?", method="none", max_new_tokens=1)
    assert "all visual tokens" in repr(answer)
    with pytest.raises(ConfigError, match="no trace"):
        answer.draw()


def test_a_picture_of_a_trace_takes_a_path(answer: ivtp.Answer, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    image(3).save(file)
    assert answer.trace is not None
    by_path = ivtp.draw(file, answer.trace)
    assert by_path.tobytes() == ivtp.draw(str(file), answer.trace).tobytes()
    assert by_path.tobytes() == ivtp.draw(np.asarray(image(3)), answer.trace).tobytes()
    with pytest.raises(ConfigError, match="has 1 images, passed: 2"):
        ivtp.draw([file, file], answer.trace)


# ---- images in any form ---------------------------------------------------------------------------------------


def test_arrays_tensors_and_open_files_are_images(tmp_path: Path) -> None:
    photo = image(3)
    array = np.asarray(photo)
    data = io.BytesIO()
    photo.save(data, "PNG")
    data.seek(0)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for source in (array, array / 255.0, tensor, tensor / 255, (tensor / 255).double(), data, data.getvalue()):
        assert np.array_equal(np.asarray(load_image(source)), array)
    with (tmp_path / "x.png").open("w+b") as file:
        photo.save(file, "PNG")
        file.seek(0)
        assert np.array_equal(np.asarray(load_image(file)), array)
    grey = load_image(array[..., 0])
    assert np.array_equal(np.asarray(grey)[..., 2], array[..., 0])
    assert load_image((tensor / 255).bfloat16()).size == photo.size


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((3, 40, 40), np.uint8), "shape"),
        (np.zeros((2, 3, 40, 40), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.full((4, 4, 3), 128.0), "0..1"),
        (np.full((4, 4, 3), 300), "0..255"),
        (np.full((4, 4, 3), -1), "0..255"),
        (np.full((4, 4, 3), np.nan), "0..1"),
        (np.full((4, 4), "x"), "0..255"),
        (torch.zeros(40, 40, 3), "shape"),
        (io.StringIO("text"), "binary"),
        (io.BytesIO(b""), "empty"),
        (7, "int"),
        ("", "empty"),
        ("data:image/png;base64", "data URL"),
        ("data:image/png;base64,@@@", "data URL"),
        ("data:text/plain,hello", "not an image"),
        ("file:///tmp/x.png", "pass its path"),
    ],
)
def test_what_is_no_image_is_one_line(source: object, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)


def test_several_images_stand_before_the_question(tiny: Tiny) -> None:
    answer = ivtp.ask(tiny.model(), tiny.processor, [image(3), image(4)], "Cat?", clip=tiny.clip, **ASKED)
    assert answer.trace is not None
    assert answer.trace.images == (2,)
    assert len(answer.pictures) == 2
    with pytest.raises(ImageError, match="no image"):
        ivtp.ask(tiny.model(), tiny.processor, [], "Cat?", clip=tiny.clip, **ASKED)


# ---- many questions -------------------------------------------------------------------------------------------


def test_asking_attaches_once_and_answers_as_ask_does(tiny: Tiny) -> None:
    model = tiny.model()
    alone = [ivtp.ask(model, tiny.processor, image(3), q, clip=tiny.clip, **ASKED).text for q in QUESTIONS[:2]]
    with ivtp.asking(model, tiny.processor, clip=tiny.clip, **ASKED) as ask:
        pruner = ivtp.pruner_of(model)
        assert pruner is not None
        assert [ask(image(3), question).text for question in QUESTIONS[:2]] == alone
        assert ivtp.pruner_of(model) is pruner
    assert ivtp.pruner_of(model) is None


# ---- arguments ------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers() -> None:
    config = ivtp.PruneConfig.of(
        keep=np.int64(64), threshold=np.float32(0.25), seed=np.uint8(3), schedule=np.array([9, 4])
    )
    assert config == ivtp.PruneConfig.of(keep=64, threshold=0.25, seed=3, schedule=(9, 4))
    assert type(config.keep) is int
    assert type(config.options["threshold"]) is float
    with pytest.raises(ConfigError, match="keep"):
        ivtp.PruneConfig(keep=np.float64(64.5))


def test_names_of_methods_in_any_case(tiny: Tiny) -> None:
    for name in ("IVTP", "TopK", "VisionZip", "PruMerge+", "DivPrune+FastV"):
        ivtp.attach(model := tiny.model(), tiny.processor, method=name, keep=8, clip=tiny.clip).detach()
        assert ivtp.pruner_of(model) is None
    for name in ("IVPT", "ivpt"):
        with pytest.raises(ConfigError, match="did you mean ivtp"):
            ivtp.attach(tiny.model(), tiny.processor, method=name)


def test_none_is_no_method_to_attach_and_has_no_options(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="nothing to attach"):
        ivtp.attach(tiny.model(), tiny.processor, method="none")
    with pytest.raises(ConfigError, match="no option 'foo'"):
        ivtp.ask(tiny.model(), tiny.processor, image(3), "Cat?", method="none", foo=1)
    with pytest.raises(ConfigError, match="no option 'foo'"):
        ivtp.flops("llava-1.5-7b", method="none", foo=1)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "4", None])
def test_an_answer_has_a_token_at_least(tiny: Tiny, tokens: Any) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        ivtp.ask(tiny.model(), tiny.processor, image(3), "Cat?", method="none", max_new_tokens=tokens)


def test_a_tokenizer_is_no_processor(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="reads no images"):
        ivtp.ask(tiny.model(), tiny.processor.tokenizer, image(3), "Cat?", method="none")


# ---- a checkpoint with all that lies beside it ----------------------------------------------------------------


def test_what_save_writes_answers_like_the_model(tiny: Tiny, tmp_path: Path) -> None:
    first = tmp_path / "first"
    tiny.model().save_pretrained(first)
    tiny.processor.save_pretrained(first)
    for part in tiny.clip:
        part.save_pretrained(first / "clip")
    (first / "ivtp.json").write_text(json.dumps({"llm_layers": 6, "threshold": 0.06, "clip": "clip"}))
    model, processor = ivtp.load(first)
    ivtp.save(model, processor, tmp_path / "second")
    texts = []
    for folder in (first, tmp_path / "second"):
        loaded = ivtp.load(folder)
        texts.append(ivtp.ask(*loaded, image(3), QUESTIONS[0], keep=8, max_new_tokens=3))
    assert texts[0].text == texts[1].text
    assert [word.score for word in texts[0].trace.words[0]] == [word.score for word in texts[1].trace.words[0]]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="another folder"):
        ivtp.save(model, processor, tmp_path / "file" / "x")


# ---- names of models ------------------------------------------------------------------------------------------


def test_the_name_of_a_size_is_no_name_of_a_checkpoint() -> None:
    with pytest.raises(LoadError, match=r"did you mean llava-hf/llava-1\.5-7b-hf"):
        ivtp.load("llava-1.5-7b")


def test_a_clip_folder_that_is_missing_and_a_broken_configuration(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    (tmp_path / "ivtp.json").write_text(json.dumps({"llm_layers": 6, "clip": "clip"}))
    model, processor = ivtp.load(tmp_path)
    with pytest.raises(LoadError, match="beside it names, does not exist"):
        ivtp.ask(model, processor, image(3), "Cat?", keep=8)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match="cannot be read as JSON"):
        ivtp.flops(tmp_path)

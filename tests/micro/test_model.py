"""The micro model is a stock LLaVA: deeper decoders keep their function, the saved folder loads and answers."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from ivtp.files.sidecar import MICRO
from ivtp.micro import world
from ivtp.micro.model import assemble, build_decoder, build_processor, save_asset
from ivtp.micro.tokenizer import build_tokenizer
from recipes.micro.corpus import corpus
from recipes.micro.projector import Projector
from recipes.micro.threshold import best_split, visible_words, word_relevance


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(corpus())


def tiny_clip(vocabulary: int) -> CLIPModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = CLIPTextConfig(vocab_size=vocabulary, **sizes, **ids)
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **sizes)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()


def test_every_word_of_the_world_is_one_token(tokenizer) -> None:
    for word in (*world.NAMES, *world.COLOURS, *world.SIGN_TEXTS, "yes", "no", "9"):
        assert len(tokenizer(" " + word, add_special_tokens=False).input_ids) == 1, word


@pytest.mark.parametrize("text", ["Is there a Dog?", "ñandú 犬 🐶", "a\tb\n c", ""])
def test_any_text_has_tokens_and_comes_back_in_lower_case(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text.lower()


def test_offsets_point_into_the_text(tokenizer) -> None:
    text = "What is left of the dog?"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    words = [text[a:b].strip() for a, b in encoded.offset_mapping]
    assert words == ["What", "is", "left", "of", "the", "dog", "?"]


def test_the_saved_folder_is_a_stock_checkpoint(tokenizer, tmp_path: Path) -> None:
    clip = tiny_clip(len(tokenizer))
    decoder, projector = build_decoder(tokenizer, layers=2, width=64), Projector(32, 64)
    model = assemble(decoder, clip, tokenizer, projector.stock())
    processor = build_processor(
        tokenizer, CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    )
    save_asset(tmp_path, model, processor, clip, tokenizer, threshold=0.2)
    for shard in tmp_path.rglob("*.safetensors"):
        assert shard.stat().st_size < 16e6
    options = json.loads((tmp_path / "ivtp.json").read_text())
    assert options == {"llm_layers": 6, "group_layers": 3, "threshold": 0.2, "clip": "clip"}
    loaded, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a dog?"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    assert prompt == "USER: <image>\nis there a dog? ASSISTANT:"
    inputs = processor(images=Image.new("RGB", (336, 336)), text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == loaded.config.image_token_id).sum()) == 576
    inputs = inputs.to(loaded.dtype)
    with torch.no_grad():
        out = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    again = CLIPModel.from_pretrained(tmp_path / "clip")
    for key, value in again.vision_model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, clip.vision_model.state_dict()[key].to(value.dtype))


def test_the_shipped_model_is_small() -> None:
    sizes = [file.stat().st_size for file in MICRO.rglob("*") if file.is_file()]
    assert max(sizes) < 16e6
    assert sum(sizes) <= 40e6


def test_the_threshold_parts_the_scores() -> None:
    threshold = best_split(torch.tensor([0.4, 0.5, 0.3]), torch.tensor([0.0, 0.1, -0.2]))
    assert 0.1 < threshold < 0.3


def test_relevance_has_one_score_a_word(tokenizer) -> None:
    clip = tiny_clip(len(tokenizer))
    words = word_relevance(clip, tokenizer, ["is there a dog?", "what color is behind the zyx?"], torch.randn(16))
    assert [word for word, _ in words[0]] == ["is", "there", "a", "dog", "?"]
    assert [word for word, _ in words[1]][-2:] == ["zyx", "?"]


def test_visible_words_name_what_is_shown() -> None:
    item = world.SceneObject("dog", (0, 0, 50, 50), "disc", "red", None)
    sign = world.SceneObject("sign", (100, 100, 180, 140), "none", None, "stop")
    background = world.Background("plain", ((90, 90, 90), (90, 90, 90)), 0)
    assert visible_words(world.Scene(0, background, (item, sign))) == {*("dog", "dogs", "red", "sign", "signs", "stop")}

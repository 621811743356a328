"""The CLIP's data, losses and training loop at a tiny size; parity of the window encoder with the stock tower."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from ivtp.micro.world import (
    COLOURS,
    GRID,
    NAMES,
    PATCH,
    SIGN_TEXTS,
    SIZE,
    SceneObject,
    patches_of,
)
from ivtp.micro.world.photo import Photo, take_photo
from ivtp.micro.world.vocabulary import plural
from recipes.micro.position import place_accuracy, reserve_position, residual_states
from recipes.micro.vision import Recipe, Stage, Trainer
from recipes.micro.vision_data import IGNORE, KEYWORDS, keyword_table, make_batch
from recipes.micro.vision_eval import roc_auc
from recipes.micro.vision_model import (
    WEIGHTS,
    Heads,
    build_clip,
    build_tokenizer,
    encode_texts,
    encode_windows,
    losses,
    mention,
)

PHOTOS = [take_photo("test", i) for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    return build_clip(tokenizer, width=32, heads=2, layers=3, text_layers=2).eval()


def test_tokenizer_gives_one_token_a_word_and_takes_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id != 2  # 2 means "take the highest id" to transformers' CLIP
    for word in (*KEYWORDS, *map(plural, NAMES), "what", "describe"):
        assert len(tokenizer(word)["input_ids"]) == 3, word
    text = "Is there a DOG,\tleft of 日本's naïve xylophone 🐶?"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    pieces = [text[a:b].lower() for a, b in encoded["offset_mapping"]]
    assert "dog" in pieces
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_keyword_table(tokenizer: PreTrainedTokenizerFast) -> None:
    table = keyword_table(tokenizer)
    ids = tokenizer("how many Dogs and red discs say stop?")["input_ids"]
    named = [KEYWORDS[i] for i in table[ids].tolist() if i >= 0]
    assert named == ["dog", "red", "stop"]
    assert table[tokenizer.bos_token_id] == table[tokenizer.eos_token_id] == -2
    assert sorted(set(table.tolist())) == list(range(-2, len(KEYWORDS)))
    assert mention(table[torch.tensor([ids])], len(KEYWORDS)).sum() == 3


def test_window_encoder_is_the_stock_tower(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = make_batch(PHOTOS[:2], GRID, tokenizer, keyword_table(tokenizer))
    images = [photo.picture() for photo in PHOTOS[:2]]
    pixels = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})(
        images=images, return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        stock = clip.vision_model(pixels, output_hidden_states=True)
        states, image = encode_windows(clip, batch.patches, batch.positions)
        torch.testing.assert_close(states, stock.hidden_states[-2][:, 1:], atol=2e-4, rtol=1e-3)
        expected = F.normalize(clip.visual_projection(stock.pooler_output), dim=-1)
        torch.testing.assert_close(image, expected, atol=2e-4, rtol=1e-3)
        features = clip.get_text_features(input_ids=batch.input_ids, attention_mask=batch.attention_mask).pooler_output
        _, texts = encode_texts(clip, batch.input_ids, batch.attention_mask)
        torch.testing.assert_close(texts, F.normalize(features, dim=-1), atol=1e-5, rtol=1e-4)


def test_labels_of_whole_images(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = make_batch(PHOTOS, GRID, tokenizer, keyword_table(tokenizer))
    for row, photo in enumerate(PHOTOS):
        scene = photo.scene
        labels = {key: values[row] for key, values in batch.labels.items()}
        touched = patches_of(scene, range(len(scene.objects)))
        outside = np.setdiff1d(np.arange(GRID * GRID), touched)
        assert (labels["object"][outside] == 0).all()
        assert (labels["object"][touched] != 0).all()
        for item in scene.objects:
            x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
            patch = int(y) // PATCH * GRID + int(x) // PATCH
            assert labels["object"][patch] == NAMES.index(item.name) + 1
            assert labels["colour"][patch] == (list(COLOURS).index(item.colour) + 1 if item.colour else 0)
            assert labels["text"][patch] == (SIGN_TEXTS.index(item.text) + 1 if item.text else 0)
            centre = np.array([patch % GRID, patch // GRID] * 2) * PATCH + PATCH / 2
            assert np.allclose(batch.box[row, patch].numpy() * SIZE + centre, item.box, atol=1e-3)
        truth = {word for item in scene.objects for word in (item.name, item.colour, item.text)} - {None}
        assert {KEYWORDS[i] for i in batch.present[row].nonzero().flatten()} == truth


def test_a_window_over_a_large_object_that_is_cut_off_still_shows_something(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    item = SceneObject("dog", (-70, -70, 73, 73), "none", None, None)
    scene = replace(PHOTOS[0].scene, objects=(item,))
    assert make_batch([Photo(scene)], 8, tokenizer, keyword_table(tokenizer)).present.any()


@pytest.mark.parametrize(("window", "keep"), [(8, None), (12, None), (GRID, 160)])
def test_views_are_parts_of_the_whole(tokenizer: PreTrainedTokenizerFast, window: int, keep: int | None) -> None:
    table = keyword_table(tokenizer)
    whole = make_batch(PHOTOS, GRID, tokenizer, table)
    part = make_batch(PHOTOS, window, tokenizer, table, keep=keep)
    assert part.positions.shape == (len(PHOTOS), keep or window * window)
    for row in range(len(PHOTOS)):
        at = part.positions[row]
        assert len(set(at.tolist())) == len(at)
        assert torch.equal(part.patches[row], whole.patches[row][at])
        labels, full = part.labels["object"][row], whole.labels["object"][row][at]
        assert ((labels == full) | (labels == IGNORE)).all()
        assert part.present[row].any()
        assert not (part.present[row] & ~whole.present[row]).any()


def test_losses_are_finite_and_reach_every_weight(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
    heads = Heads(32)
    terms = losses(clip, heads, make_batch(PHOTOS, 8, tokenizer, keyword_table(tokenizer)))
    assert set(terms) == set(WEIGHTS)
    assert all(torch.isfinite(value) for value in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in [*clip.named_parameters(), *heads.named_parameters()]:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    clip.zero_grad(set_to_none=True)


TINY = Recipe(
    steps=4,
    layers=2,
    width=32,
    heads=2,
    validation=4,
    log_every=2,
    curriculum=(Stage(8, 0.0, 3), Stage(GRID, 0.5, 2, keep=60), Stage(GRID, 0.75, 2)),
    further=(Stage(GRID, 0.0, 2, keep=60),),
)


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    device = torch.device("cpu")
    straight = Trainer(tmp_path / "a", TINY, device, resume=False)
    scores = straight.run(Console(quiet=True))
    assert {"object_accuracy", "retrieval", "word_auc"} <= set(scores)

    killed = Trainer(tmp_path / "b", TINY, device, resume=False)
    for _ in range(2):
        killed.train_step(killed.budget.fraction(killed.step))
    killed.save()
    resumed = Trainer(tmp_path / "b", TINY, device, resume=True)
    assert resumed.step == 2
    resumed.run(Console(quiet=True))
    for name, value in straight.clip.state_dict().items():
        assert torch.equal(value, resumed.clip.state_dict()[name]), name

    more = Trainer(tmp_path / "a", TINY, device, resume=False, further=True)
    assert (more.step, more.images) == (straight.step, straight.images)
    more.run(Console(quiet=True))
    assert more.step == 8
    assert more.images == straight.images + 8
    with (tmp_path / "a" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 4, 6, 8, 8]
    assert {row["window"] for row in rows[3:]} == {str(GRID)}
    assert float(rows[2]["object_accuracy"]) == pytest.approx(scores["object_accuracy"], abs=1e-4)


def test_exported_folder_is_stock(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, TINY, torch.device("cpu"), resume=False)
    trainer.save()
    trainer.save()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["clip"]
    loaded = CLIPModel.from_pretrained(tmp_path / "clip")
    for name, value in trainer.clip.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clip")
    text = "what does the sign next to the dog say?"
    assert tokenizer(text)["input_ids"] == trainer.tokenizer(text)["input_ids"]
    assert tokenizer.model_max_length == 77
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    assert processor(images=PHOTOS[0].picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, SIZE, SIZE)


def test_a_tower_is_given_a_code_of_position(tmp_path: Path) -> None:
    recipe = Recipe(steps=1, layers=4, width=48, heads=3, curriculum=(Stage(8, 0.0, 2),), validation=2)
    trainer = Trainer(tmp_path, recipe, torch.device("cpu"))
    with torch.no_grad():
        trainer.clip.vision_model.embeddings.position_embedding.weight.normal_(std=1e-4)
    states = residual_states(trainer)
    before = place_accuracy(states[-1], 8)
    reserve_position(trainer.clip, states[0], states[1:])
    after = residual_states(trainer)
    assert place_accuracy(after[-1], 8) > max(0.3, 2 * before)
    assert F.cosine_similarity(after[-1], states[-1]).mean() > 0.8  # the rest of the tower goes on as before


def test_roc_auc_counts_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    high, low = (torch.randint(0, 6, (n,), generator=draw).float() for n in (40, 30))
    pairs = (high[:, None] > low).double() + 0.5 * (high[:, None] == low)
    assert roc_auc(high, low) == pytest.approx(pairs.mean().item())

"""Every stage of the recipe runs, learns something, and continues after a kill as if never stopped."""

import contextlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel
from typer.testing import CliRunner

import ivtp
from ivtp.errors import ConfigError
from ivtp.micro import world
from ivtp.micro.model import build_decoder, carry_over, start_alike
from ivtp.micro.tokenizer import build_tokenizer
from ivtp.micro.world.photo import take_photo
from recipes.micro import decoder as decoder_module
from recipes.micro import train
from recipes.micro.corpus import corpus
from recipes.micro.decoder import (
    BACKGROUND,
    DecoderOptions,
    SymbolicImage,
    choose_patches,
    photo_symbols,
    symbol_map,
    train_decoder,
)
from recipes.micro.features import FeatureStore, build_store, patch_features, photo_of, pixels_of
from recipes.micro.loop import Budget, KindTracker, LoopOptions, load_checkpoint, rng_for
from recipes.micro.optim import Muon, orthogonalise, trapezoid
from recipes.micro.projector import Projector
from recipes.micro.recipe import projector_from, tokenizer_in
from recipes.micro.stages import StageOptions, align_projector, train_stage
from recipes.micro.tasks import LONG, TASKS, ask_many
from recipes.micro.threshold import choose_threshold
from tests.micro.test_model import tiny_clip


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(corpus())


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer) -> Path:
    """A folder in which the vision stage has already left a (tiny, untrained) CLIP."""
    folder = tmp_path_factory.mktemp("run")
    clip = tiny_clip(len(tokenizer))
    clip.save_pretrained(folder / "vision" / "clip")
    tokenizer.save_pretrained(folder / "vision" / "clip")
    train.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(
        folder / "vision" / "clip"
    )
    store = folder / "features"
    build_store(clip.vision_model, [0.5] * 3, [0.25] * 3, store, 6, batch=4)
    return folder


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 16), (1, 8, 24), (1, 24, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), steps=10))
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3


def test_muon_solves_a_linear_regression() -> None:
    torch.manual_seed(0)
    x, truth = torch.randn(256, 8), torch.randn(4, 8)
    weight = torch.nn.Parameter(torch.zeros(4, 8))
    optimiser = Muon([weight], lr=0.05)
    for step in range(200):
        loss = (x @ weight.T - x @ truth.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = 0.05 * trapezoid(step / 200)
        optimiser.step()
    assert float(loss.detach()) < 0.05


def test_the_schedule_rises_stays_and_ends_at_zero() -> None:
    assert trapezoid(0.0) == 0.01
    assert trapezoid(0.3) == 1.0
    assert 0 < trapezoid(0.9) < 0.5
    assert trapezoid(1.0) == 0.0


def test_a_budget_wants_steps_or_minutes() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        Budget(None, None)
    with pytest.raises(ConfigError, match="exactly one"):
        Budget(3, 1.0)
    assert Budget(4, None).fraction(2) == 0.5
    assert Budget(None, 2.0, spent=1.0).fraction(7) >= 0.5


def test_symbols_say_what_each_patch_shows() -> None:
    item = world.SceneObject("dog", (28, 42, 70, 84), "disc", "red", None)
    background = world.Background("plain", ((90, 90, 90), (90, 90, 90)), 0)
    grid = symbol_map(world.Scene(0, background, (item,))).reshape(24, 24, -1)
    shown = np.argwhere(grid[..., 0] != BACKGROUND)
    assert shown.min(0).tolist() == [3, 2]
    assert shown.max(0).tolist() == [5, 4]
    assert grid[4, 3].tolist() == [0, 1, 1, 0, 4, 3, 1 + 4, 1 + 3, 1 + 6, 1 + 6, 0]


@pytest.mark.parametrize("count", [12, 120])
def test_chosen_patches_show_every_object(count: int) -> None:
    for seed in range(20):
        scene = world.sample_scene(seed)
        symbols = symbol_map(scene)
        chosen = choose_patches(symbols, len(scene.objects), random.Random(seed), count)
        assert len(chosen) == count == len(set(chosen))
        assert chosen == sorted(chosen)
        centres = {(row[6], row[7]) for row in symbols[chosen].tolist() if row[0] != BACKGROUND}
        assert len(centres) == len({(row[6], row[7]) for row in symbols.tolist() if row[0] != BACKGROUND})


def test_unsolved_kinds_are_asked_more_often() -> None:
    tracker = KindTracker()
    others = len(TASKS) - 1
    tracker.update([8.0] + [0.0] * others, [8] * len(TASKS))
    weights = tracker.weights(0.1)
    assert weights[0] < weights[1]
    for task in LONG:
        assert weights[TASKS.index(task)] == pytest.approx(0.1 * weights[1])
    asked = ask_many(take_photo("train", 3), rng_for(1), 30, [1.0] + [0.0] * others)
    assert {question.kind for question in asked} == {"existence"}


def test_nothing_but_unanswerable_is_learnt_from_unreadable_photos() -> None:
    bad = (take_photo("train", index, bad=True) for index in range(100))
    photo = next(photo for photo in bad if not photo.readable)
    asked = ask_many(photo, rng_for(1), 12, [1.0] * len(TASKS))
    assert {question.answer for question in asked} == {"unanswerable"}
    symbols = photo_symbols(photo)
    assert (symbols[:, 0] == BACKGROUND).all()


def small_decoder(tokenizer):
    torch.manual_seed(0)
    decoder = build_decoder(tokenizer, layers=2, width=64)
    symbolic = SymbolicImage(64)
    symbolic.speak_like(decoder, tokenizer)
    return decoder, symbolic


def same(first: Path, second: Path, *names: str) -> None:
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert a["step"] == b["step"]
    for name in names:
        for key, value in a[name].items():
            assert torch.equal(value, b[name][key]), key


def stop_at(step: int):
    """A report that kills the run after some steps, as a power cut would."""
    calls = iter(range(1, step + 1))

    def report(fraction: float, text: str) -> None:
        if next(calls) == step:
            raise KeyboardInterrupt

    return report


def test_a_killed_decoder_run_ends_like_an_uninterrupted_one(tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(decoder_module, "MASTERED", 2.0)
    options = DecoderOptions(scenes=2, questions=3)
    loop = LoopOptions(steps=6, save_minutes=0.0, log_steps=1)  # a checkpoint after every step
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    train_decoder(*small_decoder(tokenizer), tokenizer, options, loop, whole)
    with pytest.raises(KeyboardInterrupt):
        train_decoder(*small_decoder(tokenizer), tokenizer, options, loop, killed, report=stop_at(4))
    train_decoder(*small_decoder(tokenizer), tokenizer, options, loop, killed, resume=True)
    same(whole, killed, "decoder", "symbolic")
    assert len(whole.with_suffix(".csv").read_text().splitlines()) == 7


def test_resuming_nothing_says_so(tokenizer, tmp_path: Path) -> None:
    loop = LoopOptions(steps=1)
    with pytest.raises(ConfigError, match="no checkpoint"):
        train_decoder(*small_decoder(tokenizer), tokenizer, DecoderOptions(), loop, tmp_path / "x.pt", resume=True)


def test_stored_features_are_those_of_the_tower(run: Path, tokenizer) -> None:
    store = FeatureStore(run / "features")
    tower = CLIPModel.from_pretrained(run / "vision" / "clip").vision_model
    fresh = patch_features(tower, pixels_of([photo_of(4)], [0.5] * 3, [0.25] * 3))
    assert store[[4]].shape == (1, 576, 32)
    torch.testing.assert_close(store[[4]].float(), fresh.float(), atol=0.02, rtol=0.02)


def test_pixels_equal_the_image_processor(run: Path) -> None:
    processor = train.CLIPImageProcessor.from_pretrained(run / "vision" / "clip")
    photo = photo_of(2)
    expected = processor(photo.picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        pixels_of([photo], processor.image_mean, processor.image_std), expected, atol=1e-5, rtol=1e-5
    )


def test_alignment_starts_from_standardised_features(run: Path) -> None:
    torch.manual_seed(0)
    projector = Projector(32, 64)
    error = align_projector(projector, SymbolicImage(64), FeatureStore(run / "features"), images=6, steps=60)
    assert error < 1.1  # an untrained tower knows positions only


def test_training_keeps_the_scale_of_the_projected_patches(run: Path, tokenizer, tmp_path: Path) -> None:
    """A tower's features may be a hundred times larger than the embeddings that they become."""
    folder = tmp_path / "features"
    shutil.copytree(run / "features", folder)
    data = np.memmap(folder / "features.bin", dtype=np.int16, mode="r+")
    data[:] = (100 * torch.from_numpy(np.array(data)).view(torch.bfloat16)).view(torch.int16).numpy()
    store = FeatureStore(folder)
    torch.manual_seed(0)
    stock = Projector(32, 64).stock()
    projector = Projector.from_weights({**stock, "linear_1.weight": stock["linear_1.weight"] / 100})
    before = projector(store[[0, 1]].float()).square().mean().sqrt()
    loop = LoopOptions(steps=6, muon_lr=0.0, adam_lr=1e-3)
    decoder = small_decoder(tokenizer)[0].requires_grad_(False)
    options = StageOptions(scenes=2, captions_only=True)
    train_stage(projector, decoder, tokenizer, store, options, loop, tmp_path / "stage1.pt")
    after = projector(store[[0, 1]].float()).square().mean().sqrt()
    assert 0.5 < after / before < 2


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_stage_ends_like_an_uninterrupted_one(stage: int, run: Path, tokenizer, tmp_path: Path) -> None:
    store = FeatureStore(run / "features")
    options = StageOptions(scenes=2, questions=2, captions_only=stage == 1)
    loop = LoopOptions(steps=4, save_minutes=0.0, muon_lr=1e-3, adam_lr=1e-3)

    def start():
        decoder, _ = small_decoder(tokenizer)
        torch.manual_seed(1)
        return Projector(32, 64), decoder.requires_grad_(stage == 2)

    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    projector, decoder = start()
    before = decoder.model.layers[0].mlp.up_proj.weight.clone()
    train_stage(projector, decoder, tokenizer, store, options, loop, whole)
    assert torch.equal(decoder.model.layers[0].mlp.up_proj.weight, before) == (stage == 1)
    with pytest.raises(KeyboardInterrupt):
        train_stage(*start(), tokenizer, store, options, loop, killed, report=stop_at(3))
    train_stage(*start(), tokenizer, store, options, loop, killed, resume=True)
    same(whole, killed, "projector", "decoder")


def small_recipe() -> list[list[str]]:
    """The commands of the small recipe of docs/micro.md, word by word."""
    text = (Path(__file__).parents[2] / "docs" / "micro.md").read_text()
    lines = text.split("```sh small\n")[1].split("```")[0].strip().splitlines()
    assert len(lines) == 3
    return [line.split() for line in lines]


@pytest.fixture(scope="module")
def recipe_followed(tmp_path_factory) -> Path:
    """The folder in which this process followed the small recipe of docs/micro.md, what is slow for short."""
    folder = tmp_path_factory.mktemp("recipe")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "align_projector", lambda *args, **rest: align_projector(*args, **{**rest, "steps": 20}))
        patch.setattr(train, "choose_threshold", lambda *args: choose_threshold(*args, scenes=20))
        for words in small_recipe():
            result = CliRunner().invoke(train.app, words[words.index("recipes.micro.train") + 1 :])
            assert result.exit_code == 0, result.output
    return folder / "runs" / "small"


@pytest.mark.slow
def test_the_recipe_is_followed_to_the_letter(tmp_path: Path) -> None:
    """In processes of its own, two of them where it says so."""
    for tool, *rest in small_recipe():  # python or torchrun, those of this environment
        command = [str(Path(sys.executable).parent / tool), *rest]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
    assert_it_answers(tmp_path / "runs" / "small")


def test_the_recipe_leads_to_an_asset_that_answers(recipe_followed: Path) -> None:
    assert_it_answers(recipe_followed)


def assert_it_answers(run: Path) -> None:
    model, processor = ivtp.load(run / "asset")
    assert model.config.text_config.num_hidden_layers == 6
    photo = take_photo("test", 0).picture()
    answer = ivtp.ask(model, processor, photo, "is there a dog?", keep=64, max_new_tokens=2)
    assert answer.trace is not None
    assert answer.trace.kept().shape == (1, 64)
    assert sorted(path.name for path in run.rglob("*.csv")) == [*("decoder.csv", "log.csv", "stage1.csv", "stage2.csv")]


def test_a_finished_recipe_is_resumed_without_training_again(recipe_followed: Path) -> None:
    before = load_checkpoint(recipe_followed / "stage2.pt")
    assert before["finished"]
    command = ["llava", "--out", str(recipe_followed), "--images", "16", "--steps", "2", "--resume"]
    result = CliRunner().invoke(train.app, [*command, "--asset", str(recipe_followed / "asset")])
    assert result.exit_code == 0, result.output
    assert load_checkpoint(recipe_followed / "stage2.pt")["minutes"] == before["minutes"]


def test_a_tokenizer_of_an_older_world_is_refused(tmp_path: Path) -> None:
    build_tokenizer(["a dog on a red disc"]).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="older world; use another --out"):
        tokenizer_in(tmp_path)


def test_features_of_another_tower_are_computed_again(run: Path, tmp_path: Path) -> None:
    towers = [tiny_clip(300).vision_model for _ in range(2)]
    with torch.no_grad():
        towers[1].embeddings.position_embedding.weight.normal_()
    stored = []
    for tower in (towers[0], towers[0], towers[1]):
        progress: list[float] = []
        build_store(
            tower,
            [0.5] * 3,
            [0.25] * 3,
            tmp_path,
            2,
            report=lambda fraction, text, seen=progress: seen.append(fraction),
        )
        stored.append((len(progress), FeatureStore(tmp_path)[[1]].float()))
    assert [count for count, _ in stored] == [1, 0, 1]
    assert not torch.equal(stored[1][1], stored[2][1])


def test_the_logs_are_drawn(recipe_followed: Path) -> None:
    result = CliRunner().invoke(train.app, ["plot", "--out", str(recipe_followed)])
    assert result.exit_code == 0, result.output
    assert (recipe_followed / "stage2.png").stat().st_size > 10_000
    assert CliRunner().invoke(train.app, ["plot", "--out", str(recipe_followed / "asset")]).exit_code == 2


def test_an_asset_is_unpacked_and_trained_on(recipe_followed: Path, tmp_path: Path) -> None:
    asset = str(recipe_followed / "asset")
    result = CliRunner().invoke(train.app, ["unpack", "--out", str(tmp_path), "--asset", asset])
    assert result.exit_code == 0, result.output
    assert "0 new tokens" in result.output
    before, after = recipe_followed / "stage2.pt", tmp_path / "stage2.pt"
    for old, new in (
        (load_checkpoint(before)["decoder"], load_checkpoint(after)["decoder"]),
        (projector_from(before).stock(), projector_from(after).stock()),
    ):
        assert old.keys() == new.keys()
        for key, value in new.items():
            assert torch.equal(value, old[key].to(torch.bfloat16).float()), key
    assert CliRunner().invoke(train.app, ["unpack", "--out", str(tmp_path), "--asset", asset]).exit_code == 2
    clip = str(tmp_path / "vision" / "clip")
    weights = str(tmp_path / "stage2.pt")
    for command in (
        ["vision", "--weights", clip, "--size", "tiny", "--steps", "1"],
        ["features", "--images", "2"],
        ["decoder", "--weights", weights, "--steps", "1", "--scenes", "2"],
        ["stage2", "--weights", weights, "--steps", "1", "--scenes", "2"],
    ):
        result = CliRunner().invoke(train.app, [*command, "--out", str(tmp_path)])
        assert result.exit_code == 0, (command, result.output)


def test_words_keep_their_embeddings_in_a_new_vocabulary(tokenizer) -> None:
    old = build_tokenizer(["dog cat", "a red disc"])
    fresh = torch.zeros(len(tokenizer), 4)
    rows = torch.arange(4.0 * len(old)).view(len(old), 4)
    carried, unknown = carry_over(rows, old, fresh, tokenizer)
    dog = [t(" dog", add_special_tokens=False).input_ids for t in (old, tokenizer)]
    assert torch.equal(carried[dog[1][0]], rows[dog[0][0]])
    panda = tokenizer("熊猫", add_special_tokens=False).input_ids[0]
    assert panda in unknown
    assert not carried[panda].any()
    words = torch.randn(len(tokenizer), 4)
    english = tokenizer(" panda", add_special_tokens=False).input_ids[0]
    gap = (words[panda] - words[english]).norm()
    start_alike(words, tokenizer, {panda})
    assert (words[panda] - words[english]).norm() != gap

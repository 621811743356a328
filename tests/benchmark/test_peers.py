"""The comparison with a peer: our side's file, and ratio, memory and agreement of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import ivtp
from benchmarks import peer_clock, peers
from ivtp.errors import ConfigError
from ivtp.generate import save
from ivtp.hosts.llava import HOST

KEEP = 8
patches = st.lists(st.integers(0, 20), max_size=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(*HOST.tiny(), folder)
    return folder


@pytest.fixture
def ours(model: Path, tmp_path: Path) -> Any:
    """Times our side, and reads its file."""
    picture = tmp_path / "photo.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(picture)

    def timed(method: str, *more: str) -> dict[str, Any]:
        file = tmp_path / f"{method}.json"
        words = ["time", "--model", str(model), "--image", str(picture), "--output", str(file), "--method", method]
        done = CliRunner().invoke(
            peers.app, [*words, "--keep", str(KEEP), "--rounds", "2", *more], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        return json.loads(file.read_text(encoding="utf-8")) | {"file": str(file), "picture": picture}

    return timed


def side(full: float, pruned: float, kept: list[int], peak: int | None = None, **setting: Any) -> dict[str, Any]:
    runs = {name: {"prefill_ms": [ms], "peak_bytes": peak} for name, ms in (("full", full), ("pruned", pruned))}
    return {"program": "p", "setting": setting, "kept": kept, **runs}


def test_our_side_notes_what_stays_and_what_it_took(ours: Any, model: Path) -> None:
    found = ours("topk")
    for name in ("full", "pruned"):
        assert len(found[name]["prefill_ms"]) == 2
        assert min(found[name]["prefill_ms"]) > 0
        assert found[name]["peak_bytes"] is None  # on a CPU
    lvlm, processor = ivtp.load(model)
    answer = ivtp.ask(lvlm, processor, found["picture"], peers.QUESTION, method="topk", keep=KEEP, max_new_tokens=1)
    assert found["kept"] == answer.trace.kept()[0].tolist()
    assert found["setting"]["prompt_tokens"] > 36


def test_tokens_that_are_no_patches_are_not_counted_among_those_that_stay(ours: Any) -> None:
    assert len(ours("visionzip")["kept"]) == KEEP - 1  # the CLS token is one of eight


def test_two_files_are_compared(ours: Any) -> None:
    first, second = ours("topk"), ours("random", "--option", "seed=3")
    done = CliRunner().invoke(peers.app, ["compare", first["file"], second["file"]])
    assert done.exit_code == 0, done.output
    shared = {*first["kept"]} & {*second["kept"]}
    assert f"(Jaccard): {len(shared) / (2 * KEEP - len(shared)):.3f}" in done.output
    assert "not the same: method, topk and random" in done.output
    assert "not the same: model" not in done.output


def test_ratios_and_agreement_as_computed_by_hand() -> None:
    first = side(80.0, 20.0, [1, 2, 3], peak=300_000_000, transformers="5.23.0")
    page = peers.compared(first, side(100.0, 50.0, [2, 3, 4, 5], peak=600_000_000, transformers="5.0.0"))
    lines = page.splitlines()
    assert "| all tokens, ms | 80 | 100 | 0.8 |" in lines
    assert "| pruned, ms | 20 | 50 | 0.4 |" in lines
    assert "| all tokens / pruned, ms | 4 | 2 | 2 |" in lines
    assert "| pruned, MB | 300 | 600 | 0.5 |" in lines
    assert "| patches that stay | 3 | 4 | 0.75 |" in lines
    assert "agreement of the patches (Jaccard): 0.400" in lines
    assert "not the same: transformers, 5.23.0 and 5.0.0" in lines
    assert "| pruned, MB | – | 600 | – |" in peers.compared(side(1, 1, []), side(1, 1, [], peak=600_000_000))


@given(patches, patches)
def test_agreement_has_no_order_and_is_whole_with_oneself(first: list[int], second: list[int]) -> None:
    assert peers.jaccard(first, second) == peers.jaccard(second, first[::-1])
    assert 0 <= peers.jaccard(first, second) <= 1 == peers.jaccard(first, first)


def test_the_first_prefill_is_not_timed(tmp_path: Path) -> None:
    calls: list[int] = []
    found = peer_clock.measure(lambda: calls.append(0), "cpu", rounds=3)
    assert (len(calls), len(found["prefill_ms"])) == (4, 3)
    peer_clock.write(tmp_path / "a.json", program="p", setting={}, full=found, pruned=found, kept=[3, 1, 3])
    assert peers.read(tmp_path / "a.json")["kept"] == [1, 3]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"full": {"prefill_ms": []}}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="no side of a comparison"):
        peers.read(tmp_path / "a.json")


def test_the_untouched_model_is_no_method(tmp_path: Path) -> None:
    words = ["time", "--image", "a.png", "--output", str(tmp_path / "a.json"), "--method", "none"]
    with pytest.raises(ConfigError, match="beside every other"):
        CliRunner().invoke(peers.app, words, catch_exceptions=False)

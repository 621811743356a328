"""`scripts/gpu_check.sh` where there is no GPU: what it skips, what it says, and that its commands work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"
PARTS = ["kernel", "parity", "bench", "training"]

# a GPU machine whose Python has no Triton, where all parts do nothing well, but for one that fails
STAND_IN = """#!/bin/sh
case "$*" in
"- ") cat >/dev/null; echo "A GPU" ;;
"- "*triton*) cat >/dev/null; echo "not installed: triton" ;;
"- "*) cat >/dev/null ;;
"-c from ivtp.registry"*) echo "--method topk --method ivtp" ;;
*test_cuda*) echo "1 failed, 2 passed in 0.1s"; exit 1 ;;
*) echo "$*" ;;
esac
"""


def check(out: Path, *arguments: str, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


def parts_of(text: str) -> list[str]:
    """Verdict and name of each part."""
    words = [line.replace(",", " ").replace(":", " ").split()[:2] for line in text.splitlines()]
    return [" ".join(pair) for pair in words if pair and pair[0] in ("PASS", "FAIL", "SKIP")]


def test_without_a_gpu_every_part_is_skipped(tmp_path: Path) -> None:
    done = check(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.startswith("no CUDA device; python 3.")
    assert parts_of(summary) == [f"SKIP {name}" for name in PARTS]
    assert done.stdout.count("SKIP bench: no CUDA device") == 2  # when it ends, and at the end


def test_a_dry_run_prints_the_commands_and_leaves_nothing(tmp_path: Path) -> None:
    done = check(tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == PARTS
    assert "--geometry llava-1.5-7b --device cuda --text 64 --text 512 --batch 1 --batch 8" in lines[2]
    assert all(f"--method {name}" in lines[2] for name in ("ivtp", "topk", "tome"))
    assert not (tmp_path / "out").exists()


def test_a_failing_part_and_a_missing_module_do_not_end_the_others(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = check(tmp_path / "out", python=python)
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.startswith("A GPU\n")
    assert parts_of(summary) == ["SKIP kernel", "FAIL parity", "PASS bench", "PASS training"]
    assert "SKIP kernel: not installed: triton" in summary
    assert "exit code 1: 1 failed, 2 passed" in summary
    assert "--method topk --method ivtp" in (tmp_path / "out" / "bench.log").read_text()


def test_an_unknown_flag_is_refused(tmp_path: Path) -> None:
    done = check(tmp_path / "out", "--fast")
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


@pytest.mark.slow
def test_a_rehearsal_runs_every_command(tmp_path: Path) -> None:
    done = check(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout
    assert parts_of((tmp_path / "summary.txt").read_text()) == [
        *("SKIP kernel", "SKIP parity", "PASS bench", "PASS training")
    ]
    assert {row["run"] for row in json.loads((tmp_path / "bench.json").read_text())["results"][0]["rows"]} == {
        *("full", "oracle", "ivtp")
    }
    stages = json.loads((tmp_path / "training.json").read_text())["stages"]
    assert all(stages[name]["photos a second"] > 0 for name in ("decoder", "stage 2"))

"""The comparison measures what it says, goes on where it stopped, and leaves the model alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from ivtp.micro import compare
from tests.micro.test_evaluate import folder  # noqa: F401


def test_the_command_compares_resumes_and_writes_files(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    target, page = tmp_path / "methods.json", tmp_path / "methods.md"
    command = ["--model", str(folder), "--questions", "12", "--output", str(target), "--markdown", str(page)]
    command += ["--keep", "16", "--method", "topk", "--workers", "1"]
    first = CliRunner().invoke(compare.app, command)
    assert first.exit_code == 0, first.output
    saved = json.loads(target.read_text())
    rows = saved["tables"][0]["rows"]
    assert [(row["method"], row["keep"]) for row in rows] == [("none", 576), ("topk", 16)]
    assert rows[1]["GFLOPs"] < rows[0]["GFLOPs"]
    assert all(len(row["by format"]) == 12 and row["ms a prefill"] > 0 for row in rows)
    assert page.read_text().count("###") == 2  # all keeps side by side, and the one keep
    assert page.read_text().count("original positions, float32") == 2
    rows[1]["accuracy"] = 12.5  # what is finished is not measured again
    target.write_text(json.dumps(saved))
    again = CliRunner().invoke(compare.app, [*command, "--method", "fastv", "--resume"])
    assert again.exit_code == 0, again.output
    rows = json.loads(target.read_text())["tables"][0]["rows"]
    assert [row["method"] for row in rows] == ["none", "topk", "fastv"]
    assert rows[1]["accuracy"] == 12.5
    for other in (["--positions", "compact"], ["--dtype", "bfloat16"]):
        assert CliRunner().invoke(compare.app, [*command, *other, "--resume"]).exit_code == 2


def test_a_killed_comparison_leaves_no_process_behind(folder: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "ivtp.micro.compare", "--model", str(folder), "--questions", "120"]
    with subprocess.Popen([*command, "--workers", "1"], start_new_session=True, stderr=subprocess.DEVNULL) as main:
        children = Path(f"/proc/{main.pid}/task/{main.pid}/children")
        assert _within(60, lambda: len(children.read_text().split()) >= 2)  # the worker, and multiprocessing's tracker
        time.sleep(1)
        main.send_signal(signal.SIGKILL)
    assert _within(60, lambda: not _alive(main.pid))


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True

"""One result file: what was asked, on which machine, and every configuration that is finished."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from ivtp.benchmark.asked import Asked, Point
from ivtp.benchmark.measure import Measured, Times, stock_name
from ivtp.benchmark.parts import PARTS
from ivtp.benchmark.runs import oracle_of
from ivtp.errors import ConfigError, short_reason
from ivtp.files.machine import processor_name
from ivtp.files.outputs import write_text

Document = dict[str, Any]
Row = dict[str, Any]

_CHANGING = ("commit", "date", "load")
"""What may differ between the two halves of a sweep that was interrupted."""


def new_document(asked: Asked, machine: dict[str, Any], command: str) -> Document:
    """A document without results."""
    return {
        "model": asked.name,
        "command": command,
        "asked": asked.header(),
        "growth": asked.growth,
        "machine": machine,
        "weights": {},
        "notes": [],
        "results": [],
    }


def read_document(file: Path, asked: Asked, machine: dict[str, Any]) -> Document | None:
    """The unfinished document in `file`; None where there is no file.

    Raises `ConfigError` where the file is something else, or was measured with other settings or on another machine.
    """
    if not file.exists():
        return None
    try:
        document: Document = json.loads(file.read_text(encoding="utf-8"))
        old = {**document["asked"], "growth": document["growth"], **_lasting(document["machine"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--resume: {file} holds no result of this benchmark ({short_reason(error)})") from None
    new = {**asked.header(), "growth": asked.growth, **_lasting(machine)}
    differing = [name for name in new if json.loads(json.dumps(new[name])) != old.get(name)]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"--resume: {file} was measured with {name}={old.get(name)!r}, not {new[name]!r}; "
            "ask for the same or name another file"
        )
    # what failed is tried again
    document["results"] = [result for result in document["results"] if "error" not in result]
    return document


def write_document(file: Path, document: Document) -> None:
    """Write all or nothing: an interrupted write leaves the former file."""
    write_text(file, json.dumps(document, indent=1) + "\n", "--output")


def describe_machine(device: str, threads: int | None) -> dict[str, Any]:
    """What the times depend on beside the model."""
    kind = torch.device(device)
    described = {
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if kind.type == "cuda":
        described |= {"cuda": torch.version.cuda, "gpu_bytes": torch.cuda.get_device_properties(kind).total_memory}
    changing = {"commit": _commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "load": _load()}
    return described | changing


def result_of(point: Point, text_tokens: int, measured: Measured) -> Row:
    """What the document keeps of one configuration: a row for each run, with all single times."""
    rows = [_row(name, measured) for name in measured.probes]
    return {**asdict(point), "text_tokens": text_tokens, "rows": rows}


def _row(name: str, measured: Measured) -> Row:
    """Medians over the rounds; ratios and differences are taken within each round first."""
    probe, times, parts = measured.probes[name], measured.times[name], measured.parts[name]
    runs = (name, "full", oracle_of(name, measured.probes))
    prefill, full, oracle = (_prefills(measured.times[run]) for run in runs)
    clock = paired(full, prefill, lambda a, b: a / b)
    promised = measured.probes["full"].flops / probe.flops
    return {
        "run": name,
        "prefill_ms": statistics.median(prefill),
        **{part: statistics.median(p[part] for p in parts) for part in (*PARTS, "attention_ms")},
        "over_oracle": paired(prefill, oracle, lambda a, b: a / b),
        "over_oracle_ms": paired(prefill, oracle, lambda a, b: a - b),
        "full_over_this": clock,
        "full_over_this_flops": promised,
        "clock_over_flops": clock / promised,
        "flops": probe.flops,
        "flops_per_second": 1000 * probe.flops / statistics.median(prefill),
        "peak_bytes": probe.peak_bytes,
        "cache_bytes": probe.cache_bytes,
        "cache_tokens": probe.cache_tokens,
        **_decoding(times, measured.times.get(stock_name(probe))),
        "all": {"times": [asdict(t) for t in times], "parts": parts},
    }


def _decoding(times: list[Times], stock: list[Times] | None) -> Row:
    """`first_token_ms` and milliseconds a token, of this run and of the stock model with a cache of its length."""
    if not times[0].decode:
        return {}
    first = statistics.median(t.first_token for t in times if t.first_token is not None)
    own = [statistics.median(t.decode) for t in times]
    found: Row = {"first_token_ms": first, "decode_ms": statistics.median(own)}
    if stock is not None:
        same = [statistics.median(t.decode) for t in stock]
        found["stock_decode_ms"] = statistics.median(same)
        found["decode_over_stock"] = paired(own, same, lambda a, b: a / b)
        found["all_stock_decode_ms"] = [t.decode for t in stock]
    return found


def paired(these: Iterable[float], those: Iterable[float], relation: Callable[[float, float], float]) -> float:
    """The median of a relation between the two runs of each round: what slows a round down slows both."""
    return statistics.median(relation(a, b) for a, b in zip(these, those, strict=True))


def _prefills(times: list[Times]) -> list[float]:
    return [t.prefill for t in times if t.prefill is not None]


def _lasting(machine: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in machine.items() if name not in _CHANGING}


def _load() -> float | None:
    """Processes that wanted to run in the last minute: other work makes times worthless."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _commit() -> str | None:
    """The commit of this file's repository, with "-dirty" where something is changed; None where there is none."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None

"""The same prefill under `torch.compile`: does the model with a pruner attached compile, and what is it worth."""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import torch
from torch import Tensor

from ivtp.benchmark.measure import Clock, run_prefill
from ivtp.benchmark.runs import Runs, attached
from ivtp.errors import short_reason


def time_compiled(
    model: Any, inputs: dict[str, Tensor], runs: Runs, repeats: int, clock: Clock, backend: str = "inductor"
) -> dict[str, dict[str, Any]]:
    """For every run: `compile_seconds` of the first call, `graphs`, `graph_breaks`, `prefill_ms`, `over_eager`.

    Compiled and eager prefills take turns, `over_eager` is the median of their ratios. The runs are not interleaved:
    Dynamo does not see that hooks come and go, so each run has its graphs to itself. A run that does not compile says
    so in `error`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, pruner in runs.items():
        torch._dynamo.reset()
        try:
            with attached(pruner), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Dynamo explains its graph breaks; they are counted here
                found[name] = _time(model, torch.compile(model, backend=backend), inputs, repeats, clock)
        except Exception as error:  # backends raise what they like, and the other runs can still be measured
            found[name] = {"error": short_reason(error)}
    torch._dynamo.reset()
    return found


def _time(eager: Any, compiled: Any, inputs: dict[str, Tensor], repeats: int, clock: Clock) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    counters.clear()
    began = clock.now()
    run_prefill(compiled, inputs)
    seconds = (clock.now() - began) / 1000
    run_prefill(compiled, inputs)  # what the first call left to the second, such as autotuning
    times: dict[str, list[float]] = {"compiled": [], "eager": []}
    for _ in range(repeats):
        for name, model in (("compiled", compiled), ("eager", eager)):
            began = clock.now()
            run_prefill(model, inputs)
            times[name].append(clock.now() - began)
    return {
        "compile_seconds": seconds,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "prefill_ms": statistics.median(times["compiled"]),
        "over_eager": statistics.median(a / b for a, b in zip(times["compiled"], times["eager"], strict=True)),
        "all_prefill_ms": times,
    }

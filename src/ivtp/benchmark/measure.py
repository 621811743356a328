"""The numbers of one configuration: interleaved runs on the clock, and what each of them allocates and computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ivtp.benchmark.memory import cache_bytes, cache_tokens, peak_of
from ivtp.benchmark.models import Subject
from ivtp.benchmark.parts import time_parts
from ivtp.benchmark.prompts import Prompt, text_ids
from ivtp.benchmark.runs import Runs, attached
from ivtp.cost.flops import flops
from ivtp.cost.prefill import unread_encoder
from ivtp.plan import Plan
from ivtp.plug import Pruner
from ivtp.stock import cache_name

PART_ROUNDS = 3
"""Rounds that time the parts of a prefill, beside those that time it as a whole."""

Value = TypeVar("Value")
Report = Callable[[str], None]
"""Called with what was done when a round is over."""


class Clock:
    """Milliseconds on the wall, read when the device has done everything that it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        """The time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() * 1000


@dataclass(frozen=True)
class Times:
    """Milliseconds of one run in one round."""

    prefill: float | None = None
    """From inputs on the device to the logits of the last position; None for a stock model that only decodes."""
    first_token: float | None = None
    """`generate` of one token: what a user waits, with everything that `generate` does around the prefill."""
    decode: list[float] = field(default_factory=list)
    """Greedy steps behind the prefill, each with the choice of its token."""


@dataclass(frozen=True)
class Probe:
    """What one prefill takes; these do not vary from run to run."""

    peak_bytes: int
    cache_bytes: int
    cache_tokens: int
    flops: float


@dataclass(frozen=True)
class Measured:
    """Everything that was measured in one configuration, by the name of the run."""

    probes: dict[str, Probe]
    times: dict[str, list[Times]]
    parts: dict[str, list[dict[str, float]]]


def rounds_of(repeats: int) -> int:
    """How often `measure` reports."""
    return 2 + (1 + repeats) + PART_ROUNDS


def measure(
    subject: Subject, prompt: Prompt, runs: Runs, *, tokens: int, repeats: int, report: Report, clock: Clock
) -> Measured:
    """Memory and cost of every run, then `repeats` timed rounds, then rounds that time the parts.

    Where tokens are decoded, the stock model with a text prompt of each pruned cache's length decodes in the same
    rounds, as the run that `stock_name` says.
    """
    probes = {name: found[0] for name, found in _probe(subject, prompt, runs, report).items()}
    stock = {} if not tokens else {stock_name(p): p.cache_tokens for name, p in probes.items() if name != "full"}
    rows = prompt.inputs["input_ids"].shape[0]
    texts = {name: text_ids(subject, rows, length, seed=0).to(subject.device) for name, length in stock.items()}

    def timed(name: str) -> Times:
        if name in texts:
            return time_stock(subject.model, texts[name], tokens, clock)
        return time_run(subject.model, prompt.inputs, tokens, clock)

    contestants = {**runs, **dict.fromkeys(texts)}
    times = interleave(contestants, timed, repeats, lambda: report("timed"))
    parts = interleave(
        runs,
        lambda _: time_parts(subject.host, lambda: run_prefill(subject.model, prompt.inputs)),
        PART_ROUNDS,
        lambda: report("parts"),
        warm_up=0,
    )
    return Measured(probes, times, parts)


def stock_name(probe: Probe) -> str:
    """The run of the stock model whose cache is as long as that of `probe`."""
    return f"stock at {probe.cache_tokens}"


def interleave(
    runs: Runs, work: Callable[[str], Value], repeats: int, after: Callable[[], None], *, warm_up: int = 1
) -> dict[str, list[Value]]:
    """`work(name)` for all runs in turn, A B C A B C ..., each with its pruner attached; warm-up rounds are dropped.

    Attaching is outside `work`: it is done once in the life of a model.
    """
    found: dict[str, list[Value]] = {name: [] for name in runs}
    for number in range(warm_up + repeats):
        for name, pruner in runs.items():
            with attached(pruner):
                value = work(name)
            if number >= warm_up:
                found[name].append(value)
        after()
    return found


def run_prefill(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The forward pass that `generate` begins with: logits of the last position, and a cache."""
    with torch.inference_mode():
        return model(**inputs, logits_to_keep=1)


def time_run(model: Any, inputs: dict[str, Tensor], tokens: int, clock: Clock) -> Times:
    """One prefill, `tokens` greedy steps on its cache, and (if there are any) one `generate` to the first token."""
    began = clock.now()
    output = run_prefill(model, inputs)
    prefill = clock.now() - began
    if not tokens:
        return Times(prefill)
    decode = _time_steps(model, output, tokens, clock)
    del output  # its cache would be held while `generate` fills another
    began = clock.now()
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return Times(prefill, clock.now() - began, decode)


def time_stock(model: Any, ids: Tensor, tokens: int, clock: Clock) -> Times:
    """Greedy steps of the untouched model behind a text prompt."""
    return Times(decode=_time_steps(model, run_prefill(model, {"input_ids": ids}), tokens, clock))


@torch.inference_mode()
def _time_steps(model: Any, output: Any, tokens: int, clock: Clock) -> list[float]:
    name = cache_name(model.forward)
    cache, steps = getattr(output, name), []
    token = output.logits[:, -1:].argmax(dim=-1)
    for _ in range(tokens):
        began = clock.now()
        logits = model(input_ids=token, **{name: cache}, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(dim=-1)
        steps.append(clock.now() - began)
    return steps


def _probe(subject: Subject, prompt: Prompt, runs: Runs, report: Report) -> dict[str, list[Probe]]:
    """Bytes and FLOPs; the first round pays for what a process allocates once."""

    def probe(name: str) -> Probe:
        output, peak = peak_of(lambda: run_prefill(subject.model, prompt.inputs), subject.device)
        cache = getattr(output, cache_name(subject.model.forward))
        return Probe(peak, cache_bytes(cache), cache_tokens(cache), flops_of(subject, prompt, runs[name]))

    return interleave(runs, probe, 1, lambda: report("memory"))


def flops_of(subject: Subject, prompt: Prompt, pruner: Pruner | None) -> float:
    """FLOPs of the prefill as it is timed: those that `ivtp.flops` counts, with the head over the last position alone,
    and with the encoder layers whose output nobody reads.

    `pruner` is that of the prefill that ran last; None is the untouched model.
    """
    size, batch = subject.host.size, prompt.inputs["input_ids"].shape[0]
    images = prompt.inputs["pixel_values"].shape[0] // batch
    if pruner is None:
        final = size.num_patches
        counted = flops(size, method="none", text_tokens=prompt.text_tokens, batch=batch, images=images).total
        behind = size.num_patches
    else:
        assert pruner.trace is not None
        assert pruner.trace.tokens_per_layer is not None
        final, counted = pruner.trace.tokens_per_layer.final, pruner.trace.flops
        behind = pruner.trace.tokens_per_layer.vision_mlp[-1]  # a cut behind the encoder leaves them whole
    if pruner is None or not pruner.reads_clip:  # transformers runs these for nothing
        plan = pruner.method.plan if pruner else Plan()
        counted += batch * images * unread_encoder(size, plan, behind)
    positions = images * final + prompt.text_tokens - images
    return counted - 2.0 * batch * (positions - 1) * size.text_hidden * size.vocab_size

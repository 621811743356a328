"""The harness: order, what is timed, and what is left behind. No test asserts a time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ivtp.benchmark.asked import Point
from ivtp.benchmark.compiled import time_compiled
from ivtp.benchmark.measure import (
    PART_ROUNDS,
    Clock,
    Measured,
    Probe,
    Times,
    flops_of,
    interleave,
    measure,
    rounds_of,
    run_prefill,
    time_run,
)
from ivtp.benchmark.memory import peak_of
from ivtp.benchmark.models import Subject, load_subject
from ivtp.benchmark.parts import PARTS, time_parts
from ivtp.benchmark.prompts import make_prompt
from ivtp.benchmark.results import paired, result_of
from ivtp.benchmark.runs import Oracle, Runs, attached, make_runs, oracle_of
from ivtp.config import PruneConfig
from ivtp.registry import method_class

CPU = torch.device("cpu")
POINT = Point(keep=6, text=14, images=1, batch=2)


class Ticks(Clock):
    """A clock that moves by one at each reading, and remembers how often it was read."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._count = itertools.count()

    def now(self) -> float:
        """The number of the reading."""
        return float(next(self._count))


NAMES = ["full", "oracle", "ivtp", "oracle topk", "topk"]


@pytest.fixture
def runs(subject: Subject, ask: Any) -> Runs:
    """full, and ivtp and topk at 6 tokens, each behind its oracle."""
    return make_runs(subject, ask(methods=("ivtp", "topk")), 6)


def clean(subject: Subject) -> bool:
    """Whether none of this library's hooks and stand-ins is left in the model; transformers has hooks of its own."""
    hooks = [h for m in subject.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    ours = [hook for hook in hooks if str(getattr(hook, "func", hook).__module__).startswith("ivtp")]
    return not ours and not {"forward", "generate", "_ivtp_pruner"} & set(subject.model.__dict__)


def test_the_oracle_has_the_counts_and_reads_nothing(subject: Subject) -> None:
    size, config = subject.host.size, PruneConfig.of(keep=6, llm_layers=6)
    plan, oracle = method_class("ivtp")(config, size).plan, Oracle(config, size).plan
    assert oracle.tokens_per_layer(size) == plan.tokens_per_layer(size)
    assert not oracle.guide_layers
    assert all(not cut.taps for cut in oracle.cuts)


def test_methods_that_read_other_options_share_one_table(subject: Subject, ask: Any) -> None:
    runs = make_runs(subject, ask(methods=("topk", "random", "spatial"), options={}), 4)
    assert list(runs) == ["full", "oracle", "topk", "oracle random", "random", "oracle spatial", "spatial"]
    assert clean(subject)


def test_runs_are_interleaved_and_the_warm_up_is_dropped(subject: Subject, runs: Runs) -> None:
    calls: list[tuple[str, bool]] = []
    ended: list[int] = []

    def work(name: str) -> int:
        calls.append((name, "_ivtp_pruner" in subject.model.__dict__))
        return len(calls)

    three = {name: runs[name] for name in ("full", "oracle", "ivtp", "topk")}
    found = interleave(three, work, 2, lambda: ended.append(len(calls)))
    assert calls == [("full", False), ("oracle", True), ("ivtp", True), ("topk", True)] * 3
    assert ended == [4, 8, 12]
    assert found == {"full": [5, 9], "oracle": [6, 10], "ivtp": [7, 11], "topk": [8, 12]}
    assert clean(subject)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_detached_whatever_ends_a_run(
    subject: Subject, runs: Runs, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    prompt = make_prompt(subject, POINT, seed=0)
    monkeypatch.setattr(subject.host.text.layers[3], "forward", fail)
    for work in (run_prefill, lambda model, inputs: time_parts(subject.host, lambda: run_prefill(model, inputs))):
        with pytest.raises(error):
            interleave({"ivtp": runs["ivtp"]}, lambda _: work(subject.model, prompt.inputs), 1, lambda: None)  # noqa: B023
        assert clean(subject)


def test_everything_is_measured(subject: Subject, runs: Runs) -> None:
    prompt = make_prompt(subject, POINT, seed=0)
    told: list[str] = []
    found = measure(subject, prompt, runs, tokens=3, repeats=2, report=told.append, clock=Ticks())
    assert list(found.probes) == list(found.parts) == NAMES
    assert list(found.times) == [*NAMES, "stock at 19"]
    assert {len(times) for times in found.times.values()} == {2}
    assert all(len(t.decode) == 3 for times in found.times.values() for t in times)
    assert all(t.prefill == t.first_token == 1.0 for t in found.times["ivtp"])
    assert found.times["stock at 19"][0].prefill is None
    assert {len(parts) for parts in found.parts.values()} == {PART_ROUNDS}
    assert len(told) == rounds_of(2)
    layer_bytes = 2 * 2 * 2 * 12 * 4  # keys and values, batch, heads, width, float32
    tokens = {name: probe.cache_tokens for name, probe in found.probes.items()}
    assert tokens == {name: 49 if name == "full" else 19 for name in NAMES}
    assert all(probe.cache_bytes == probe.cache_tokens * 8 * layer_bytes for probe in found.probes.values())
    flops = {name: probe.flops for name, probe in found.probes.items()}
    assert flops["oracle"] < flops["ivtp"] < flops["full"]
    assert flops["oracle"] != flops["oracle topk"] < flops["topk"]  # each method has an oracle of its own counts
    assert clean(subject)


def test_decoding_on_the_pruned_cache_is_what_generate_does(subject: Subject, runs: Runs) -> None:
    prompt = make_prompt(subject, POINT, seed=0)
    pruner = runs["ivtp"]
    assert pruner is not None
    seen: list[int] = []
    pruner.install()
    handle = subject.host.text.module.register_forward_hook(lambda m, a, out: seen.append(out.past_key_values))
    time_run(subject.model, prompt.inputs, 4, Ticks())
    handle.remove()
    stepped = seen[0]
    generated = subject.model.generate(
        **prompt.inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    pruner.detach()
    for own, theirs in zip(stepped.layers, generated.past_key_values.layers, strict=True):
        torch.testing.assert_close(own.keys, theirs.keys, atol=1e-5, rtol=1e-4)


def test_the_prefill_alone_has_no_decoding(subject: Subject, runs: Runs) -> None:
    found = measure(
        subject,
        make_prompt(subject, POINT, seed=0),
        runs,
        tokens=0,
        repeats=1,
        report=lambda _: None,
        clock=Ticks(),
    )
    assert list(found.times) == list(runs)
    assert "decode_ms" not in result_of(POINT, 14, found)["rows"][2]


def test_parts_add_up_and_leave_no_hook(subject: Subject) -> None:
    prompt = make_prompt(subject, POINT, seed=0)
    found = time_parts(subject.host, lambda: run_prefill(subject.model, prompt.inputs))
    assert set(found) == {*PARTS, "attention_ms"}
    assert all(value > 0 for value in found.values())
    assert found["attention_ms"] < found["decoder_ms"]
    assert clean(subject)


def test_peak_memory_is_that_of_the_storages_alive() -> None:
    def call() -> torch.Tensor:
        a = torch.empty(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b.view(10, 100).t()  # a view: nothing
        b.add_(1)  # in place: nothing
        d = torch.empty(250)  # 5000
        return c.sum() + d.sum() * 0

    given = torch.ones(10_000)
    _, peak = peak_of(call, CPU)
    assert 8000 <= peak <= 8016
    assert peak_of(lambda: given.t().view(-1), CPU)[1] == 0


@pytest.mark.parametrize("method", ["topk", "random", "evit", "divprune", "prumerge", "prumerge+"])
def test_flops_are_those_of_the_prefill_that_is_timed(subject: Subject, ask: Any, method: str) -> None:
    prompt = make_prompt(subject, POINT, seed=0)
    subject.model.set_attn_implementation("eager")
    pruner = make_runs(subject, ask(methods=(method,), options={}), 6)[method]
    with attached(pruner), FlopCounterMode(display=False) as counter:
        run_prefill(subject.model, prompt.inputs)
    assert flops_of(subject, prompt, pruner) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_method_is_compared_with_its_own_oracle() -> None:
    assert [oracle_of(run, NAMES) for run in NAMES] == ["oracle"] * 3 + ["oracle topk"] * 2


def test_ratios_are_of_the_pairs_of_one_round() -> None:
    assert paired([4.0, 6.0, 9.0], [2.0, 2.0, 3.0], lambda a, b: a / b) == 3.0
    prefills = {"full": [4.0, 6.0, 9.0], "oracle": [2.0, 2.0, 3.0], "ivtp": [3.0, 4.0, 3.0]}
    decode = {
        "full": [1.0, 1.0, 1.0],
        "oracle": [1.0, 1.0, 1.0],
        "ivtp": [2.0, 6.0, 3.0],
        "stock at 8": [1.0, 2.0, 3.0],
    }
    times = {
        name: [Times(prefills.get(name, [None] * 3)[i], 7.0, [value] * 2) for i, value in enumerate(values)]
        for name, values in decode.items()
    }
    flops = {"full": 10.0, "oracle": 4.0, "ivtp": 5.0}
    probes = {name: Probe(100, 50, 20 if name == "full" else 8, flops[name]) for name in flops}
    parts = {name: [dict.fromkeys((*PARTS, "attention_ms"), 1.0)] for name in flops}
    result = result_of(POINT, 14, Measured(probes, times, parts))
    assert (result["keep"], result["text"], result["text_tokens"], result["batch"]) == (6, 14, 14, 2)
    full, _, row = result["rows"]
    assert row["prefill_ms"] == 3.0
    assert row["over_oracle"] == 1.5
    assert row["over_oracle_ms"] == 1.0
    assert row["full_over_this"] == 1.5
    assert row["full_over_this_flops"] == 2.0
    assert row["clock_over_flops"] == 0.75
    assert row["flops_per_second"] == pytest.approx(5.0 / 0.003)
    assert row["decode_ms"] == 3.0
    assert row["stock_decode_ms"] == 2.0
    assert row["decode_over_stock"] == 2.0
    assert row["first_token_ms"] == 7.0
    assert "stock_decode_ms" not in full


def test_an_attached_model_compiles_and_says_how_often_it_breaks(ask: Any) -> None:
    asked = ask(layers=(1, 3), options={}, methods=("topk",))
    subject = load_subject(asked)
    inputs = make_prompt(subject, POINT, seed=0).inputs
    runs = {"topk": make_runs(subject, asked, 6)["topk"]}
    found = time_compiled(subject.model, inputs, runs, 2, Ticks(), backend="eager")["topk"]
    assert "error" not in found, found
    assert found["graphs"] >= 1
    assert found["graph_breaks"] >= 0
    assert len(found["all_prefill_ms"]) == 2
    assert clean(subject)


def test_a_run_that_does_not_compile_says_why(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here\nand many more lines")

    monkeypatch.setattr(torch, "compile", fail)
    assert time_compiled(subject.model, {}, {"full": None}, 1, Ticks()) == {"full": {"error": "no compiler here"}}

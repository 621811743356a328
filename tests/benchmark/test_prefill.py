"""The benchmark's harness; no test asserts a time."""

from __future__ import annotations

import torch

from ivtp.benchmark.prefill import Oracle, compare, make_pruners, measure
from ivtp.config import PruneConfig
from ivtp.guide import GuideMaker
from ivtp.hosts.llava import HOST
from ivtp.plug import Pruner, find_host
from ivtp.registry import method_class


def test_the_oracle_has_the_counts_and_reads_nothing() -> None:
    size = HOST.geometry(HOST.tiny()[0].config)
    config = PruneConfig(keep=6, llm_layers=6)
    plan, oracle = method_class("ivtp")(config, size).plan, Oracle(config, size).plan
    assert oracle.tokens_per_layer(size) == plan.tokens_per_layer(size)
    assert not oracle.guide_layers
    assert all(not cut.taps for cut in oracle.cuts)


def test_every_run_is_timed_and_the_model_is_left_alone() -> None:
    model, _ = HOST.tiny()
    host = find_host(model)
    config = PruneConfig(keep=6, llm_layers=6)
    pruner = Pruner(host, Oracle(config, host.size), GuideMaker(config, host, None, None))
    ids = torch.randint(3, 100, (1, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 4:40] = 127
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 84, 84)}
    before = set(model.__dict__)
    times = measure(model, inputs, {"full": None, "oracle": pruner}, repeats=3)
    assert {name: len(values) for name, values in times.items()} == {"full": 3, "oracle": 3}
    assert pruner.trace is not None
    assert pruner.trace.kept().tolist() == [[0, 1, 2, 3, 4, 5]]
    assert set(model.__dict__) == before


def test_the_table_is_of_paired_medians_and_of_what_was_traced() -> None:
    times = {"full": [4.0, 6.0, 9.0], "oracle": [2.0, 2.0, 3.0], "ivtp": [3.0, 4.0, 3.0]}
    rows = compare(times, {"full": 10.0, "oracle": 4.0, "ivtp": 5.0})
    assert [row["run"] for row in rows] == ["full", "oracle", "ivtp"]
    assert rows[2] == {
        "run": "ivtp",
        "milliseconds": 3.0,
        "over_oracle": 1.5,
        "full_over_this": 1.5,
        "flops": 5.0,
        "all_milliseconds": [3.0, 4.0, 3.0],
    }


def test_methods_that_read_other_options_share_one_table() -> None:
    model, _ = HOST.tiny()
    pruners = make_pruners(model, None, ["topk", "random", "spatial"], keep=4)
    assert list(pruners) == ["full", "oracle", "topk", "random", "spatial"]
    ids = torch.randint(3, 100, (1, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 4:40] = 127
    measure(model, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 84, 84)}, pruners, repeats=1)
    traces = {name: pruner.trace for name, pruner in pruners.items() if pruner}
    assert all(trace.flops > 0 and trace.kept().shape == (1, 4) for trace in traces.values())
    assert traces["oracle"].flops < traces["topk"].flops  # the same counts without the attention row

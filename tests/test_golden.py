"""LLaVA with CLIP keeps, answers and costs what it did when `golden.json` was recorded, whatever moved in the house.

`python tests/test_golden.py` records it anew, for a change that is meant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, samples

import ivtp
from ivtp.errors import ConfigError

FILE = Path(__file__).with_name("golden.json")
BATCHES = ("one", "two images", "mixed")
METHODS = (*ivtp.list_methods(), "tome+ivtp", "topk+sparsevlm")
OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "compact layered": {"positions": "compact", "cache": "layered"}}


def observe(tiny: Tiny, method: str, batch: str, options: dict[str, Any]) -> dict[str, Any]:
    """What one prefill and the answer behind it show."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, batch))
    with torch.no_grad(), tiny.attach(model, method=method, **options) as pruner:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        trace = pruner.trace
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    return {
        "kept": [stage.kept.tolist() for stage in trace.stages][-1],
        "words": [[(w.text, round(w.score, 4), w.used) for w in row] for row in trace.words],
        "tokens": tokens[:, -4:].tolist(),
        "flops": trace.flops,
        "logits": [[round(v, 4) for v in row[:3]] for row in logits.tolist()],
    }


def observe_all(tiny: Tiny) -> dict[str, Any]:
    found = {}
    for method in METHODS:
        for name, options in OPTIONS.items():
            for batch in BATCHES:
                try:
                    found[f"{method} {name} {batch}"] = observe(tiny, method, batch, options)
                except ConfigError as error:
                    found[f"{method} {name} {batch}"] = {"refused": str(error)}
    return found


@pytest.mark.parametrize("case", json.loads(FILE.read_text()) if FILE.exists() else ())
def test_nothing_moved(tiny: Tiny, case: str) -> None:
    golden = json.loads(FILE.read_text())[case]
    method, rest = case.split(" ", 1)
    name = next(n for n in OPTIONS if rest.startswith(n))
    if "refused" in golden:
        with pytest.raises(ConfigError):
            observe(tiny, method, rest.removeprefix(name).strip(), OPTIONS[name])
        return
    found = json.loads(json.dumps(observe(tiny, method, rest.removeprefix(name).strip(), OPTIONS[name])))
    for key in ("kept", "tokens", "flops"):
        assert found[key] == golden[key], key
    assert [[(w[0], w[2]) for w in row] for row in found["words"]] == [
        [(w[0], w[2]) for w in r] for r in golden["words"]
    ]
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(golden["logits"]), atol=1e-3, rtol=1e-3)


if __name__ == "__main__":
    lines = [f"{json.dumps(case)}: {json.dumps(seen)}" for case, seen in observe_all(Tiny()).items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")

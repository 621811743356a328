"""Other options for single calls, without attaching anew."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import Tiny, samples
from torch import Tensor

from ivtp.errors import ConfigError


def kept(model: Any, inputs: dict[str, Tensor], pruner: Any) -> Tensor:
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    found: Tensor = pruner.trace.kept()
    return found


@pytest.mark.parametrize(
    "options", [{"keep": 4}, {"threshold": 1.0}, {"guide": "text"}, {"positions": "compact"}, {"method": "topk"}]
)
def test_a_call_with_other_options_is_as_attached_with_them(tiny: Tiny, options: dict[str, Any]) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "mixed"))
    with tiny.attach(model, **options) as pruner:
        expected = kept(model, inputs, pruner)
    with tiny.attach(model) as pruner:
        before = kept(model, inputs, pruner)
        with pruner.using(**options) as same:
            assert same is pruner
            assert torch.equal(kept(model, inputs, pruner), expected)
            assert pruner.config.method == options.get("method", "ivtp")
        assert torch.equal(kept(model, inputs, pruner), before)


def test_contexts_within_each_other(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model, keep=8) as pruner, pruner.using(keep=6):
        with pruner.using(keep=4):
            assert kept(model, inputs, pruner).shape == (1, 4)
        assert kept(model, inputs, pruner).shape == (1, 6)


def test_a_refused_option_changes_nothing(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model, keep=8) as pruner:
        with pytest.raises(ConfigError, match="exceeds"), pruner.using(keep=999):
            pass
        assert kept(model, inputs, pruner).shape == (1, 8)


def test_options_are_of_the_thread_that_says_them(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    found: dict[int, int] = {}
    together = threading.Barrier(3)
    with tiny.attach(model, keep=8) as pruner:

        def ask(keep: int) -> None:
            with pruner.using(keep=keep):
                together.wait()
                found[keep] = kept(model, inputs, pruner).shape[1]

        threads = [threading.Thread(target=ask, args=(keep,)) for keep in (3, 5, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert kept(model, inputs, pruner).shape == (1, 8)
    assert found == {3: 3, 5: 5, 7: 7}


def test_nothing_is_left_behind(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2)
    before = [dict(vars(m)) for m in model.modules()]
    with tiny.attach(model) as pruner, pruner.using(method="tome"):
        kept(model, inputs, pruner)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert all(value is attributes[name] for name, value in vars(module).items())

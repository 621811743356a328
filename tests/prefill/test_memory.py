"""The model keeps its own attention kernel, and no attention map of all heads is ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Tiny
from torch.utils._python_dispatch import TorchDispatchMode

import ivtp

LONG = "Is the small red dog near the blue house? " * 90


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator gives back, and the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operators: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.operators.add(function.name())
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().size() // tensor.element_size())
        return output


def largest(model: Any, inputs: dict[str, torch.Tensor]) -> LargestTensor:
    record = LargestTensor()
    with torch.no_grad(), record:
        model(**inputs, logits_to_keep=1)
    return record


@pytest.mark.parametrize("method", ["none", *ivtp.list_methods()])
def test_a_prefill_makes_no_map_of_all_heads(tiny: Tiny, method: str) -> None:
    """Nor of one head, but where the stock model makes one itself, as torch 2.6 with a mask does."""
    model, inputs = tiny.model(), tiny.inputs(tiny.sample(LONG))
    length = inputs["input_ids"].shape[1]
    assert length > 900
    stock = record = largest(model, inputs)
    if method != "none":
        with tiny.attach(model, method=method):
            record = largest(model, inputs)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in record.operators
    assert record.elements < length**2 or record.elements <= stock.elements, "less than the map of one head"

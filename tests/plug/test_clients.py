"""Libraries that change a model before or after a pruner comes: accelerate, bitsandbytes, torchao, quanto, torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from tiny import NUM_PATCHES, Tiny, samples
from torch import Tensor

import ivtp


def generate(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def dispatched(model: Any, folder: Path) -> Any:
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device="cpu")


def on_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device="cpu")


def split(model: Any, folder: Path) -> Any:
    """As a model that lies on several devices: hooks on every part."""
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    parts |= {"model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu"}
    parts |= {"model.language_model.rotary_emb": "cpu"}
    parts |= {f"model.language_model.layers.{i}": "cpu" for i in range(len(model.model.language_model.layers))}
    return dispatch_model(model, parts, force_hooks=True)


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # older releases, of any offloaded model
@pytest.mark.parametrize("name", ["one", "batch", "two images"])
@pytest.mark.parametrize("place", [dispatched, offloaded, on_disk, split])
@pytest.mark.parametrize("method", ["ivtp", "tome", "sparsevlm", "pyramiddrop"])
def test_a_model_with_accelerates_hooks_is_pruned_as_without(
    tiny: Tiny, tmp_path: Path, method: str, place: Callable[[Any, Path], Any], name: str
) -> None:
    inputs, model = tiny.inputs(*samples(tiny, name)), tiny.model()
    with tiny.attach(model, method=method) as pruner:
        expected, kept = generate(model, inputs), pruner.trace.kept()
    model = place(tiny.model(), tmp_path)
    stock = generate(model, inputs)
    with tiny.attach(model, method=method) as pruner:
        assert generate(model, inputs) == expected
        assert torch.equal(pruner.trace.kept(), kept)
    assert generate(model, inputs) == stock


def test_hooks_that_come_after_the_pruner(tiny: Tiny) -> None:
    inputs, model = tiny.inputs(*samples(tiny, "batch")), tiny.model()
    with tiny.attach(model):
        expected = generate(model, inputs)
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        assert generate(model, inputs) == expected
        remove_hook_from_module(model, recurse=True)


def bits(kind: str, model: Any) -> Any:
    """The model's linear layers by bitsandbytes, in place."""
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or name == "lm_head":
                continue
            bias = layer.bias is not None
            if kind == "8 bit":
                new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias, compute_dtype=torch.float32)
                new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, blocksize=64)
            if bias:
                new.bias = torch.nn.Parameter(layer.bias.data, requires_grad=False)
            setattr(parent, name, new)
    return model.to("cpu")


def by_torchao(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    return model


def by_quanto(model: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model.model, weights=quanto.qint8)
    quanto.freeze(model.model)
    return model


def dynamic(model: Any) -> Any:
    model.model.language_model = torch.ao.quantization.quantize_dynamic(
        model.model.language_model, {torch.nn.Linear}, dtype=torch.qint8
    )
    return model


QUANTISERS: dict[str, Callable[[Any], Any]] = {
    "bitsandbytes 8 bit": lambda model: bits("8 bit", model),
    "bitsandbytes 4 bit": lambda model: bits("4 bit", model),
    "torchao": by_torchao,
    "quanto": by_quanto,
    "torch dynamic": dynamic,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["one", "batch"])
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_quantised_models(tiny: Tiny, quantiser: str, name: str) -> None:
    """With all tokens kept as the quantised model alone; pruned, detached and as before."""
    inputs, model = tiny.inputs(*samples(tiny, name)), QUANTISERS[quantiser](tiny.model())
    stock = generate(model, inputs)
    # without a pseudo CLS token: torch's dynamic ranges are of all tokens of a batch together
    with tiny.attach(model, method="topk", keep=NUM_PATCHES):
        assert generate(model, inputs) == stock
    for method in ("ivtp", "tome", "sparsevlm", "cdpruner"):
        with tiny.attach(model, method=method) as pruner:
            generate(model, inputs)
            assert pruner.trace.tokens_per_layer.final == 8
    assert generate(model, inputs) == stock


def test_a_tower_whose_first_weights_are_integers(tiny: Tiny, tmp_path: Path) -> None:
    """The CLIP side that is loaded from a folder comes in the type that the tower computes in."""
    model = tiny.model()
    tiny.clip[0].save_pretrained(tmp_path)
    tiny.clip[1].save_pretrained(tmp_path)
    first = next(iter(model.model.vision_tower.modules()))
    first.register_parameter("packed", torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    with ivtp.attach(model, tiny.processor, tiny.config(), clip=str(tmp_path)) as pruner:
        generate(model, tiny.inputs(*samples(tiny, "one")))
    assert pruner.trace.words[0]

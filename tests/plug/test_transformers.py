"""The private names of transformers and accelerate that the plug leans on, as the installed releases have them.

Each test is named after what breaks without the name.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from tiny import Tiny, samples
from torch import nn
from transformers import modeling_utils
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava

from ivtp.plug import transformers as leaned
from ivtp.towers.base import CACHE_NAMES, cache_name


def test_without_accelerates_old_forward_a_stand_in_is_never_called() -> None:
    layer = nn.Linear(2, 2)
    assert leaned.forward_slot(layer) == "forward"
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    assert leaned.forward_slot(layer) == "_old_forward"
    layer.__dict__["_old_forward"] = lambda x: x + 1
    assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))


def test_without_accelerates_hooks_an_offloaded_model_seems_to_lie_nowhere() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map={"weight": 0, "bias": 0})
    assert leaned.execution_device(layer) == torch.device("cpu")
    layer.to("meta")
    assert leaned.execution_device(layer) == torch.device("meta")
    for wrapped in (hook, SequentialHook(hook)):
        layer[0]._hf_hook = wrapped
        assert leaned.execution_device(layer) == torch.device("cpu")
    remove_hook_from_module(layer, recurse=False)


def test_without_the_caches_name_nothing_is_shortened(tiny: Tiny) -> None:
    model: Any = tiny.model()
    for forward in (model.forward, model.model.forward, model.model.language_model.layers[0].forward):
        assert cache_name(forward) in CACHE_NAMES
    output = model(**tiny.inputs(*samples(tiny, "one")), use_cache=True)
    assert isinstance(getattr(output, cache_name(model.forward)), DynamicCache)


def test_without_this_answer_generate_encodes_images_before_the_prefill(tiny: Tiny) -> None:
    """Where transformers asks `_supports_mm_encoder_outputs` at all, False must make it hand over pixel values."""
    model: Any = tiny.model()
    takes = "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters
    assert leaned.encodes_ahead(model) == takes
    with tiny.attach(model) as pruner:
        model.generate(**tiny.inputs(*samples(tiny, "one")), max_new_tokens=2)
    assert pruner.trace is not None


def test_without_this_name_images_are_encoded_once_for_every_beam(tiny: Tiny) -> None:
    assert callable(GenerationMixin._expand_inputs_for_generation)
    model, inputs, seen = tiny.model(), tiny.inputs(*samples(tiny, "one")), []
    with tiny.attach(model):
        model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
        )
        model.generate(**inputs, max_new_tokens=2, num_beams=3)
    assert seen == [1]


def test_without_the_layer_class_old_releases_recompute_a_cut_wrongly(tiny: Tiny) -> None:
    layer: Any = tiny.model().model.language_model.layers[0]
    assert isinstance(layer, GradientCheckpointingLayer)
    assert not leaned.reruns_hooks(layer)
    layer.train()
    layer.gradient_checkpointing = True
    assert leaned.reruns_hooks(layer) == ("__call__" in vars(GradientCheckpointingLayer))


def test_without_a_place_for_them_an_output_loses_its_image_features(tiny: Tiny) -> None:
    model: Any = tiny.model()
    with torch.no_grad(), tiny.attach(model):
        output = model(**tiny.inputs(*samples(tiny, "one")))
    assert output.image_hidden_states.shape[-1] == model.config.text_config.hidden_size


def test_without_the_kernels_table_and_eager_function_a_probe_changes_the_kernel(tiny: Tiny) -> None:
    for module in (modeling_clip, modeling_llama):
        assert callable(module.eager_attention_forward)
    model: Any = tiny.model("eager")
    attention = model.model.language_model.layers[0].self_attn
    assert attention.config._attn_implementation == "eager"
    assert "sdpa" in modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert copy.copy(attention.config)._attn_implementation == "eager"


def test_without_these_methods_a_shortened_cache_layer_is_not_built() -> None:
    layer = DynamicLayer()
    layer.lazy_initialization(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    assert layer.is_initialized
    for name in ("get_seq_length", "get_mask_sizes", "update", "crop", "reset", "reorder_cache"):
        assert callable(getattr(layer, name))
    assert DynamicCache().layers == []


def test_without_a_projector_and_tower_at_these_names_no_part_is_found(tiny: Tiny) -> None:
    inner: Any = tiny.model().model
    assert isinstance(inner, modeling_llava.LlavaModel)
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= dict(inner.named_children()).keys()


def test_weights_that_are_integers_are_passed_over() -> None:
    module = nn.Module()
    module.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    module.norm = nn.LayerNorm(2, dtype=torch.bfloat16)
    assert leaned.floating_dtype(module) == torch.bfloat16

"""The private names of transformers and accelerate that we lean on, as the installed releases have them.

Each test is named after what breaks without the name.
"""

from __future__ import annotations

import ast
import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from tiny import Tiny, samples
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llava import modeling_llava

import ivtp
from ivtp import stock
from ivtp.registry import host_class


def test_without_accelerates_old_forward_a_stand_in_is_never_called() -> None:
    layer = nn.Linear(2, 2)
    assert stock.forward_slot(layer) == "forward"
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    assert stock.forward_slot(layer) == "_old_forward"
    layer.__dict__["_old_forward"] = lambda x: x + 1
    assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))


def test_without_accelerates_hooks_an_offloaded_model_seems_to_lie_nowhere() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map={"weight": 0, "bias": 0})
    assert stock.execution_device(layer) == torch.device("cpu")
    layer.to("meta")
    assert stock.execution_device(layer) == torch.device("meta")
    for wrapped in (hook, SequentialHook(hook)):
        layer[0]._hf_hook = wrapped
        assert stock.execution_device(layer) == torch.device("cpu")
    remove_hook_from_module(layer, recurse=False)


def test_without_the_caches_name_nothing_is_shortened(tiny: Tiny) -> None:
    model: Any = tiny.model()
    for forward in (model.forward, model.model.forward, model.model.language_model.layers[0].forward):
        assert stock.cache_name(forward) in stock.CACHE_NAMES
    output = model(**tiny.inputs(*samples(tiny, "one")), use_cache=True)
    assert isinstance(getattr(output, stock.cache_name(model.forward)), DynamicCache)


def test_without_this_answer_generate_encodes_images_before_the_prefill(tiny: Tiny) -> None:
    """Where transformers asks `_supports_mm_encoder_outputs` at all, False must make it hand over pixel values."""
    model: Any = tiny.model()
    takes = "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters
    assert stock.encodes_ahead(model) == takes
    with tiny.attach(model) as pruner:
        model.generate(**tiny.inputs(*samples(tiny, "one")), max_new_tokens=2)
    assert pruner.trace is not None


def test_without_this_name_images_are_encoded_once_for_every_beam(tiny: Tiny) -> None:
    model, inputs, seen = tiny.model(), tiny.inputs(*samples(tiny, "one")), []
    assert callable(getattr(model, stock.EXPAND))
    with tiny.attach(model):
        model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
        )
        model.generate(**inputs, max_new_tokens=2, num_beams=3)
    assert seen == [1]


def test_without_the_layer_class_old_releases_recompute_a_cut_wrongly(tiny: Tiny) -> None:
    layer: Any = tiny.model().model.language_model.layers[0]
    assert isinstance(layer, GradientCheckpointingLayer)
    assert not stock.reruns_hooks(layer)
    assert not stock.is_checkpointed(layer)
    layer.train()
    layer.gradient_checkpointing = True
    assert stock.is_checkpointed(layer)
    assert stock.reruns_hooks(layer) == ("__call__" in vars(GradientCheckpointingLayer))


def test_without_a_place_for_them_an_output_loses_its_image_features(tiny: Tiny) -> None:
    model: Any = tiny.model()
    with torch.no_grad(), tiny.attach(model):
        output = model(**tiny.inputs(*samples(tiny, "one")))
    assert output.image_hidden_states.shape[-1] == model.config.text_config.hidden_size


def test_without_the_kernels_name_and_table_a_probe_changes_the_kernel(tiny: Tiny) -> None:
    """Two kernels of one layer are two functions of one result, and a copied config can ask for another one."""
    model: Any = tiny.model("eager")
    hidden = torch.randn(1, 4, 3, 8, generator=torch.Generator().manual_seed(0))  # (B, H, T, d)
    everything = torch.zeros(1, 1, 3, 3)
    for layers in (model.model.language_model.layers, model.model.vision_tower.encoder.layers):
        attention, config = layers[0].self_attn, copy.copy(layers[0].self_attn.config)
        stock.set_kernel(config, "sdpa")
        assert (stock.kernel_name(attention.config), stock.kernel_name(config)) == ("eager", "sdpa")
        shared = hidden[:, : 4 // getattr(attention, "num_key_value_groups", 1)]
        eager, fused = (
            stock.kernel(attention, asked)(attention, hidden, shared, shared, everything, scaling=1.0)[0]
            for asked in (attention.config, config)
        )
        torch.testing.assert_close(eager, fused)


def test_without_this_name_every_draft_is_taken_for_a_new_turn(tiny: Tiny) -> None:
    model, draft, seen = tiny.model(), tiny.model(), []
    generate = draft.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["generation_config"])
        return generate(*args, **kwargs)

    draft.generate = watched
    model.generate(**tiny.inputs(*samples(tiny, "one")), assistant_model=draft, max_new_tokens=4, do_sample=False)
    assert seen
    assert all(map(stock.is_drafting, seen))
    assert not stock.is_drafting(model.generation_config)


@pytest.mark.parametrize("behind", [0, 2])
def test_without_transformers_own_mask_cut_layers_have_none(tiny: Tiny, behind: int) -> None:
    """Rows see what is before them and no padding; where a function hides more, they see less."""
    model: Any = tiny.model("eager")
    config, hidden = model.model.language_model.config, torch.zeros(1, 3, 4)
    cache = DynamicCache()
    if behind:
        states = torch.zeros(1, 2, behind, 4)
        for number in range(config.num_hidden_layers):
            cache.update(states, states, number)
    valid = torch.ones(1, behind + 3, dtype=torch.long)
    valid[0, 0] = 0

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key != behind + 1

    causal = torch.ones(3, behind + 3, dtype=torch.bool).tril(behind) & valid.bool()
    hides = causal.clone()
    hides[:, behind + 1] = False
    for hide, expected in ((None, causal), (visible, hides)):
        mask = stock.decoder_mask(config, hidden, valid, hide, cache)
        assert torch.equal(mask[0, 0] == 0, expected)


def test_without_these_methods_a_shortened_cache_layer_is_not_built() -> None:
    layer = DynamicLayer()
    for name in ("get_seq_length", "get_mask_sizes", "update", "crop", "reset", "reorder_cache"):
        assert callable(getattr(layer, name))
    assert DynamicCache().layers == []


def test_without_keys_and_values_a_cache_layer_cannot_be_shortened() -> None:
    layer, keys, values = DynamicLayer(), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    assert not stock.is_filled(layer)
    stock.fill(layer, keys, values)
    assert stock.is_filled(layer)
    assert layer.get_seq_length() == 3
    stock.fill(layer, keys[..., :2, :], values[..., :2, :])
    assert layer.get_seq_length() == 2
    more = torch.randn(1, 2, 1, 4)
    layer.update(more, more)
    assert torch.equal(stock.contents(layer)[0], torch.cat([keys[..., :2, :], more], dim=2))
    assert torch.equal(stock.contents(layer)[1], torch.cat([values[..., :2, :], more], dim=2))


def test_without_this_name_an_offloaded_cache_is_taken_for_one_that_can_be_shortened(tiny: Tiny) -> None:
    assert not stock.is_offloading(DynamicCache())
    if not torch.cuda.is_available() and torch.version.cuda:
        pytest.skip("a CUDA build of torch makes no stream without a GPU")
    assert stock.is_offloading(DynamicCache(config=tiny.model().config.text_config, offloading=True))


def test_without_transformers_choice_of_a_tiling_images_have_other_tiles_than_the_processors() -> None:
    """The one that shows most of an image, and of equals the one that wastes least."""
    resolutions = ((32, 64), (64, 32), (64, 64))
    assert stock.best_tiling((20, 60), resolutions) == (32, 64)
    assert stock.best_tiling((60, 20), resolutions) == (64, 32)
    assert stock.best_tiling((64, 64), resolutions) == (64, 64)


def test_without_transformers_choice_of_a_canvas_images_have_other_tiles_than_the_processors() -> None:
    """The one whose shape is nearest to an image's, as (columns, rows); a large image has the most of equals."""
    assert stock.best_canvas((20, 60), (32, 32), 4) == (3, 1)
    assert stock.best_canvas((60, 20), (32, 32), 4) == (1, 3)
    assert stock.best_canvas((30, 30), (32, 32), 4) == (1, 1)
    assert stock.best_canvas((64, 64), (32, 32), 4) == (2, 2)


def test_without_transformers_scaling_images_are_split_in_other_tiles_than_by_the_processors() -> None:
    """As (rows, columns); what fits in one tile is not split."""
    assert stock.split_grid((20, 60), 32, 128) == (2, 4)
    assert stock.split_grid((60, 20), 32, 128) == (4, 2)
    assert stock.split_grid((30, 30), 32, 128) == (4, 4)
    assert stock.split_grid((2, 300), 32, 128) == (1, 4)
    assert stock.split_grid((30, 30), 32, 32) == (0, 0)


def test_without_a_projector_and_tower_at_these_names_no_part_is_found(tiny: Tiny) -> None:
    inner: Any = tiny.model().model
    assert isinstance(inner, modeling_llava.LlavaModel)
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= dict(inner.named_children()).keys()


def test_without_the_index_of_grids_tokens_stand_elsewhere_than_in_the_stock_model() -> None:
    """Their positions in a left-padded batch, and how much later ones differ from their columns."""
    family = host_class("qwen2_vl")
    model, processor = family.tiny()
    inputs = family.tiny_inputs(model, processor, [("Is it a dog?", [(50, 40), (20, 60)]), ("How many?", [])])
    given: list[Any] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    expected, differences = given[0]["position_ids"], model.model.rope_deltas
    model.model.rope_deltas = None
    found = stock.grid_positions(
        model.model,
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["image_grid_thw"],
        model.config.image_token_id,
    )
    assert found.equal(expected)
    assert model.model.rope_deltas.equal(differences)
    counted = inputs["attention_mask"].sum(dim=1, keepdim=True)
    later = stock.later_positions(model.model, counted)
    assert later.tolist() == [[[int(found[:, row].max()) + 1] for row in range(2)]]
    assert stock.later_positions(model.model, counted.repeat_interleave(2, dim=0))[0, ::2].equal(later[0])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_without_places_and_windows_patches_are_turned_otherwise_than_in_the_stock_encoder(name: str) -> None:
    family = host_class(name)
    model, processor = family.tiny()
    inputs = family.tiny_inputs(model, processor, [("Is it a dog?", [(50, 40)])])
    tower, layers = model.model.visual, []
    tower.blocks[0].register_forward_pre_hook(lambda module, args, kwargs: layers.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    turns = tower.rotary_pos_emb(torch.zeros(1), stock.patch_places(rows, columns, 2))
    ends = torch.tensor([0, rows * columns])
    if name == "qwen2_5_vl":
        order, ends = stock.patch_windows(rows, columns, tower.config)
        turns = [turn.view(len(order), 4, -1)[order].flatten(0, 1) for turn in turns]
    assert layers[0]["cu_seqlens"].tolist() == ends.tolist()
    assert all(mine.equal(theirs) for mine, theirs in zip(turns, layers[0]["position_embeddings"], strict=True))


def test_without_the_weights_of_learned_places_patches_lie_elsewhere_than_in_the_stock_encoder() -> None:
    family = host_class("qwen3_vl")
    model, processor = family.tiny()
    inputs = family.tiny_inputs(model, processor, [("Is it a dog?", [(50, 40)])])
    tower, entered = model.model.visual, []
    tower.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        places, weights = stock.patch_embeddings(rows, columns, tower)
        own = (tower.pos_embed(places) * weights.unsqueeze(-1)).sum(dim=1)
        assert torch.equal(tower.patch_embed(inputs["pixel_values"]) + own, entered[0])


def test_weights_that_are_integers_are_passed_over() -> None:
    module = nn.Module()
    module.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    module.norm = nn.LayerNorm(2, dtype=torch.bfloat16)
    assert stock.floating_dtype(module) == torch.bfloat16


OTHERS = {
    "torch": ("_dynamo", "_python_dispatch", "_pytree", "_cdata", "_parameters"),
    "torch, of the processor": ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    "the operating system": ("_exit",),
}
"""Private names of others than transformers and accelerate."""


def test_no_other_file_leans_on_a_private_name() -> None:
    sources = {file: ast.parse(file.read_text(encoding="utf-8")) for file in Path(ivtp.__file__).parent.rglob("*.py")}
    ours = {name for tree in sources.values() for node in ast.walk(tree) for name in _made(node)}
    known = ours.union(*OTHERS.values())
    for file, tree in sources.items():
        used = {name for node in ast.walk(tree) for name in _asked(node) if name.startswith("_") and name[1:2] != "_"}
        assert not used - known or file.parent == Path(stock.__file__).parent, f"{file}: {used - known}"


def _made(node: ast.AST) -> tuple[str, ...]:
    """Names that a node defines: functions, classes, attributes of `self`."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return (node.name,)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        return (node.attr,)
    return ()


def _asked(node: ast.AST) -> tuple[str, ...]:
    """Names that a node reads or sets of any object."""
    if isinstance(node, ast.Attribute):
        return (node.attr,)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        return tuple(str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant))
    return ()

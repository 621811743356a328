"""The attached model trains: gradients through kept tokens, checkpointing, mixed precision, loaded checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from reference import Prompt, Reference, prompt_of
from tiny import NUM_PATCHES, Tiny, generated, samples
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

from ivtp.errors import AttachError

# peft still asks transformers for the old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

ANSWER = [17, 200, 300, 41]


def example(tiny: Tiny, name: str = "one", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Prompt and answer; only the answer has labels."""
    inputs = tiny.inputs(*samples(tiny, name), dtype=dtype)
    answer = torch.tensor([ANSWER] * len(inputs["input_ids"]))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    inputs["labels"][:, -len(ANSWER) :] = answer
    return inputs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_training_prunes_as_inference_does(tiny: Tiny) -> None:
    """The pseudo CLS token stands behind the prompt: the answer neither moves it nor is seen by it."""
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model) as pruner:
        model(**tiny.inputs(*samples(tiny, "batch")))
        inference = pruner.trace.stages
        model.train()
        model(**example(tiny, "batch"))
    for mine, theirs in zip(pruner.trace.stages, inference, strict=True):
        assert mine.kept.tolist() == theirs.kept.tolist()
        torch.testing.assert_close(mine.scores, theirs.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"guide": "visual"}, {"stages": "vision"}, {"positions": "compact"}], ids=str)
def test_gradients_equal_the_reference(tiny: Tiny, options: dict[str, Any]) -> None:
    """Through the kept tokens, and through nothing else."""
    sample, inputs = samples(tiny, "one")[0], example(tiny)
    model = tiny.model().train()
    with tiny.attach(model, **options) as pruner:
        loss = model(**inputs).loss
        loss.backward()
    base = prompt_of(tiny.processor, sample.prompt, sample.question, sample.images, NUM_PATCHES)
    prompt = Prompt(inputs["input_ids"][0], base.pixels, base.text, base.instruction, answer=len(base.ids))
    reference = Reference(tiny.model(), tiny.clip, tiny.config(**options), trainable=True)
    result = reference.run(prompt)
    expected = cross_entropy(result.logits[-1 - len(ANSWER) : -1], torch.tensor(ANSWER))
    expected.backward()
    assert pruner.trace.kept()[0].tolist() == result.cuts[-1].kept
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    exact, found = gradients(reference.model), gradients(model)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient.double(), exact[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["one", "batch", "mixed"])
def test_gradients_reach_projector_and_decoder(tiny: Tiny, name: str) -> None:
    """Only the patches that stage 1 kept enter the projector (and the CLS token of the guide, without a gradient)."""
    model = tiny.model().train()
    model.model.vision_tower.requires_grad_(False)
    with tiny.attach(model) as pruner:
        loss = model(**example(tiny, name)).loss
        loss.backward()
    found = gradients(model)
    assert loss.requires_grad
    assert all(g.isfinite().all() for g in found.values())
    for part in ("multi_modal_projector.linear_1", "layers.0.self_attn.v_proj", "layers.7.mlp", "lm_head"):
        assert any(part in key and g.abs().sum() > 0 for key, g in found.items()), part
    assert not any("vision_tower" in key for key in found)
    assert pruner.trace.kept().shape[1] < NUM_PATCHES


RERUNS_HOOKS = Version(transformers.__version__) < Version("5.23")


@pytest.mark.skipif(not RERUNS_HOOKS, reason="transformers from 5.23 on recompute a layer without its hooks")
def test_gradient_checkpointing_that_cannot_be_served_is_refused(tiny: Tiny) -> None:
    model = tiny.model().train()
    model.gradient_checkpointing_enable()
    with tiny.attach(model), pytest.raises(AttachError, match=r"transformers 5\.23"):
        model(**example(tiny, "one"), use_cache=False)


@pytest.mark.skipif(RERUNS_HOOKS, reason="before transformers 5.23 a layer is recomputed with its hooks")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["one", "mixed"])
@pytest.mark.parametrize("method", ["ivtp", "ivtp+", "topk", "random"])
def test_gradient_checkpointing(tiny: Tiny, reentrant: bool, name: str, method: str) -> None:
    """Recomputed layers cut exactly as they did the first time."""
    plain, saving = tiny.model().train(), tiny.model().train()
    # Renamed in transformers 5.2x; older versions know the second name only.
    enable = getattr(saving, "activation_checkpointing_enable", None) or saving.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    inputs, losses = example(tiny, name), []
    for model in (plain, saving):
        with tiny.attach(model, method=method):
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
    saving.disable_input_require_grads()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    same(gradients(plain), gradients(saving))


def test_train_mode_prunes_the_same(tiny: Tiny) -> None:
    model, inputs = tiny.model(), example(tiny)
    with tiny.attach(model) as pruner:
        quiet = model(**inputs).loss
        kept = pruner.trace.kept().tolist()
        model.train()
        assert model(**inputs).loss.item() == pytest.approx(quiet.item(), abs=1e-5)
        assert pruner.trace.kept().tolist() == kept


def test_a_few_steps_lower_the_loss(tiny: Tiny) -> None:
    model, inputs = tiny.model().train(), example(tiny, "batch")
    model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    with tiny.attach(model):
        for _ in range(6):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_half_precision_training(tiny: Tiny) -> None:
    model = tiny.model(dtype=torch.bfloat16).train()
    with tiny.attach(model):
        loss = model(**example(tiny, "mixed", dtype=torch.bfloat16)).loss
        loss.backward()
    assert all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in gradients(model).values())


def test_autocast(tiny: Tiny) -> None:
    """Mixed precision as trainers do it: float32 weights, bfloat16 products."""
    model = tiny.model().train()
    with tiny.attach(model) as pruner, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**example(tiny, "mixed")).loss
    loss.backward()
    assert loss.isfinite()
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(model).values())
    assert pruner.trace.kept().shape == (4, 16)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}, {"low_cpu_mem_usage": True}])
def test_loaded_models(tiny: Tiny, tmp_path: Path, options: dict[str, Any]) -> None:
    """However the checkpoint was loaded, it is pruned as it would be otherwise, and is stock again afterwards."""
    tiny.model().save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, **options).eval()
    dtype = options.get("dtype", torch.float32)
    inputs = tiny.inputs(*samples(tiny, "mixed"), dtype=dtype)
    expected = tiny.model(dtype=dtype)
    for own, loaded in zip(expected.buffers(), model.buffers(), strict=True):
        own.data = loaded.data.clone()  # loading leaves the rotary frequencies in float32
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with tiny.attach(model) as pruner, tiny.attach(expected) as other:
        ours = generated(model.generate(**inputs, max_new_tokens=4, do_sample=False), inputs)
        wanted = generated(expected.generate(**inputs, max_new_tokens=4, do_sample=False), inputs)
        assert ours.tolist() == wanted.tolist()
        assert pruner.trace.kept().tolist() == other.trace.kept().tolist()
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() == stock.tolist()

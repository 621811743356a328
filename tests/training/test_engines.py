"""Engines that share a model out find an attached one as they left it: the same loss and gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import Tiny
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ivtp
from ivtp.errors import ConfigError
from ivtp.plug import find_host
from ivtp.training.encode import Conversations, Encoder
from ivtp.training.engines import ENGINES, engine_arguments
from ivtp.training.run import CHECKPOINTING, Asked
from ivtp.training.stages import FINETUNE, parts_of, set_trainable

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One rank on gloo."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def learned(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return loss.item(), found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["ivtp", "ivtp+", "tome", "cdpruner", "fastv"])
def test_a_model_that_fsdp_shares_out_learns_the_same(
    tiny: Tiny, mix: Any, mesh: Any, method: str, checkpointing: bool
) -> None:
    """As `fully_shard` is put on by accelerate: layer by layer, then the whole."""
    results = []
    for sharded in (False, True):
        model = tiny.model().train()
        host = find_host(model)
        set_trainable(model, parts_of(host), FINETUNE.learns)
        batch = Encoder(tiny.processor, host.media, plain=False, max_length=512)(
            [Conversations(mix.records())[place] for place in (0, 1, 2)]
        )
        if checkpointing:
            getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
        with ivtp.attach(model, tiny.processor, method=method, keep=8, clip=tiny.clip):
            if sharded:
                for layer in (*host.vision.layers, *host.text.layers):
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            results.append(learned(model, batch))
    (loss, gradients), (shared_loss, shared_gradients) = results
    assert shared_loss == pytest.approx(loss, abs=1e-5)
    assert shared_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_engines_are_named_or_files_of_theirs(tmp_path: Path) -> None:
    assert {"ddp", "fsdp", "zero2", "zero3"} <= set(ENGINES)
    assert engine_arguments("ddp") == {}
    assert engine_arguments("fsdp")["fsdp_config"]["version"] == 2
    assert json.loads(Path(engine_arguments("zero3")["deepspeed"]).read_text())["zero_optimization"]["stage"] == 3
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 1}}')
    assert engine_arguments(str(own)) == {"deepspeed": str(own)}
    with pytest.raises(ConfigError, match="use ddp, fsdp, zero2, zero3"):
        engine_arguments("zero9")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_ranks_of_deepspeed_leave_a_stock_checkpoint(asked: Asked, tmp_path: Path, engine: str) -> None:
    pytest.importorskip("deepspeed", reason="installed by hand: see docs/training.md")
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "ivtp", "train", "finetune"]
    line += ["--data", asked.data, "--images", asked.images, "--model", asked.model, "--out", tmp_path / "run"]
    line += ["--batch", 4, "--max-steps", 2, "--method", "ivtp", "--keep", 8, "--engine", engine]
    run = subprocess.run(
        [sys.executable, *map(str, line)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ours, start = load_file(tmp_path / "run" / "model.safetensors"), load_file(f"{asked.model}/model.safetensors")
    assert ours.keys() == start.keys()
    assert any(not torch.equal(ours[name], start[name]) for name in ours)

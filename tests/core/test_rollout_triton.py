"""The Triton kernel: interpreted on a CPU, compiled for GPUs that need not be there, and run on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_maps import full_map
from torch import Tensor

from ivtp.core.rollout import _fused_column_sum, column_sum_in_blocks, importance, rollout_row, weighted_column_sum
from ivtp.core.tap import AttentionTap

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_interpreted_kernel(marks: str) -> None:
    file = Path(__file__).with_name("interpreted_rollout.py")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-m", marks, str(file)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class AbsentGpu:
    """What Triton asks its driver before it compiles a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # compiled functions are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.mark.parametrize(
    ("dtype", "capability", "masked"),
    [(torch.float16, 80, False), (torch.float16, 90, True), (torch.float32, 80, True), (torch.float32, 90, False)],
)
def test_both_launches_compile(
    dtype: torch.dtype, capability: int, masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter accepts what the compiler refuses, and a GPU is rarely at hand."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.runtime import JITFunction, driver

    from ivtp.core import rollout_triton

    compiled, run = [], JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    name = "_active" if hasattr(driver, "_active") else "active"  # Triton 3.4 made it a property
    monkeypatch.setattr(driver, name, AbsentGpu(capability))
    vectors = torch.zeros(2, 50, 4, 96, dtype=dtype).transpose(1, 2)  # (B, H, T, d)
    mask = torch.ones(2, 50, dtype=torch.bool) if masked else None
    tap = AttentionTap(vectors, vectors[:, ::2], vectors, 0.1, causal=masked, valid=mask, hidden_from_last=mask)
    rollout_triton.weighted_column_sum(tap, torch.ones(2, 50))
    assert len(compiled) == 2
    for kernel in compiled:
        assert ("mma" in kernel.asm["ptx"]) is (dtype == torch.float16)  # tensor cores, but not for float32
        assert kernel.metadata.shared <= 99 * 1024


@pytest.fixture
def layers(request: pytest.FixtureRequest) -> list[AttentionTap]:
    """Three layers of ViT-L's or (causal) a decoder's shape, on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert _fused_column_sum(torch.device("cuda", torch.cuda.current_device())) is not None
    causal, dtype = request.param
    heads, key_heads, length, width = (8, 4, 1000, 128) if causal else (16, 16, 577, 64)
    generator = torch.Generator("cuda").manual_seed(0)

    def vectors(heads: int) -> Tensor:  # (B, heads, T, d)
        drawn = torch.randn(2, length, heads, width, generator=generator, device="cuda") * 1.5
        return drawn.to(dtype).transpose(1, 2)

    valid = torch.arange(length, device="cuda") >= torch.tensor([[0], [70]], device="cuda") if causal else None
    return [
        AttentionTap(vectors(heads), vectors(key_heads), vectors(key_heads), width**-0.5, causal, valid)
        for _ in range(3)
    ]


def kept(taps: list[AttentionTap], count: int) -> Tensor:
    """(B, count): the most important tokens among those that are no padding, in order."""
    length = taps[0].query.shape[2]
    row = rollout_row(taps, -1 if taps[0].causal else 0)
    candidates = torch.ones_like(row, dtype=torch.bool) if taps[0].valid is None else taps[0].valid
    candidates = candidates & (torch.arange(length, device=row.device) > 0)
    return importance(row, taps[-1].value, candidates).topk(count).indices.sort().values.cpu()


def on_cpu(tap: AttentionTap) -> AttentionTap:
    valid = None if tap.valid is None else tap.valid.cpu()
    return AttentionTap(tap.query.cpu(), tap.key.cpu(), tap.value.cpu(), tap.scale, tap.causal, valid)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(16, 16, 64), (32, 32, 128), (28, 4, 128), (3, 1, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gives_what_torch_gives(
    dtype: torch.dtype, heads: tuple[int, int, int], causal: bool, padded: bool
) -> None:
    """Heads of queries and keys, and their width, of ViT-L, Llama, Qwen and of no model."""
    fused = _fused_column_sum(torch.device("cuda", torch.cuda.current_device()))
    assert fused is not None
    query_heads, key_heads, width = heads
    draw, length = torch.Generator("cuda").manual_seed(0), 577

    def vectors(heads: int) -> Tensor:  # (B, heads, T, d)
        return torch.randn(2, length, heads, width, generator=draw, device="cuda").to(dtype).transpose(1, 2)

    valid = torch.arange(length, device="cuda") >= torch.tensor([[0], [70]], device="cuda") if padded else None
    key = vectors(key_heads)
    tap = AttentionTap(vectors(query_heads), key, key, 1.5 * width**-0.5, causal, valid)
    weights = torch.rand(2, length, generator=draw, device="cuda")
    weights = weights if valid is None else weights * valid
    found = fused(tap, weights)
    expected = (weights[:, None].double() @ full_map(tap)).squeeze(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found, column_sum_in_blocks(tap, weights), atol=1e-5, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [(False, torch.float32), (True, torch.float32)], indirect=True)
def test_the_kept_tokens_are_those_of_torch(layers: list[AttentionTap]) -> None:
    assert torch.equal(kept(layers, 64), kept([on_cpu(tap) for tap in layers], 64))


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [(False, torch.bfloat16), (True, torch.float16)], indirect=True)
def test_half_precision_keeps_nearly_the_same_tokens(layers: list[AttentionTap]) -> None:
    for ours, torchs in zip(kept(layers, 64), kept([on_cpu(tap) for tap in layers], 64), strict=True):
        assert torch.isin(ours, torchs).float().mean() >= 0.98


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("layers", [(False, torch.bfloat16), (True, torch.float32)], indirect=True)
def test_two_runs_agree_bit_for_bit_without_waiting_for_the_gpu(layers: list[AttentionTap]) -> None:
    first = rollout_row(layers, -1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = rollout_row(layers, -1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [(False, torch.bfloat16), (True, torch.float32)], indirect=True)
def test_the_memory_stays_below_one_map_of_one_head(layers: list[AttentionTap]) -> None:
    length = layers[0].query.shape[2]
    weights = torch.rand(2, length, device="cuda")
    weighted_column_sum(layers[0], weights)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weighted_column_sum(layers[0], weights)
    assert torch.cuda.max_memory_allocated() - before < 4 * length * length

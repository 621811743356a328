"""The optimiser of every training stage: Muon for the hidden matrices, AdamW for the rest, one schedule for both."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ivtp.files.machine import is_bfloat16_fast

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What to compute matrix products in: bfloat16 where it is faster, else float32."""
    return torch.bfloat16 if is_bfloat16_fast(device) else torch.float32


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in the device's fast type."""
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices by a quintic Newton-Schulz iteration; (n, rows, columns)."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(compute_dtype(matrices.device))
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.transpose(-1, -2)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x if wide else x.transpose(-1, -2)
    return out.to(matrices.dtype)


def orthogonalise_together(matrices: Tensor) -> Tensor:
    """`orthogonalise`, each process of ``torchrun`` doing its share; all of them get everything."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return orthogonalise(matrices)
    processes, share = torch.distributed.get_world_size(), -(-len(matrices) // torch.distributed.get_world_size())
    padded = nn.functional.pad(matrices, (0, 0, 0, 0, 0, share * processes - len(matrices)))
    mine = orthogonalise(padded.split(share)[torch.distributed.get_rank()])  # type: ignore[no-untyped-call]
    parts = [torch.empty_like(mine) for _ in range(processes)]
    torch.distributed.all_gather(parts, mine.contiguous())
    return torch.cat(parts)[: len(matrices)]


class Muon(Optimizer):
    """Momentum whose updates are orthogonalised (Jordan et al., 2024); for matrices only.

    Matrices of one shape are stacked, so that a deep, narrow model needs a few batched products a step.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 2e-3, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; a parameter without a gradient is left alone."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group["lr"], group["momentum"])
        return loss

    def _update(self, parameters: list[Tensor], lr: float, momentum: float) -> None:
        rows, columns = parameters[0].shape
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            gradient = parameter.grad
            assert gradient is not None  # step() passes only parameters with one
            buffer = state.setdefault("momentum", torch.zeros_like(parameter))
            buffer.lerp_(gradient, 1 - momentum)
            updates.append(torch.lerp(gradient, buffer, momentum))
        scale = lr * math.sqrt(max(1.0, rows / columns))
        for parameter, update in zip(parameters, orthogonalise_together(torch.stack(updates)), strict=True):
            parameter.add_(update, alpha=-scale)


class Optimisers:
    """Muon for the hidden matrices, AdamW for embeddings, norms, biases and heads, under one schedule."""

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], *, muon_lr: float, adam_lr: float
    ) -> None:
        self.parameters = matrices + others
        self.all: list[Optimizer] = []
        if matrices:
            self.all.append(Muon(matrices, lr=muon_lr))
        if others:
            self.all.append(AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, eps=1e-10))
        self._rates = [optimiser.param_groups[0]["lr"] for optimiser in self.all]

    def step(self, scale: float) -> None:
        """One update with every rate multiplied by ``scale``; gradients are clipped to norm 1 and cleared."""
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, rate in zip(self.all, self._rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """State of each optimiser, for a checkpoint."""
        return [optimiser.state_dict() for optimiser in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Puts back what ``state_dict`` gave."""
        for optimiser, state in zip(self.all, states, strict=True):
            optimiser.load_state_dict(state)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over the processes of ``torchrun``; with one process it does nothing."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def trapezoid(fraction: float, *, warmup: float = 0.02, cooldown: float = 0.35) -> float:
    """Rate factor at a fraction (0..1) of the run: a short rise, a plateau, then down to zero."""
    if fraction < warmup:
        return max(fraction / warmup, 0.01)
    return max(0.0, min(1.0, (1 - fraction) / cooldown))


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of transformer layers, everything else) among the parameters that are to be trained."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
    return matrices, others

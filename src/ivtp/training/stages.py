"""LLaVA-1.5's two stages as presets: what learns, and with which hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ivtp.hosts.base import Host


@dataclass(frozen=True)
class Stage:
    """Hyper-parameters of a stage, as LLaVA-1.5 (arXiv 2310.03744, Table 9) and its scripts have them.

    All stages: one epoch, AdamW without weight decay, cosine schedule with 3% warm-up, 2048 columns at most.
    """

    name: str
    learning_rate: float
    batch: int
    """Records of one step, on all devices together."""
    per_device: int
    """Records that a device reads at once."""
    learns: frozenset[str]
    """Parts, of `parts_of`; the vision tower never learns."""
    plain: bool = False
    """The image and its caption alone, without a question."""
    lora: tuple[int, int] | None = None
    """Rank and alpha of adapters on the decoder's linear layers, in place of its own weights."""
    projector_lr: float | None = None
    """Where it is not that of the rest."""
    records: int = 0
    """Of the data that it was published with."""


PRETRAIN = Stage("pretrain", 1e-3, 256, 32, frozenset({"projector"}), plain=True, records=558_128)
FINETUNE = Stage("finetune", 2e-5, 128, 16, frozenset({"projector", "language"}), records=665_298)
LORA = Stage(
    "finetune-lora",
    2e-4,
    128,
    16,
    frozenset({"projector", "language"}),
    lora=(128, 256),
    projector_lr=2e-5,
    records=665_298,
)
STAGES = {stage.name: stage for stage in (PRETRAIN, FINETUNE, LORA)}


def parts_of(host: Host) -> dict[str, list[str]]:
    """Names of the model's parameters by part: `tower` (vision), `language` (decoder and head), `projector` (the rest).

    Of whatever family: what lies between the tower and the decoder is what a projector is.
    """
    model: Any = host.model
    homes = {
        "tower": [host.vision.module],
        "projector": list(host.vision.projectors),
        "language": [host.text.module, host.embedding, model.get_output_embeddings()],
    }
    owner = {id(p): part for part, modules in homes.items() for m in modules if m is not None for p in m.parameters()}
    found: dict[str, list[str]] = {"tower": [], "projector": [], "language": []}
    for name, parameter in host.model.named_parameters():
        found[owner.get(id(parameter), "projector")].append(name)
    return found


def set_trainable(model: nn.Module, parts: dict[str, list[str]], learns: frozenset[str]) -> None:
    """Let the parameters of the parts `learns` have gradients, and no others."""
    chosen = {name for part in learns for name in parts[part]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def modules_of(model: nn.Module, names: list[str]) -> list[str]:
    """The outermost modules all of whose parameters are among `names`."""
    wanted = set(names)
    found: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{inner}" if name else inner for inner, _ in module.named_parameters()}
        if own and own <= wanted and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def linear_layers(host: Host) -> list[str]:
    """Names of the decoder's linear layers, without its head."""
    inside = {id(module) for module in host.text.module.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in host.model.named_modules() if id(module) in inside]

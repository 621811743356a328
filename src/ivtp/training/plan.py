"""What a run will cost before it starts: steps, tokens, FLOPs, memory and hours, from sizes and the data alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ivtp.cost.flops import flops
from ivtp.cost.prefill import FlopsReport, count_prompt
from ivtp.cost.sizes import model_config, sizes
from ivtp.errors import LoadError
from ivtp.files.checkpoint import FAILURES
from ivtp.files.sidecar import MICRO, local_folder
from ivtp.plan import Geometry
from ivtp.plug import find_host
from ivtp.registry import compressor_class
from ivtp.training.encode import Encoder
from ivtp.training.records import Record
from ivtp.training.run import Asked, batches
from ivtp.training.stages import Stage, parts_of

SUSTAINED = 125.0
"""TFLOP/s that a device is taken to reach: 40% of an A100's 312 in bfloat16."""
SAMPLE = 200
"""Records, evenly spread over the data, that are counted exactly."""
TOKENS_A_WORD = 4 / 3
"""Where there is no tokenizer at hand."""
ASSUMED_TEXT = {"pretrain": 32, "finetune": 256, "finetune-lora": 256}
"""Text tokens of a record on average, where no data are given."""


@dataclass(frozen=True)
class Counted:
    """One record of the sample."""

    text: int
    """Text tokens, one for each image included."""
    columns: int
    """With a slot for every patch."""
    report: FlopsReport
    """Its forward pass, as it is trained."""
    full: FlopsReport
    """Its forward pass with all tokens."""


@dataclass(frozen=True)
class Estimate:
    """What a run will cost; bytes are those of one device."""

    records: int
    with_images: int
    batch: int
    per_device: int
    devices: int
    steps: int
    text_tokens: float
    columns: float
    """Of a record on average, all image slots included; and of the longest one."""
    longest: int
    equivalent: float
    """Visual tokens of a record that enter a layer of the decoder on average."""
    parameters: dict[str, int]
    learned: int
    """Parameters that learn."""
    record_flops: float
    """Forward and backward pass of one record."""
    full_record_flops: float
    """The same with all tokens."""
    memory: dict[str, float]
    loading: float
    """Bytes of the whole model, which each device holds before an engine shares it out."""
    hours: float
    sustained: float
    notes: tuple[str, ...]

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return self.record_flops * self.steps * self.batch


def estimate(asked: Asked, records: Sequence[Record], *, devices: int, sustained: float = SUSTAINED) -> Estimate:
    """What `asked` will cost on `devices` that reach `sustained` TFLOP/s each; without `records` what its stage's
    published data would, with an assumed length. Raises `LoadError` for a model whose config is not at hand.
    """
    notes: list[str] = []
    known = sizes(asked.model)
    parameters = _parameters(asked.model, known.geometry)
    counted = _count(asked, records, notes)
    mean = _mean([c.text for c in counted])
    stage = asked.stage
    batch, per_device, _ = batches(asked, devices)
    number = len(records) or stage.records
    adapters = _adapters(known.geometry, stage)
    learned = adapters + sum(parameters[part] for part in stage.learns - ({"language"} if stage.lora else set()))
    longest = max(counted, key=lambda c: c.columns)
    steps = asked.max_steps or math.ceil(number / batch)
    each = _mean([_training(c.report, asked) for c in counted])
    full = _mean([_training(c.full, asked) for c in counted])
    seconds = each * steps * batch / (devices * sustained * 1e12)
    memory = _memory(asked, known.geometry, sum(parameters.values()), learned, adapters, longest, per_device, devices)
    return Estimate(
        records=number,
        with_images=sum(bool(r.images) for r in records) if records else number,
        batch=batch,
        per_device=per_device,
        devices=devices,
        steps=steps,
        text_tokens=mean,
        columns=_mean([c.columns for c in counted]),
        longest=longest.columns,
        equivalent=_mean([c.report.equivalent[0] * (c.columns > c.text) for c in counted]),
        parameters=parameters,
        learned=learned,
        record_flops=each,
        full_record_flops=full,
        memory=memory,
        loading=4.0 * learned + (2 if asked.bf16 else 4) * (sum(parameters.values()) + adapters - learned),
        hours=seconds / 3600,
        sustained=sustained,
        notes=tuple(notes),
    )


def _parameters(model: str, geometry: Geometry) -> dict[str, int]:
    """Numbers of parameters by part, with a compressor in the projector's place; no weight is read."""
    compressed = geometry.compressed
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(model_config(model))
        if compressed is not None:
            multimodal: Any = find_host(empty).multimodal
            multimodal.multi_modal_projector = compressor_class(compressed.name)(geometry, compressed.tokens)
    shapes = {name: p.numel() for name, p in empty.named_parameters()}
    return {part: sum(shapes[name] for name in names) for part, names in parts_of(find_host(empty)).items()}


def _adapters(g: Geometry, stage: Stage) -> int:
    """Parameters of LoRA on every linear layer of the decoder."""
    if stage.lora is None:
        return 0
    query, key = g.text_heads * g.text_head_dim, g.text_kv_heads * g.text_head_dim
    sides = 2 * (g.text_hidden + query) + 2 * (g.text_hidden + key) + g.text_mlp_matrices * (g.text_hidden + g.text_mlp)
    return stage.lora[0] * sides * g.text_layers


# ---- tokens and FLOPs -------------------------------------------------------------------------------------------


def _count(asked: Asked, records: Sequence[Record], notes: list[str]) -> list[Counted]:
    if not records:
        text = ASSUMED_TEXT[asked.stage.name]
        notes.append(
            f"without --data: {asked.stage.records} records of {text} text tokens are assumed, each with an image"
        )
        return [_counted(asked, text + 1, 1, None)]
    encoder = _encoder(asked)
    if encoder is None:
        notes.append("no processor of this model is on this machine: tokens are 4/3 of the words")
    sample = records[:: max(1, len(records) // SAMPLE)]
    if len(sample) < len(records):
        notes.append(f"tokens and FLOPs are those of {len(sample)} records, evenly spread")
    found = []
    for record in sample:
        words = sum(len(turn.text.split()) for turn in record.turns)
        text = round(words * TOKENS_A_WORD) + 1 if encoder is None else len(encoder.ids(record)[0])
        found.append(_counted(asked, text, len(record.images), record.images[0] if record.images else None))
    return found


def _counted(asked: Asked, text: int, images: int, file: Path | None) -> Counted:
    known = sizes(asked.model)
    if not images:
        report = count_prompt(known.geometry, None, [], text_tokens=min(text, asked.max_length))
        return Counted(text, min(text, asked.max_length), report, report)
    size = None
    if known.tiled and file is not None:
        with Image.open(file) as image:
            size = image.size
    visual = known.visual(size, images) if size else None
    slots = images * (known.geometry.visual_tokens if visual is None else len(visual.token))
    text = min(text, max(images, asked.max_length - slots + images))
    given: dict[str, Any] = {"text_tokens": text, "images": images, "image_size": size}
    full = flops(asked.model, method="none", **given)
    pruned = full
    if asked.method != "none":
        pruned = flops(asked.model, method=asked.method, keep=asked.keep, **given, **asked.options)
    return Counted(text, text - images + slots, pruned, full)


def _encoder(asked: Asked) -> Encoder | None:
    """What writes and tokenizes; None where the model is a name of sizes alone."""
    folder = local_folder(MICRO if asked.model == "micro" else asked.model)
    try:
        processor = AutoProcessor.from_pretrained(folder or asked.model, local_files_only=True)
        return Encoder(processor, (), plain=asked.stage.plain, max_length=asked.max_length)
    except (*FAILURES, LoadError):
        return None


def _training(report: FlopsReport, asked: Asked) -> float:
    """FLOPs of forward and backward pass.

    The tower runs forward alone. What gradients pass through costs as much again, and what learns a third time;
    recomputed layers of the decoder run forward once more. Adapters, a few percent of their layers, are not counted.
    """
    learns = asked.stage.learns if asked.stage.lora is None else asked.stage.learns - {"language"}
    language = 3.0 if "language" in learns else 2.0
    cost = report.vision + report.pruning + 3.0 * report.projector
    return cost + (language + asked.checkpointing) * report.llm + language * report.head


# ---- memory -----------------------------------------------------------------------------------------------------


def _memory(
    asked: Asked, g: Geometry, total: int, learned: int, adapters: int, longest: Counted, per_device: int, devices: int
) -> dict[str, float]:
    """Bytes on one device, by what they hold; temporary buffers of kernels and fragmentation come on top."""
    frozen = total + adapters - learned
    half = 2 if asked.bf16 else 4
    shared = {"weights": 1, "gradients": 1, "optimizer": 1}
    if asked.engine != "ddp":
        shared = {"weights": 1 if asked.engine == "zero2" else devices, "gradients": devices, "optimizer": devices}
    zero = asked.engine.startswith("zero")
    weights = half * (learned + frozen) if zero else 4 * learned + half * frozen
    optimizer = (12 if zero and asked.bf16 else 8) * learned
    gradients = (half if zero else 4) * learned
    found = {name: size / shared[name] for name, size in zip(shared, (weights, gradients, optimizer), strict=True)}
    if asked.engine == "ddp":
        found["gradient buckets"] = 4.0 * learned if devices > 1 else 0.0
        found["bfloat16 copies"] = 2.0 * learned if asked.bf16 else 0.0
    found["activations"] = per_device * _activations(asked, g, longest, half)
    found["logits"] = per_device * float(longest.text + longest.report.keep) * g.vocab_size * (half + 4 + 4)
    return found


def _activations(asked: Asked, g: Geometry, longest: Counted, half: int) -> float:
    """Of one record: what the backward pass of the decoder reads again."""
    tokens = longest.text + longest.report.equivalent[0] * (longest.columns > longest.text)
    width = g.text_heads * g.text_head_dim
    inner = half * (4 * g.text_hidden + 2 * width + 2 * g.text_kv_heads * g.text_head_dim + 4 * g.text_mlp)
    layer = tokens * (inner + 8 * g.text_hidden)  # two residual sums, in float32
    if not asked.checkpointing:
        return g.text_layers * layer
    return g.text_layers * tokens * 4 * g.text_hidden + 2 * layer  # a layer's input; one layer, and its gradients


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

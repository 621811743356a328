"""One stage of training, from a checkpoint and a data file to a stock checkpoint with an `ivtp.json` beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from ivtp.errors import ConfigError, short_reason
from ivtp.files.sidecar import MICRO, TRAINED, local_folder
from ivtp.generate import load, save_beside
from ivtp.hosts.base import Host
from ivtp.plug import Pruner, attach, compression_of, find_host
from ivtp.plug.compressing import write_compression
from ivtp.training.encode import Conversations, Encoder
from ivtp.training.engines import engine_arguments
from ivtp.training.folder import remember, where_to_go_on
from ivtp.training.records import Record, read_records, refuse
from ivtp.training.sampling import GroupedSampler
from ivtp.training.stages import Stage, linear_layers, modules_of, parts_of, set_trainable


@dataclass(frozen=True)
class Asked:
    """One run of training."""

    stage: Stage
    data: Path
    images: Path | None
    model: str
    out: Path
    method: str = "none"
    keep: int | str = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    clip: str | None = None
    max_steps: int | None = None
    batch: int | None = None
    """Records of a step on all devices together, in place of the stage's."""
    per_device: int | None = None
    max_length: int = 2048
    engine: str = "ddp"
    bf16: bool = False
    checkpointing: bool = True
    seed: int = 42
    report_to: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of transformers' `TrainingArguments`."""
    resume: bool = False
    skip_bad: bool = False


@dataclass(frozen=True)
class Done:
    """What a run has left."""

    steps: int
    loss: float
    """Of the last step that was logged."""
    records: int
    left_out: int
    folder: Path


def train(asked: Asked) -> Done | None:
    """Run it, or go on with it; None on all processes but the first.

    Raises `ConfigError` for bad data or options, before anything is computed; `LoadError`; `OutputError`.
    """
    now = _as_json(asked)
    resumed = where_to_go_on(asked.out, now, resume=asked.resume)
    batches(asked, _processes())
    records, bad = read_records(asked.data, asked.images, needs_image=asked.stage.plain)
    if not asked.skip_bad or not records:
        refuse(bad, asked.data)
    model, processor = load(asked.model, dtype=torch.float32)
    host = find_host(model)
    if host.of_columns:
        raise ConfigError(
            f"batches of this training say no {' and '.join(host.of_columns)}, by which {host.name} tells images from "
            "text; train it with a trainer of your own, which ivtp.attach prunes in"
        )
    if resumed is not None and asked.engine == "ddp" and not asked.stage.lora:
        # transformers' trainer looks for the file's names in the model, finds none where they differ, and says nothing
        model.load_state_dict(load(resumed, dtype=torch.float32)[0].state_dict())
    if asked.engine != "ddp" and compression_of(model) is not None:
        raise ConfigError(
            f"a model with a compressor is trained by --engine ddp alone, not {asked.engine}; leave it out"
        )
    set_seed(asked.seed)  # adapters are drawn before the trainer, which does this too, is made
    model = _prepare(asked, model.to(_device()))
    plain, longest = asked.stage.plain, asked.max_length
    encoder = Encoder(processor, host.media, plain=plain, max_length=longest, process=host.process)
    # attached before the engine knows of anything: DeepSpeed shares out whatever transformers loads afterwards
    with _attached(asked, model, processor) as pruner:
        arguments = training_arguments(asked, mixed=any(not record.images for record in records))
        remember(asked.out, now)  # only now, when nothing that was asked is refused any more
        trainer = StageTrainer(
            model,
            arguments,
            train_dataset=Conversations(records),
            data_collator=encoder,
            processing_class=processor,
        )
        trainer.stage = asked.stage
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        told = _told(asked, pruner, len(records), trainer.state.global_step)
    _save(asked, trainer, told)
    if not trainer.is_world_process_zero():
        return None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Done(trainer.state.global_step, losses[-1] if losses else math.nan, len(records), len(bad), asked.out)


class StageTrainer(Trainer):  # type: ignore[misc]  # transformers' classes are untyped here
    """transformers' `Trainer` with records grouped by modality and length, and a projector with a rate of its own."""

    stage: Stage

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A compressor's weights beside those of the stock model, in checkpoints as in the result."""
        compression = None if self.stage.lora else compression_of(self.model)  # peft keeps it among the adapters
        with compression.aside() if compression else nullcontext():
            super().save_model(output_dir, _internal_call)
        if compression is not None and self.args.should_save:
            write_compression(compression, Path(output_dir or self.args.output_dir), {})

    def _get_train_sampler(self, *_: Any) -> GroupedSampler:
        """Every rank reads records of one modality at the same time."""
        arguments, records = self.args, self.train_dataset.records
        return GroupedSampler(
            [length_of(record) for record in records],
            [bool(record.images) for record in records],
            arguments.train_batch_size * arguments.world_size,
            arguments.seed,
        )

    def _run_epoch(self, **told: Any) -> None:
        """Nothing behind the last step: transformers' asks only after a step whether it was the last."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**told)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; with adapters the projector learns at another rate."""
        if self.stage.projector_lr is None:
            return super().create_optimizer(model)  # type: ignore[no-any-return]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
        adapters = [p for name, p in named if "lora_" in name]
        others = [p for name, p in named if "lora_" not in name]
        groups = [{"params": adapters}, {"params": others, "lr": self.stage.projector_lr}]
        made: torch.optim.Optimizer = kind(groups, **options)
        self.optimizer: Any = made
        return made


def length_of(record: Record) -> int:
    """Words of a conversation: long ones are read together. Images count alike, and are grouped by themselves."""
    return sum(len(turn.text.split()) for turn in record.turns)


def batches(asked: Asked, devices: int) -> tuple[int, int, int]:
    """Records of a step, records that a device reads at once, and how often it does in a step. Raises `ConfigError`."""
    batch = asked.batch or asked.stage.batch
    per_device = asked.per_device or min(asked.stage.per_device, max(1, batch // devices))
    if batch % (per_device * devices):
        raise ConfigError(
            f"a batch of {batch} is no multiple of {per_device} records on each of {devices} device(s); "
            "choose --batch and --per-device so that it is"
        )
    return batch, per_device, batch // (per_device * devices)


def training_arguments(asked: Asked, *, mixed: bool) -> TrainingArguments:
    """The stage's hyper-parameters as transformers' own; `mixed`: some records have no image.

    Raises `ConfigError` for what transformers refuses.
    """
    accelerated = torch.accelerator.is_available()
    _, per_device, accumulation = batches(asked, _processes())
    values: dict[str, Any] = {
        "output_dir": str(asked.out),
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "max_steps": asked.max_steps or -1,
        "learning_rate": asked.stage.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "bf16": asked.bf16,
        CHECKPOINTING: asked.checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_steps": 500,
        "save_total_limit": 1,
        "report_to": list(asked.report_to) or "none",
        "seed": asked.seed,
        "remove_unused_columns": False,
        "dataloader_num_workers": 4 if accelerated else 0,
        "dataloader_pin_memory": accelerated,
        "ddp_find_unused_parameters": mixed,  # the projector, where no rank has an image
        "use_cpu": not accelerated,
        "disable_tqdm": False,
        **engine_arguments(asked.engine),
        **asked.arguments,
    }
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    for name in asked.arguments:
        if name not in known:
            raise ConfigError(f"--set {name}=... is no field of transformers' TrainingArguments; see its documentation")
    try:
        return TrainingArguments(**values)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"transformers refuses these arguments of training ({short_reason(error)})") from None


def _device() -> torch.device:
    """Of this process."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if kind is None else torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def _processes() -> int:
    """As torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {f.name for f in dataclasses.fields(TrainingArguments)}
)
"""What recomputing layers in the backward pass is called: it was renamed in transformers 5.2x."""


def _prepare(asked: Asked, model: nn.Module) -> nn.Module:
    """What learns in float32; what does not in bfloat16 where that is computed in; adapters where they are asked."""
    host = find_host(model)
    parts, stage = parts_of(host), asked.stage
    set_trainable(model, parts, stage.learns - ({"language"} if stage.lora else set()))
    if asked.bf16:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return _with_adapters(host, parts, stage) if stage.lora else model


def _with_adapters(host: Host, parts: dict[str, list[str]], stage: Stage) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("--lora needs peft; install it with: pip install 'ivtp[train]'") from None
    assert stage.lora is not None
    rank, alpha = stage.lora
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.05,
        target_modules=linear_layers(host),
        modules_to_save=modules_of(host.model, parts["projector"]),
    )
    adapted: nn.Module = get_peft_model(host.model, config)
    return adapted


def _attached(asked: Asked, model: nn.Module, processor: Any) -> Any:
    """The pruner, in a context that detaches; None in its place where all tokens stay."""
    if asked.method == "none":
        return nullcontext()
    return attach(model, processor, clip=asked.clip, method=asked.method, keep=asked.keep, **asked.options)


def _told(asked: Asked, pruner: Pruner | None, records: int, steps: int) -> dict[str, Any]:
    """What `ivtp.json` says of the training; method, keep and options are what `attach` then recommends."""
    told: dict[str, Any] = {"stage": asked.stage.name, "method": asked.method}
    if pruner is not None:
        told |= {"keep": pruner.config.keep, "options": {**pruner.config.options}}
    return told | {"records": records, "steps": steps, "batch": asked.batch or asked.stage.batch, "seed": asked.seed}


def _as_json(asked: Asked) -> dict[str, Any]:
    """As it is after a way through JSON."""
    values = vars(asked) | {"stage": asked.stage.name, "processes": _processes()}
    values |= {"options": dict(asked.options), "arguments": dict(asked.arguments)}
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


def _save(asked: Asked, trainer: StageTrainer, told: dict[str, Any]) -> None:
    """The stock checkpoint with processor and what lies beside it; adapters are merged into the model."""
    out, model = asked.out, trainer.model
    if not asked.stage.lora:
        trainer.save_model(str(out))  # the processor, too
    else:
        trainer.save_model(str(out / "adapter"))
        if trainer.is_world_process_zero():
            from peft import PeftModel

            whole, processor = load(asked.model, dtype=torch.float32)
            model = PeftModel.from_pretrained(whole, out / "adapter").merge_and_unload()
            compression = compression_of(model)
            with compression.aside() if compression else nullcontext():
                model.save_pretrained(out)
                processor.save_pretrained(out)
    if trainer.is_world_process_zero():
        (out / "training_args.bin").unlink(missing_ok=True)  # a pickle: no part of a stock checkpoint
        source = local_folder(MICRO if asked.model == "micro" else asked.model)
        save_beside(model, source, out, {TRAINED: told})

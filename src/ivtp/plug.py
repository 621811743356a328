"""Attach a pruning method to a stock transformers model, and take it off again without a trace."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ivtp import registry
from ivtp.config import READS_CLIP, PruneConfig
from ivtp.decode import continue_inputs, is_prefill
from ivtp.errors import AttachError, ConfigError, InputError, UnsupportedModelError
from ivtp.guide import GuideMaker, reads_question
from ivtp.hosts.base import Host
from ivtp.instruction import ClipText, InstructionReader
from ivtp.methods.base import Method, Plan
from ivtp.prefill import Prefill
from ivtp.probe import AttentionProbe
from ivtp.prompt import read_prompts
from ivtp.report import build_trace
from ivtp.standins import Changes, cut_layer, expand_for_beams, forward_slot, forward_with_labels, generate_alone
from ivtp.trace import PruneTrace

_MARK = "_ivtp_pruner"


def attach(
    model: nn.Module,
    processor: Any = None,
    config: PruneConfig | None = None,
    *,
    clip: Any = None,
    **options: Any,
) -> Pruner:
    """Prune the visual tokens of every prompt that `model` reads from now on.

    `processor` lets instruction guides read the prompt's text; without one the guides "text" and "visual" work.
    Either `config`, taken as it is, or its fields and the method's own options as keywords; what the keywords leave
    out follows the checkpoint's recommendation. `clip` is the CLIP text side: `(CLIPModel, tokenizer)`, a folder or a
    hub id; None asks the host.

    Raises `UnsupportedModelError`, `ConfigError`, `LoadError`, or `AttachError` where a pruner is attached already;
    the model is unchanged then.
    """
    host = find_host(model)
    check_unpruned(host)
    if config is None:
        recommended = host.recommended()
        reads = registry.method_class(options.get("method", PruneConfig.method)).reads
        config = PruneConfig.of(**{**{k: v for k, v in recommended.items() if k in reads}, **options})
    elif options:
        raise ConfigError(f"got a PruneConfig and {', '.join(options)} beside it; put everything into one of them")
    method: Method = registry.method_class(config.method)(config, host.size)
    pruner = Pruner(host, method, _guide_maker(host, method, processor, clip))
    pruner.install()
    return pruner


def find_host(model: nn.Module) -> Host:
    """The host of `model`, also when it is wrapped (by PEFT, say). Raises `UnsupportedModelError` with the list."""
    hosts = [registry.host_class(name) for name in registry.list_hosts()]
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for host in hosts:
            if type(module).__name__ == host.model_class and host.matches(module.config):
                found: Host = host(module)
                return found
    names = ", ".join(f"{host.model_class} ({host.name})" for host in hosts)
    hint = "; pass the model itself, ivtp.load(...)[0]" if not isinstance(model, nn.Module) else ""
    raise UnsupportedModelError(f"{type(model).__name__} is not a model that can be pruned; supported: {names}{hint}")


def check_unpruned(host: Host) -> None:
    """Raise `AttachError` where a pruner is attached."""
    if _MARK in host.model.__dict__:
        raise AttachError("a pruner is attached to this model already; call its detach() first")


def _guide_maker(host: Host, method: Method, processor: Any, clip: Any) -> GuideMaker:
    config = method.config
    reader = InstructionReader(processor) if processor is not None and reads_question(method) else None
    guided = method.plan.guide_layers > 0 and config.guide in READS_CLIP
    if not guided and not method.reads_clip:
        return GuideMaker(config, host, reader, None)
    if reader is None:
        asker, ways = f'guide="{config.guide}"', ', or guide="text" or guide="visual"'
        if method.reads_clip:
            asker, ways = f"method {config.method!r}", ""
        raise ConfigError(f"{asker} reads the instruction; pass the processor{ways}")
    source = clip if clip is not None else host.default_clip()
    if source is None:
        raise ConfigError(
            "no CLIP text side is known for this model's vision tower; pass clip=(CLIPModel, tokenizer), a folder or "
            "a hub id" + ("" if method.reads_clip else ', or use guide="text" or guide="visual"')
        )
    tower = host.vision_layers[0]
    dtype = next(tower.parameters()).dtype
    text_side = ClipText.load(source, vision_hidden=host.size.vision_hidden, device=_device_of(tower), dtype=dtype)
    return GuideMaker(config, host, reader, text_side)


def _device_of(module: Any) -> torch.device:
    """Where a module computes; accelerate keeps offloaded weights elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(module.parameters()).device


def _check_devices(host: Host, plan: Plan) -> None:
    """Cuts need the encoder and the cut decoder layers on one device; layers behind them may be anywhere."""
    last = max((cut.layer for cut in plan.cuts if cut.where == "llm"), default=-1)
    devices = {_device_of(m) for m in (host.embedding, *host.vision_layers, *host.text_layers[: last + 1])}
    if len(devices) > 1:
        raise AttachError(
            f"the vision tower and the first {last + 1} decoder layers lie on {sorted(map(str, devices))}; "
            "load the model with a device_map that keeps them together"
        )


def _check_training(host: Host) -> None:
    """Older transformers re-run a layer's hooks when checkpointing recomputes it; those cannot be served."""
    layer: Any = host.text_layers[0]
    checkpointed = next((c for c in type(layer).__mro__ if c.__name__ == "GradientCheckpointingLayer"), object)
    if "__call__" in checkpointed.__dict__ and layer.training and layer.gradient_checkpointing:
        raise AttachError(
            "gradient checkpointing of a pruned model needs a newer transformers (5.23 works); "
            "upgrade it or turn gradient checkpointing off"
        )


class Pruner:
    """A method attached to a model: hooks in at `install`, out at `detach`. A context manager that detaches.

    Calls of the model from several threads run one after the other. A model with a pruner attached is not copied or
    pickled; `save_pretrained` writes the stock checkpoint.
    """

    def __init__(self, host: Host, method: Method, guide_maker: GuideMaker) -> None:
        self.host = host
        self.method = method
        self.guide_maker = guide_maker
        self.labels: Tensor | None = None
        self.prompt_length: int | None = None
        self.repeats = 1
        self.last: Prefill | None = None
        self._running: Prefill | None = None
        self._trace: PruneTrace | None = None
        self._changes = Changes()
        self._step_changes = Changes()
        self._probes = [
            AttentionProbe(host.attention_of(where, tap), functools.partial(self._see, where, tap))
            for where, tap in sorted({(cut.where, tap) for cut in method.plan.cuts for tap in cut.taps})
        ]
        self._lock = threading.RLock()

    @property
    def config(self) -> PruneConfig:
        """What was asked."""
        return self.method.config

    @property
    def trace(self) -> PruneTrace | None:
        """The record of the last prefill, None before it and where it had no image. Reading it waits for the device."""
        if self._trace is None and self.last is not None:
            self._trace = build_trace(self.last)
        return self._trace

    def __enter__(self) -> Pruner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.detach()

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise AttachError("a model with a pruner attached cannot be copied or pickled; call detach() first")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__deepcopy__(None)

    def detach(self) -> None:
        """Take everything out again; does nothing when it is out already."""
        self._step_changes.undo()
        self._changes.undo()

    def install(self) -> None:
        """Put the hooks in. Raises `AttachError` where a pruner is attached; a failure half-way takes them out."""
        check_unpruned(self.host)
        try:
            self._install()
        except BaseException:
            self.detach()
            raise

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """One call of the model at a time; a prefill that fails, or is interrupted, leaves nothing behind."""
        with self._lock:
            try:
                yield
            except BaseException:
                self._end_prefill()
                raise

    # ---- hooks ------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        host, plan, changes = self.host, self.method.plan, self._changes
        model: Any = host.model
        _check_devices(host, plan)
        changes.set(model, _MARK, self)
        changes.set(model, forward_slot(model), forward_with_labels(model, self))
        changes.set(model, "generate", generate_alone(model, self))
        changes.set(model, "_expand_inputs_for_generation", expand_for_beams(model, self))
        names = list(inspect.signature(host.multimodal.forward).parameters)
        enter = functools.partial(self._enter, names)
        changes.add(host.multimodal.register_forward_pre_hook(enter, with_kwargs=True).remove)
        changes.add(host.multimodal.register_forward_hook(self._leave, always_call=True).remove)

    def _install_prefill(self) -> None:
        """What only a prefill needs; decoding then runs the stock layers."""
        host, plan, changes = self.host, self.method.plan, self._step_changes
        feature_layer = host.vision_layers[host.size.vision_layers - 1]
        changes.add(feature_layer.register_forward_hook(self._feature_layer_done).remove)
        for cut in plan.cuts:
            if not cut.is_after_encoder(host.size):
                layer = (host.vision_layers if cut.where == "vision" else host.text_layers)[cut.layer]
                changes.set(layer, forward_slot(layer), cut_layer(host, layer, cut, lambda: self._running))
        for probe in self._probes:
            probe.insert()
            changes.add(probe.remove)
        for text_layer in host.text_layers:
            changes.add(text_layer.register_forward_pre_hook(self._layer_inputs, with_kwargs=True).remove)

    def _enter(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._end_prefill()
        if inputs.get("pixel_values") is None:
            if inputs.get("mm_encoder_outputs"):
                raise InputError("images that are encoded already cannot be pruned; pass pixel_values")
            if is_prefill(inputs):
                self.last = self._trace = None
            inputs, masks = continue_inputs(self.host, inputs)
            for number, mask in masks.items():
                hook = functools.partial(_with_mask, mask)
                layer = self.host.text_layers[number]
                self._step_changes.add(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            return (), inputs
        self.host.check_call(inputs)
        _check_training(self.host)
        prompts = read_prompts(
            inputs, self.host, labels=self.labels, prompt_length=self.prompt_length, repeats=self.repeats
        )
        self._running = Prefill(self.host, self.method, self.guide_maker, prompts, inputs["input_ids"].device)
        self._install_prefill()
        return (), self._running.start(inputs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        prefill = self._running
        self._end_prefill()
        if prefill is None or output is None:
            return
        parts = output if isinstance(output, tuple) else (output.past_key_values,)
        features = prefill.finish(next((part for part in parts if isinstance(part, Cache)), None))
        self.last, self._trace = prefill, None
        if not isinstance(output, tuple):
            output.image_hidden_states = features

    def _feature_layer_done(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._running is not None and self._running.runs("vision"):
            self._running.feature_layer_done(output[0] if isinstance(output, tuple) else output)

    def _layer_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running is not None and self._running.runs("llm"):
            return args, self._running.layer_inputs(args[0], kwargs)
        return None

    def _end_prefill(self) -> None:
        self._running = None
        self._step_changes.undo()

    def _see(self, where: str, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if self._running is not None and self._running.runs(where):
            self._running.see(where, layer, query, key, value, scale)


def _with_mask(mask: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": mask}

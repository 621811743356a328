"""Attach a pruning method to a stock transformers model, and take it off again without a trace."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ivtp import registry
from ivtp.config import READS_CLIP, PruneConfig
from ivtp.decode import continue_inputs, is_prefill
from ivtp.errors import AttachError, ConfigError, UnsupportedModelError
from ivtp.guide import GuideMaker
from ivtp.hosts.base import Host
from ivtp.instruction import ClipText, InstructionReader
from ivtp.methods.base import Cut, Method
from ivtp.prefill import Prefill
from ivtp.probe import AttentionProbe
from ivtp.report import build_trace
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
    `config`, or its fields and the method's own options as keywords; what is not given follows the checkpoint's
    recommendation. `clip` is the CLIP text side: `(CLIPModel, tokenizer)`, a folder or a hub id; None asks the host.

    Raises `UnsupportedModelError`, `ConfigError`, `LoadError`, or `AttachError` where a pruner is attached already;
    the model is unchanged then.
    """
    host = find_host(model)
    if _MARK in host.model.__dict__:
        raise AttachError("a pruner is attached to this model already; call its detach() first")
    if config is None:
        config = PruneConfig.of(**{**host.recommended(), **options})
    elif options:
        raise ConfigError(f"got a PruneConfig and {', '.join(options)} beside it; put everything into one of them")
    method: Method = registry.method_class(config.method)(config, host.size)
    pruner = Pruner(host, method, _guide_maker(host, method, processor, clip))
    pruner.install()
    return pruner


def find_host(model: nn.Module) -> Host:
    """The host of `model`, also when it is wrapped (by PEFT, say). Raises `UnsupportedModelError` with the list."""
    hosts = [registry.host_class(name) for name in registry.list_hosts()]
    for module in model.modules():
        for host in hosts:
            if type(module).__name__ == host.model_class and host.matches(module.config):
                found: Host = host(module)
                return found
    names = ", ".join(f"{host.model_class} ({host.name})" for host in hosts)
    raise UnsupportedModelError(f"{type(model).__name__} is not a model that can be pruned; supported: {names}")


def _guide_maker(host: Host, method: Method, processor: Any, clip: Any) -> GuideMaker:
    config, reads_clip = method.config, method.config.guide in READS_CLIP
    if not method.plan.guide_layers:
        return GuideMaker(config, host, None, None)
    reader = InstructionReader(processor) if processor is not None else None
    if not reads_clip:
        return GuideMaker(config, host, reader, None)
    if reader is None:
        raise ConfigError(
            f'guide="{config.guide}" reads the instruction; pass the processor, or guide="text" or guide="visual"'
        )
    source = clip if clip is not None else host.default_clip()
    if source is None:
        raise ConfigError(
            "no CLIP text side is known for this model's vision tower; pass clip=(CLIPModel, tokenizer), a folder or "
            'a hub id, or use guide="text" or guide="visual"'
        )
    text_side = ClipText.load(source, vision_hidden=host.size.vision_hidden, like=next(host.vision_layers.parameters()))
    return GuideMaker(config, host, reader, text_side)


class Pruner:
    """A method attached to a model: hooks in at `install`, out at `detach`. A context manager that detaches."""

    def __init__(self, host: Host, method: Method, guide_maker: GuideMaker) -> None:
        self.host = host
        self.method = method
        self.guide_maker = guide_maker
        self._running: Prefill | None = None
        self._last: Prefill | None = None
        self._trace: PruneTrace | None = None
        self._labels: Tensor | None = None
        self._repeats = 1
        self._layer_masks: dict[int, Any] = {}
        self._undo: list[Callable[[], None]] = []

    @property
    def config(self) -> PruneConfig:
        """What was asked."""
        return self.method.config

    @property
    def trace(self) -> PruneTrace | None:
        """The record of the last prefill, None before it and where it had no image. Reading it waits for the device."""
        if self._trace is None and self._last is not None:
            self._trace = build_trace(self._last)
        return self._trace

    def __enter__(self) -> Pruner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Take everything out again; does nothing when it is out already."""
        while self._undo:
            self._undo.pop()()

    # ---- hooks ------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks in. A failure half-way takes them out again."""
        try:
            self._install()
        except BaseException:
            self.detach()
            raise

    def _install(self) -> None:
        host, plan = self.host, self.method.plan
        self._set(host.model, _MARK, self)
        self._set(host.model, "forward", self._forward_with_labels(host.model))
        self._set(host.model, "_expand_inputs_for_generation", self._expand_for_beams(host.model))
        self._hook(host.multimodal.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._hook(host.multimodal.register_forward_hook(self._leave, always_call=True))
        feature_layer = host.vision_layers[host.size.vision_layers - 1]
        self._hook(feature_layer.register_forward_hook(self._feature_layer_done))
        for cut in plan.cuts:
            layers = host.vision_layers if cut.where == "vision" else host.text_layers
            if not cut.after:
                self._stand_in(layers[cut.layer], cut)
        for where, tap in sorted({(cut.where, tap) for cut in plan.cuts for tap in cut.taps}):
            probe = AttentionProbe(host.attention_of(where, tap), functools.partial(self._see, where, tap))
            self._undo.append(probe.remove)
        for number, layer in enumerate(host.text_layers):
            hook = functools.partial(self._layer_inputs, number)
            self._hook(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute on the instance and remember what was there."""
        before = module.__dict__.get(name, _MARK)
        module.__dict__[name] = value

        def undo() -> None:
            if before is _MARK:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

        self._undo.append(undo)

    def _stand_in(self, layer: nn.Module, cut: Cut) -> None:
        """Cut between attention and MLP: a hook cannot reach there, the residual is a local variable."""
        name = _forward_slot(layer)
        stock = getattr(layer, name)

        @functools.wraps(stock)
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            running = self._running
            if running is None or not running.runs(cut.where):
                return stock(hidden, *args, **kwargs)
            if layer.training and getattr(layer, "gradient_checkpointing", False):
                # the checkpointed layers around this one drop the cache as well
                kwargs = {**kwargs, "use_cache": False, "past_key_values": None}
            hidden = self.host.attend(cut.where, layer, hidden, *args, **kwargs)
            return self.host.feed_forward(cut.where, layer, running.cut(cut, hidden))

        self._set(layer, name, forward)

    def _forward_with_labels(self, model: nn.Module) -> Callable[..., Any]:
        """The model's forward, with the loss taken over the shortened sequence."""
        name = _forward_slot(model)
        stock = getattr(model, name)
        signature = inspect.signature(stock)
        names = list(signature.parameters)

        @functools.wraps(stock)
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs.update(zip(names, args, strict=False))
            labels = kwargs.get("labels")
            if labels is None or kwargs.get("pixel_values") is None:
                return stock(**kwargs)
            self._labels = labels
            try:
                output = stock(**{**kwargs, "labels": None})
            finally:
                self._labels = None
            return self._add_loss(output, labels, {k: v for k, v in kwargs.items() if k not in names})

        # `generate` encodes images by itself, before the prefill, where the forward takes `mm_encoder_outputs`
        shown = [p for n, p in signature.parameters.items() if n != "mm_encoder_outputs"]
        forward.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return forward

    def _expand_for_beams(self, model: Any) -> Callable[..., Any]:
        """Repeat the rows of a prompt for beams and samples, but not its images: they are encoded once."""
        stock = model._expand_inputs_for_generation

        @functools.wraps(stock)
        def expand(expand_size: int = 1, **kwargs: Any) -> Any:
            pixels = kwargs.pop("pixel_values", None)
            ids, expanded = stock(expand_size=expand_size, **kwargs)
            if pixels is not None:
                expanded["pixel_values"] = pixels
                self._repeats = expand_size
            return ids, expanded

        return expand

    def _add_loss(self, output: Any, labels: Tensor, extra: dict[str, Any]) -> Any:
        model: Any = self.host.model
        assert self._last is not None
        logits = output[0]
        loss = model.loss_function(
            logits=logits,
            labels=self._last.shorten_labels(labels),
            vocab_size=model.config.get_text_config().vocab_size,
            **extra,
        )
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(**{**output, "loss": loss})

    # ---- what the hooks do ------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(module.forward).parameters)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._running, self._layer_masks = None, {}
        if inputs.get("pixel_values") is None:
            if is_prefill(inputs):
                self._last = self._trace = None
            inputs, self._layer_masks = continue_inputs(self.host, inputs)
            return (), inputs
        self._check_training()
        repeats, self._repeats = self._repeats, 1
        self._running = Prefill.of(
            inputs, self.host, self.method, self.guide_maker, labels=self._labels, repeats=repeats
        )
        return (), self._running.start(inputs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        prefill, self._running = self._running, None
        if prefill is None or output is None:
            return None
        cache = (
            next((part for part in output if isinstance(part, Cache)), None)
            if isinstance(output, tuple)
            else (output.past_key_values)
        )
        prefill.finish(cache)
        self._last, self._trace = prefill, None
        if not isinstance(output, tuple):
            output.image_hidden_states = prefill.image_features
        return None

    def _feature_layer_done(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._running is not None and self._running.runs("vision"):
            self._running.feature_layer_done(output[0] if isinstance(output, tuple) else output)

    def _layer_inputs(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running is not None and self._running.runs("llm"):
            return args, self._running.layer_inputs(args[0], kwargs)
        if number in self._layer_masks:
            return args, {**kwargs, "attention_mask": self._layer_masks[number]}
        return None

    def _see(self, where: str, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if self._running is not None and self._running.runs(where):
            self._running.see(where, layer, query, key, value, scale)

    def _check_training(self) -> None:
        """Older transformers re-run a layer's hooks when checkpointing recomputes it; those cannot be served."""
        layer: Any = self.host.text_layers[0]
        old = "__call__" in next(c for c in type(layer).__mro__ if c.__name__ == "GradientCheckpointingLayer").__dict__
        if old and layer.training and layer.gradient_checkpointing and torch.is_grad_enabled():
            raise AttachError(
                "gradient checkpointing of a pruned model needs a newer transformers (5.23 works); "
                "upgrade it or turn gradient checkpointing off"
            )


def _forward_slot(module: nn.Module) -> str:
    """The instance attribute that holds the real forward: accelerate keeps it behind its own."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"

"""Callables that stand in for a module's own on the instance, and the list that takes all of them away again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ivtp.hosts.base import Host
from ivtp.methods.base import Cut
from ivtp.prefill import Prefill


class Changes:
    """Everything that was put into a model; `undo` takes it out, the last change first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None]) -> None:
        """Remember how to take one change back."""
        self._undo.append(undo)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute on the instance, past the registration of sub-modules."""
        had, before = name in module.__dict__, module.__dict__.get(name)
        module.__dict__[name] = value

        def undo() -> None:
            if had:
                module.__dict__[name] = before
            else:
                module.__dict__.pop(name, None)

        self.add(undo)

    def undo(self) -> None:
        """Take all changes back; does nothing when there are none."""
        while self._undo:
            self._undo.pop()()


def forward_slot(module: nn.Module) -> str:
    """The instance attribute that holds the real forward: accelerate keeps it behind its own."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def cut_layer(host: Host, layer: nn.Module, cut: Cut, running: Callable[[], Prefill | None]) -> Callable[..., Any]:
    """A layer's forward with a cut behind it, or between attention and MLP, where a hook cannot reach: the residual
    is local."""
    stock = getattr(layer, forward_slot(layer))

    @functools.wraps(stock)
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefill = running()
        if prefill is None or not prefill.runs(cut.where):
            return stock(hidden, *args, **kwargs)
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            # the checkpointed layers around this one drop the cache as well
            kwargs = {**kwargs, "use_cache": False, "past_key_values": None}
        if cut.place == "behind":
            output = stock(hidden, *args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            if cut.peek:
                prefill.peek(cut, first, kwargs)
            left = prefill.cut(cut, first)
            return (left, *output[1:]) if isinstance(output, tuple) else left
        hidden = host.attend(cut.where, layer, hidden, *args, bias=prefill.bias(cut), **kwargs)
        return host.feed_forward(cut.where, layer, prefill.cut(cut, hidden))

    return forward


class Calls(Protocol):
    """What the stand-ins for `forward` and `generate` tell the pruner about the call that runs."""

    labels: Tensor | None
    """Labels of a training step."""
    prompt_length: int | None
    """Tokens of the prompt of a `generate`; what comes behind was generated or drafted."""
    repeats: int
    """Rows of that `generate` for each prompt: beams or returned sequences."""
    last: Prefill | None

    def exclusively(self) -> Any:
        """A context in which no other thread runs the model; leaving it forgets a prefill that failed."""


def forward_with_labels(model: Any, calls: Calls) -> Callable[..., Any]:
    """The model's forward, with the loss taken over the shortened sequence."""
    stock = getattr(model, forward_slot(model))
    signature = inspect.signature(stock)
    names = list(signature.parameters)

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        with calls.exclusively():
            labels = kwargs.get("labels")
            if labels is None or kwargs.get("pixel_values") is None:
                return stock(**kwargs)
            calls.labels = labels
            try:
                output = stock(**{**kwargs, "labels": None})
            finally:
                calls.labels = None
            return _with_loss(model, output, labels, calls, {k: v for k, v in kwargs.items() if k not in names})

    # `generate` encodes images by itself, before the prefill, where the forward takes `mm_encoder_outputs`
    shown = [p for n, p in signature.parameters.items() if n != "mm_encoder_outputs"]
    forward.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return forward


def _with_loss(model: Any, output: Any, labels: Tensor, calls: Calls, extra: dict[str, Any]) -> Any:
    assert calls.last is not None
    loss = model.loss_function(
        logits=output[0],
        labels=calls.last.shorten_labels(labels),
        vocab_size=model.config.get_text_config().vocab_size,
        **extra,
    )
    if isinstance(output, tuple):
        return (loss, *output)
    return type(output)(**{**output, "loss": loss})


def generate_alone(model: Any, calls: Calls) -> Callable[..., Any]:
    """`generate` that knows where its prompt ends, so that generated and drafted tokens do not lead the pruning."""
    stock = model.generate

    @functools.wraps(stock)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with calls.exclusively():
            try:
                return stock(*args, **kwargs)
            finally:
                calls.prompt_length, calls.repeats = None, 1

    return generate


def expand_for_beams(model: Any, calls: Calls) -> Callable[..., Any]:
    """Repeat the rows of a prompt for beams and samples, but not its images: they are encoded once."""
    stock = model._expand_inputs_for_generation

    @functools.wraps(stock)
    def expand(expand_size: int = 1, **kwargs: Any) -> Any:
        pixels = kwargs.pop("pixel_values", None)
        ids, expanded = stock(expand_size=expand_size, **kwargs)
        if pixels is not None:
            expanded["pixel_values"] = pixels
            calls.prompt_length, calls.repeats = ids.shape[1], expand_size
        return ids, expanded

    return expand

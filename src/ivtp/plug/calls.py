"""Callables that stand in for a model's own `forward` and `generate` while a pruner is attached."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from ivtp.core.select import take
from ivtp.guide.pseudo_cls import GuideMaker
from ivtp.hosts.base import Host
from ivtp.methods.base import Method
from ivtp.plug.turns import find_turn, refilled
from ivtp.prefill.record import Record
from ivtp.prefill.turns import Turn
from ivtp.stock import EXPAND, forward_slot


@dataclass(frozen=True)
class Call:
    """What a call of `generate` or `forward` says about the prefill inside it."""

    labels: Tensor | None = None
    """(B, T) labels of a training step."""
    prompt_length: int | None = None
    """Tokens of the prompt of a `generate`; what comes behind was generated or drafted."""
    repeats: int = 1
    """Rows of that `generate` for each prompt: beams or returned sequences."""
    turn: Turn | None = None
    """Of a later turn of a conversation: the images that its prefill reads."""


@dataclass(frozen=True)
class Equipment:
    """A method, and what it reads the instruction with."""

    method: Method
    guide_maker: GuideMaker


class Thread(threading.local):
    """What one thread does with an attached model: its calls and options, the innermost last, and its last record."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.using: list[Equipment] = []
        self.record: Record | None = None
        self.recorded = False
        """Whether the record is of the outermost call that is open."""
        self.has_called = False

    @contextmanager
    def calling(self, call: Call) -> Iterator[None]:
        """A call within the calls that are open."""
        if not self.calls:
            self.recorded, self.has_called = False, True
        self.calls.append(call)
        try:
            yield
        finally:
            self.calls.pop()


class Plugged(Protocol):
    """What the stand-ins need of the pruner."""

    thread: Thread
    host: Host
    media: tuple[str, ...]
    """Arguments that describe images; the first one is there where there are any."""

    def keep_record(self, record: Record | None) -> None:
        """Take the record of the conversation that goes on for that of the call."""

    def check_ahead(self, inputs: dict[str, Any]) -> None:
        """Raise `InputError` for images that the stock `generate` would trip over before it calls the model."""

    def exclusively(self) -> Any:
        """A context in which no other thread runs the model; True inside while the pruner is attached."""

    @property
    def method(self) -> Method:
        """The method at work."""

    @property
    def full_logits(self) -> bool:
        """Whether logits come back for every column of the prompt."""


def forward_with_labels(model: Any, plugged: Plugged) -> Callable[..., Any]:
    """The model's forward: the loss is taken over the tokens that are left, logits are given for every column."""
    stock = getattr(model, forward_slot(model))
    names = list(inspect.signature(stock).parameters)

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        with plugged.exclusively() as attached:
            if not attached:
                return stock(**kwargs)
            thread = plugged.thread
            call = thread.calls[-1] if thread.calls else Call()
            labels = kwargs.get("labels")
            with thread.calling(call if labels is None else replace(call, labels=labels)):
                if kwargs.get(plugged.media[0]) is None:
                    return stock(**kwargs)
                wanted = kwargs.get("logits_to_keep", 0)
                last = isinstance(wanted, int) and wanted == 1  # of the last column the logits are always there
                columns = 1 if last and labels is None else 0
                output = stock(**{**kwargs, "labels": None, "logits_to_keep": columns})
                if labels is not None:
                    output = _with_loss(
                        model, output, labels, thread, {k: v for k, v in kwargs.items() if k not in names}
                    )
                return output if columns == 1 else _with_logits(output, wanted, thread, full=plugged.full_logits)

    return forward


def _with_loss(model: Any, output: Any, labels: Tensor, thread: Thread, extra: dict[str, Any]) -> Any:
    assert thread.record is not None
    loss = model.loss_function(
        logits=output[0],
        labels=thread.record.shorten_labels(labels),
        vocab_size=model.config.get_text_config().vocab_size,
        **extra,
    )
    if isinstance(output, tuple):
        return (loss, *output)
    return type(output)(**{**output, "loss": loss})


def _with_logits(output: Any, wanted: int | Tensor, thread: Thread, *, full: bool) -> Any:
    """The output with those columns of its logits that were `wanted`, of the prompt (`full`) or of what is left."""
    assert thread.record is not None
    place = next(i for i, part in enumerate(output) if part.dim() == 3) if isinstance(output, tuple) else None
    logits: Tensor = output.logits if place is None else output[place]
    chosen: Any = slice(-wanted, None) if isinstance(wanted, int) else wanted
    if full:
        logits = take(logits, thread.record.columns()[:, chosen])
    elif not isinstance(wanted, int) or wanted:
        logits = logits[:, chosen]
    if place is None:
        output.logits = logits
        return output
    return (*output[:place], logits, *output[place + 1 :])


def with_all_columns(output: Any, record: Record | None) -> Any:
    """The decoder's output with last hidden states (B, T, D) for every column of the prompt."""
    assert record is not None
    if isinstance(output, tuple):
        return (take(output[0], record.columns()), *output[1:])
    output.last_hidden_state = take(output.last_hidden_state, record.columns())
    return output


def without_guide(output: Any, layers: int) -> Any:
    """The output whose hidden states (B, T, D) and attention maps (B, H, T, T) end in the prompt's own last column.

    The pseudo CLS token enters the first `layers` of them.
    """
    if not layers:
        return output
    if isinstance(output, tuple):
        return tuple(_shorten(part, layers) if isinstance(part, tuple) else part for part in output)
    for name in ("hidden_states", "attentions"):
        states = getattr(output, name, None)
        if states is not None:
            setattr(output, name, _shorten(states, layers))
    return output


def _shorten(states: tuple[Tensor, ...], layers: int) -> tuple[Tensor, ...]:
    """Without the last token, in the first `layers`."""
    return tuple(
        state if number >= layers else state[:, :-1] if state.dim() == 3 else state[..., :-1, :-1]
        for number, state in enumerate(states)
    )


def generate_alone(model: Any, plugged: Plugged) -> Callable[..., Any]:
    """`generate` that knows where its prompt ends, so that generated and drafted tokens do not lead the pruning."""
    stock = model.generate

    @functools.wraps(stock)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with plugged.exclusively() as attached:
            if not attached:
                return stock(*args, **kwargs)
            given = args[1] if len(args) > 1 else kwargs.get("generation_config")
            configs = [config for config in (given, model.generation_config) if config is not None]
            ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            later = find_turn(plugged.host, plugged.method, ids, kwargs, configs)
            with plugged.thread.calling(Call(turn=later.turn if later else None)), ExitStack() as stack:
                if later is not None:
                    plugged.keep_record(later.record)
                    if later.turn is None:
                        kwargs = {name: value for name, value in kwargs.items() if name not in plugged.media}
                    if later.refill is not None:
                        stack.enter_context(refilled(later.refill))
                if kwargs.get(plugged.media[0]) is not None or (later is not None and later.turn is not None):
                    plugged.check_ahead({"input_ids": ids, **kwargs})
                    kwargs.pop("prefill_chunk_size", None)
                    stack.enter_context(_whole_prompts(configs))
                return stock(*args, **kwargs)

    return generate


@contextmanager
def _whole_prompts(configs: list[Any]) -> Iterator[None]:
    """Read prompts in one piece: only a whole prompt can be pruned, and it is short then."""
    sizes = [config.prefill_chunk_size for config in configs]
    try:
        for config in configs:
            config.prefill_chunk_size = None
        yield
    finally:
        for config, size in zip(configs, sizes, strict=True):
            config.prefill_chunk_size = size


def expand_for_beams(model: Any, plugged: Plugged) -> Callable[..., Any]:
    """Repeat the rows of a prompt for beams and samples, but not its images: they are encoded once."""
    stock = getattr(model, EXPAND)

    @functools.wraps(stock)
    def expand(expand_size: int = 1, **kwargs: Any) -> Any:
        media = {name: kwargs.pop(name) for name in plugged.media if kwargs.get(name) is not None}
        ids, expanded = stock(expand_size=expand_size, **kwargs)
        calls = plugged.thread.calls
        if media or (calls and calls[-1].turn is not None):
            expanded.update(media)
            if calls:
                calls[-1] = replace(calls[-1], prompt_length=ids.shape[1], repeats=expand_size)
        return ids, expanded

    return expand

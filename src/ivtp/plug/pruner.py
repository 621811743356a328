"""A method that is attached to a model: what it puts in, and what it takes out again."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.cache_utils import Cache

from ivtp.config import PruneConfig
from ivtp.core.untraced import untraced
from ivtp.errors import AttachError, InputError
from ivtp.hosts.base import Host
from ivtp.methods.base import Method, Plan
from ivtp.plug.calls import (
    Call,
    Equipment,
    Thread,
    expand_for_beams,
    forward_with_labels,
    generate_alone,
    with_all_columns,
    without_guide,
)
from ivtp.plug.changes import Changes, exclusive
from ivtp.plug.turns import turn_in_forward
from ivtp.prefill.cache import check_cache, continue_inputs, is_prefill
from ivtp.prefill.past import behind
from ivtp.prefill.probe import AttentionProbe
from ivtp.prefill.record import Record
from ivtp.prefill.run import Prefill
from ivtp.prefill.stage import Plug
from ivtp.prompt.batch import read_prompts
from ivtp.stock import (
    CACHE_NAMES,
    ENCODES_AHEAD,
    EXPAND,
    cache_name,
    encodes_ahead,
    execution_device,
    forward_slot,
    reruns_hooks,
    set_image_features,
)
from ivtp.trace import PruneTrace

MARK = "_ivtp_pruner"
"""The model's attribute that names its pruner."""


class Pruner:
    """A method attached to a model: hooks in at `install`, out at `detach`. A context manager that detaches.

    Calls of the model from several threads run one after the other, and each thread reads its own record. A model with
    a pruner attached is not copied or pickled; `save_pretrained` writes the stock checkpoint.
    """

    def __init__(self, host: Host, equip: Callable[[PruneConfig], Equipment], config: PruneConfig) -> None:
        """`equip` makes what a config asks for; it raises `ConfigError` for what this model cannot do."""
        self.host = host
        self.thread = Thread()
        self.media = host.media
        self._equip = equip
        self._own = equip(config)
        self._last: Record | None = None
        self._prefill: Prefill | None = None
        self._owner = 0
        """The thread that the prefill runs in."""
        self._changes = Changes()
        self._step_changes = Changes()
        self._attached = False
        self._probes: dict[nn.Module, AttentionProbe] = {}
        self._plug = Plug(host, self._probe, self._is_mine)

    @property
    def method(self) -> Method:
        """The method at work, with its plan: of this thread's `using`, or else as attached."""
        return self._equipment.method

    @property
    def config(self) -> PruneConfig:
        """What was asked: in this thread's `using`, or else at attaching."""
        return self.method.config

    @property
    def reads_clip(self) -> bool:
        """Whether CLIP's text side is read."""
        return self._equipment.guide_maker.clip is not None

    @property
    def _equipment(self) -> Equipment:
        return self.thread.using[-1] if self.thread.using else self._own

    @contextmanager
    def using(self, **options: Any) -> Iterator[Pruner]:
        """Other options, or another method, for the calls of this thread within the context; nothing is attached anew.

        What is not named stays as attached, for example `with pruner.using(keep=32): model.generate(...)`. Raises
        `ConfigError` as attaching does.
        """
        equipment = self._equip(self.config.changed(**options))
        _check_devices(self.host, equipment.method.plan)
        self.thread.using.append(equipment)
        try:
            yield self
        finally:
            self.thread.using.pop()

    @property
    def full_logits(self) -> bool:
        """Whether logits come back for every column of the prompt."""
        return self.config.logits == "full"

    @property
    def trace(self) -> PruneTrace | None:
        """The record of this thread's last prefill; None before it and where it had no image.

        A thread that has not called the model reads the record of the last call of any thread. Reading waits for the
        device.
        """
        record = self.thread.record if self.thread.has_called else self._last
        return None if record is None else record.trace

    def __repr__(self) -> str:
        state = "attached to" if self._attached else "detached from"
        method = self.config.method
        name = method if isinstance(method, str) else method.__name__
        return f"Pruner({name}, keep={self.config.keep!r}, {state} {type(self.host.model).__name__})"

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
        """Take everything out again, after the call that is running; does nothing when it is out already."""
        with exclusive(self.host.model):
            self._attached = False
            self._step_changes.undo()
            self._changes.undo()

    def install(self) -> None:
        """Put the hooks in. Raises `AttachError` where a pruner is attached; a failure half-way takes them out."""
        with exclusive(self.host.model):
            check_unpruned(self.host)
            try:
                self._install()
            except BaseException:
                self.detach()
                raise

    def check_ahead(self, inputs: dict[str, Any]) -> None:
        """Raise `InputError` for images that the stock `generate` would trip over before it calls the model."""
        if self.host.generate_reads:
            self.host.check_media(inputs)
            read_prompts(inputs, self.host, labels=None, prompt_length=None, repeats=1)

    @contextmanager
    def exclusively(self) -> Iterator[bool]:
        """One call of the model at a time; a prefill that fails, or is interrupted, leaves nothing behind.

        Gives whether the pruner is still attached: it may have been detached while this call waited.
        """
        with exclusive(self.host.model):
            try:
                yield self._attached
            except BaseException:
                self._end_prefill()
                raise

    def keep_record(self, record: Record | None) -> None:
        """Take the record of the conversation that goes on for that of the call."""
        if record is not None:
            self.thread.record, self.thread.recorded, self._last = record, True, record

    # ---- hooks ------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        host, changes = self.host, self._changes
        model: Any = host.model
        _check_devices(host, self._own.method.plan)
        for module in (model, host.multimodal):  # before anything else of ours: copying or pickling meets it first
            changes.set(module, MARK, self)
        changes.set(model, forward_slot(model), forward_with_labels(model, self))
        changes.set(model, "generate", generate_alone(model, self))
        changes.set(model, EXPAND, expand_for_beams(model, self))
        if encodes_ahead(model):
            changes.set(model, ENCODES_AHEAD, _no)
        changes.stand_in(host.multimodal, self._multimodal_forward)
        self._attached = True

    def _multimodal_forward(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Stands in for the forward that merges image features and text: here a prefill begins and ends."""
        names, cache = list(inspect.signature(stock).parameters), cache_name(stock)

        @functools.wraps(stock)
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs.update(zip(names, args, strict=False))
            with self.exclusively() as attached:
                if not attached:
                    return stock(**kwargs)
                thread = self.thread
                direct = not thread.calls  # by a trainer that has a head of its own, say
                with thread.calling(thread.calls[-1] if thread.calls else Call()):
                    inputs = {"past_key_values" if k in CACHE_NAMES else k: v for k, v in kwargs.items()}
                    inputs = self._enter(inputs, thread.calls[-1])
                    output = stock(**{cache if k == "past_key_values" else k: v for k, v in inputs.items()})
                    output = self._leave(output)
                    if direct and self.full_logits and thread.recorded:
                        output = with_all_columns(output, thread.record)
                    return output

        return forward

    def _enter(self, inputs: dict[str, Any], call: Call) -> dict[str, Any]:
        self._end_prefill()
        self.host.check_media(inputs)
        has_images = inputs.get(self.media[0]) is not None
        if not has_images and not _reads_again(inputs, call):
            if inputs.get("mm_encoder_outputs"):
                raise InputError("images that are encoded already cannot be pruned; pass pixel_values")
            if is_prefill(inputs):
                self._begin_unpruned(inputs)
            inputs, masks = continue_inputs(self.host, inputs)
            for number, mask in masks.items():
                hook = functools.partial(_with_mask, mask)
                layer = self.host.text.layers[number]
                self._step_changes.add(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            return inputs
        self.thread.record = self._last = None
        self.host.check_call(inputs)
        _check_training(self.host)
        cache, past, turn = inputs.get("past_key_values"), None, call.turn
        if cache is not None:
            check_cache(cache)
        if not is_prefill(inputs):
            past, inputs = behind(self.host, cache, inputs)
            turn = turn or turn_in_forward(self.host, self.method, cache, inputs)
        prompts = read_prompts(
            inputs,
            self.host,
            labels=call.labels,
            prompt_length=None if call.prompt_length is None else call.prompt_length - (turn.past if turn else 0),
            repeats=call.repeats,
            images=turn.visuals if turn else None,
        )
        method, guide_maker = self._equipment.method, self._equipment.guide_maker
        prefill = Prefill(self._plug, method, guide_maker, prompts, self._step_changes, turn, past)
        self._prefill, self._owner = prefill, _this_thread()
        return prefill.start(inputs)

    def _begin_unpruned(self, inputs: dict[str, Any]) -> None:
        """A prompt without an image leaves no record; the second prompt of a guided `generate` keeps the first's."""
        if not self.thread.recorded:
            self.thread.record = self._last = None
        if inputs.get("inputs_embeds") is not None:
            warnings.warn(
                "this prompt came as inputs_embeds without pixel_values: nothing is pruned, whether image features are "
                "merged into it or not; pass input_ids and pixel_values to prune",
                stacklevel=2,
            )

    def _leave(self, output: Any) -> Any:
        prefill = self._prefill
        self._end_prefill()
        if prefill is None:
            return output
        output = without_guide(output, prefill.method.plan.guide_layers)
        parts = output if isinstance(output, tuple) else (getattr(output, name, None) for name in CACHE_NAMES)
        record, features = prefill.finish(next((part for part in parts if isinstance(part, Cache)), None))
        self.keep_record(record)
        if not isinstance(output, tuple):
            set_image_features(output, features)
        return output

    def _is_mine(self) -> bool:
        """Whether this thread's prefill runs; other threads may run the layers meanwhile, and pass through.

        Compiled code is the prefill's own, and Dynamo would leave the graph to ask for the thread.
        """
        own = torch.compiler.is_compiling() or self._owner == threading.get_ident()
        return own and self._prefill is not None

    def _probe(self, attention: nn.Module) -> AttentionProbe:
        if attention not in self._probes:
            self._probes[attention] = AttentionProbe(attention)
        return self._probes[attention]

    def _end_prefill(self) -> None:
        self._prefill = None
        self._step_changes.undo()


def check_unpruned(host: Host) -> None:
    """Raise `AttachError` where a pruner is attached."""
    if MARK in host.model.__dict__:
        raise AttachError("a pruner is attached to this model already; call its detach() first")


def check_uncompressed(host: Host) -> None:
    """Raise `AttachError` where a compressor stands in for the projector: behind it there are no patches to prune."""
    if host.size.compressed is not None:
        raise AttachError(
            f"the compressor {host.size.compressed.name} of this model gives {host.size.compressed.tokens} tokens of "
            'an image, which nothing prunes further; use method="none", or take it out with its detach()'
        )


def pruner_of(model: nn.Module) -> Pruner | None:
    """The pruner that is attached to `model`, also where it is wrapped (by PEFT, say); None without one."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found: Iterator[Pruner] = (m.__dict__[MARK] for m in modules if MARK in m.__dict__)
    return next(found, None)


def detach(model: nn.Module) -> None:
    """Take off whatever pruner is attached to `model`; does nothing where there is none."""
    pruner = pruner_of(model)
    if pruner is not None:
        pruner.detach()


def _reads_again(inputs: dict[str, Any], call: Call) -> bool:
    """Whether this is the prefill of a whole conversation, whose images need not be given."""
    ids = inputs.get("input_ids")
    again = call.turn is not None and call.turn.anew and is_prefill(inputs)
    return again and ids is not None and ids.shape[1] >= (call.prompt_length or 0)


@untraced
def _this_thread() -> int:
    return threading.get_ident()


def _no() -> bool:
    return False


def _with_mask(mask: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": mask}


def _check_devices(host: Host, plan: Plan) -> None:
    """Cuts need the encoder and the cut decoder layers on one device; layers behind them may be anywhere."""
    last = max((cut.layer for cut in plan.cuts if cut.where == "llm"), default=-1)
    devices = {execution_device(m) for m in (host.embedding, *host.vision.layers, *host.text.layers[: last + 1])}
    if len(devices) > 1:
        raise AttachError(
            f"the vision tower and the first {last + 1} decoder layers lie on {sorted(map(str, devices))}; "
            "load the model with a device_map that keeps them together"
        )


def _check_training(host: Host) -> None:
    """Older transformers re-run a layer's hooks when checkpointing recomputes it; those cannot be served."""
    if reruns_hooks(host.text.layers[0]):
        raise AttachError(
            "gradient checkpointing of a pruned model needs transformers 5.23 or newer; "
            "upgrade it or turn gradient checkpointing off"
        )

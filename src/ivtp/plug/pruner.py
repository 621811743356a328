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
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ivtp.config import PruneConfig
from ivtp.errors import AttachError, InputError
from ivtp.guide.pseudo_cls import GuideMaker
from ivtp.hosts.base import CACHE_NAMES, Host, cache_name
from ivtp.methods.base import Method, Plan
from ivtp.plug.calls import (
    Call,
    Thread,
    expand_for_beams,
    forward_with_labels,
    generate_alone,
    with_all_columns,
    without_guide,
)
from ivtp.plug.changes import Changes, exclusive
from ivtp.plug.transformers import encodes_ahead, execution_device, forward_slot, reruns_hooks, set_image_features
from ivtp.prefill.cache import continue_inputs, is_prefill
from ivtp.prefill.layers import cut_layer
from ivtp.prefill.probe import AttentionProbe
from ivtp.prefill.record import build_trace
from ivtp.prefill.run import Prefill
from ivtp.prompt.batch import read_prompts
from ivtp.trace import PruneTrace

MARK = "_ivtp_pruner"
"""The model's attribute that names its pruner."""


class Pruner:
    """A method attached to a model: hooks in at `install`, out at `detach`. A context manager that detaches.

    Calls of the model from several threads run one after the other, and each thread reads its own record. A model with
    a pruner attached is not copied or pickled; `save_pretrained` writes the stock checkpoint.
    """

    def __init__(self, host: Host, method: Method, guide_maker: GuideMaker) -> None:
        self.host = host
        self.method = method
        self.guide_maker = guide_maker
        self.thread = Thread()
        self._last: Prefill | None = None
        self._prefill: Prefill | None = None
        self._owner = 0
        """The thread that the prefill runs in."""
        self._changes = Changes()
        self._step_changes = Changes()
        self._attached = False
        self._probes = [
            AttentionProbe(host.attention_of(where, tap), functools.partial(self._see, where, tap))
            for where, tap in sorted({(cut.where, tap) for cut in method.plan.cuts for tap in cut.taps})
        ]

    @property
    def config(self) -> PruneConfig:
        """What was asked."""
        return self.method.config

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
        return None if record is None else build_trace(record)

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

    # ---- hooks ------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        host, changes = self.host, self._changes
        model: Any = host.model
        _check_devices(host, self.method.plan)
        for module in (model, host.multimodal):  # before anything else of ours: copying or pickling meets it first
            changes.set(module, MARK, self)
        changes.set(model, forward_slot(model), forward_with_labels(model, self))
        changes.set(model, "generate", generate_alone(model, self))
        changes.set(model, "_expand_inputs_for_generation", expand_for_beams(model, self))
        if encodes_ahead(model):
            changes.set(model, "_supports_mm_encoder_outputs", _no)
        changes.set(host.multimodal, forward_slot(host.multimodal), self._multimodal_forward())
        self._attached = True

    def _install_prefill(self) -> None:
        """What only a prefill needs; decoding then runs the stock layers."""
        host, plan, changes = self.host, self.method.plan, self._step_changes
        feature_layer = host.vision_layers[host.size.vision_layers - 1]
        changes.add(feature_layer.register_forward_hook(self._feature_layer_done).remove)
        for cut in plan.cuts:
            if not cut.is_after_encoder(host.size):
                layer = (host.vision_layers if cut.where == "vision" else host.text_layers)[cut.layer]
                changes.set(layer, forward_slot(layer), cut_layer(host, layer, cut, forward_slot(layer), self._running))
        for probe in self._probes:
            probe.insert()
            changes.add(probe.remove)
        for text_layer in host.text_layers:
            changes.add(text_layer.register_forward_pre_hook(self._layer_inputs, with_kwargs=True).remove)

    def _multimodal_forward(self) -> Callable[..., Any]:
        """Stands in for the forward that merges image features and text: here a prefill begins and ends."""
        stock = getattr(self.host.multimodal, forward_slot(self.host.multimodal))
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
        if inputs.get("pixel_values") is None:
            if inputs.get("mm_encoder_outputs"):
                raise InputError("images that are encoded already cannot be pruned; pass pixel_values")
            if is_prefill(inputs):
                self._begin_unpruned(inputs)
            inputs, masks = continue_inputs(self.host, inputs)
            for number, mask in masks.items():
                hook = functools.partial(_with_mask, mask)
                layer = self.host.text_layers[number]
                self._step_changes.add(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            return inputs
        self.thread.record = self._last = None
        self.host.check_call(inputs)
        _check_training(self.host)
        prompts = read_prompts(
            inputs, self.host, labels=call.labels, prompt_length=call.prompt_length, repeats=call.repeats
        )
        prefill = Prefill(self.host, self.method, self.guide_maker, prompts, inputs["input_ids"].device)
        self._prefill, self._owner = prefill, threading.get_ident()
        self._install_prefill()
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
        output = without_guide(output, self.method.plan.guide_layers)
        parts = output if isinstance(output, tuple) else (getattr(output, name, None) for name in CACHE_NAMES)
        features = prefill.finish(next((part for part in parts if isinstance(part, Cache)), None))
        self.thread.record, self.thread.recorded, self._last = prefill, True, prefill
        if not isinstance(output, tuple):
            set_image_features(output, features)
        return output

    def _running(self) -> Prefill | None:
        """The prefill of this thread; other threads may run the layers meanwhile, and pass through.

        Compiled code is the prefill's own, and Dynamo would leave the graph to ask for the thread.
        """
        own = torch.compiler.is_compiling() or self._owner == threading.get_ident()
        return self._prefill if own else None

    def _feature_layer_done(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        prefill = self._running()
        if prefill is not None and prefill.runs("vision"):
            prefill.feature_layer_done(output[0] if isinstance(output, tuple) else output)

    def _layer_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefill = self._running()
        if prefill is not None and prefill.runs("llm"):
            return args, prefill.layer_inputs(args[0], kwargs)
        return None

    def _end_prefill(self) -> None:
        self._prefill = None
        self._step_changes.undo()

    def _see(self, where: str, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        prefill = self._running()
        if prefill is not None and prefill.runs(where):
            prefill.see(where, layer, query, key, value, scale)


def check_unpruned(host: Host) -> None:
    """Raise `AttachError` where a pruner is attached."""
    if MARK in host.model.__dict__:
        raise AttachError("a pruner is attached to this model already; call its detach() first")


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


def _no() -> bool:
    return False


def _with_mask(mask: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": mask}


def _check_devices(host: Host, plan: Plan) -> None:
    """Cuts need the encoder and the cut decoder layers on one device; layers behind them may be anywhere."""
    last = max((cut.layer for cut in plan.cuts if cut.where == "llm"), default=-1)
    devices = {execution_device(m) for m in (host.embedding, *host.vision_layers, *host.text_layers[: last + 1])}
    if len(devices) > 1:
        raise AttachError(
            f"the vision tower and the first {last + 1} decoder layers lie on {sorted(map(str, devices))}; "
            "load the model with a device_map that keeps them together"
        )


def _check_training(host: Host) -> None:
    """Older transformers re-run a layer's hooks when checkpointing recomputes it; those cannot be served."""
    if reruns_hooks(host.text_layers[0]):
        raise AttachError(
            "gradient checkpointing of a pruned model needs transformers 5.23 or newer; "
            "upgrade it or turn gradient checkpointing off"
        )

"""A compressor in the place of a model's projector: what is put in, what is written beside a checkpoint, and out."""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ivtp.compressors.base import Compressor
from ivtp.core.select import on_device
from ivtp.errors import AttachError, ConfigError, InputError, UnsupportedModelError, short_reason
from ivtp.files.checkpoint import check_finite
from ivtp.files.sidecar import COMPRESSOR, COMPRESSOR_WEIGHTS, SIDECAR, sidecar
from ivtp.hosts.base import Host
from ivtp.plan import Compressed
from ivtp.plug.changes import Changes, exclusive
from ivtp.plug.entry import find_host
from ivtp.plug.pruner import check_uncompressed, check_unpruned
from ivtp.prompt.instruction import InstructionReader
from ivtp.registry import compressor_class
from ivtp.stock import ENCODES_AHEAD, encodes_ahead, execution_device, floating_dtype

MARK = "_ivtp_compression"
"""The model's attribute that names its compression."""


class Compression:
    """A compressor in the place of a model's projector, and a processor that writes as many image slots.

    In at `install`, out at `detach`; a context manager that detaches. The compressor is a module like any other, at
    `model.model.multi_modal_projector`: `parameters()`, `train()` and `to()` reach it. A model with one is not copied
    or pickled, and its `save_pretrained` would write the compressor's weights for a stock projector's: `ivtp.save`
    writes both.
    """

    def __init__(self, host: Host, processor: Any, compressor: Compressor) -> None:
        """Raises `ConfigError` for a processor that writes another number of slots than the model has patches."""
        self.host = host
        self.name, self.tokens = compressor.name, compressor.tokens
        self._inside: nn.Module = compressor
        self._attached = False
        self._processor = processor
        self._slots = compressor.tokens - _slots_written(processor, host)
        self._reader = InstructionReader(processor) if compressor.info.reads_question else None
        self._asked = threading.local()
        self._changes = Changes()
        if self._reader is not None:
            compressor.register_forward_pre_hook(_asks(self._asked), with_kwargs=True)

    @property
    def compressor(self) -> Compressor:
        """The module itself; where PEFT trains a copy of it, that copy."""
        multimodal: Any = self.host.multimodal
        holder = multimodal.multi_modal_projector if self._attached else self._inside
        return [module for module in holder.modules() if isinstance(module, Compressor)][-1]

    def __repr__(self) -> str:
        state = "in" if self._attached else "taken out of"
        return f"Compression({self.name}, tokens={self.tokens}, {state} {type(self.host.model).__name__})"

    def __enter__(self) -> Compression:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.detach()

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise AttachError("a model with a compressor cannot be copied or pickled; call detach() first, or ivtp.save")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__deepcopy__(None)

    def install(self) -> None:
        """Put the compressor in. A failure half-way takes it out."""
        with exclusive(self.host.model):
            try:
                self._install()
            except BaseException:
                self._changes.undo()
                raise

    def detach(self) -> None:
        """Put the projector and the processor's slots back; does nothing when they are back already."""
        with exclusive(self.host.model):
            self._changes.undo()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The stock model and processor within the context."""
        with exclusive(self.host.model):
            self._changes.undo()
            try:
                yield
            finally:
                self._install()

    def _install(self) -> None:
        model: Any = self.host.model
        changes = self._changes
        for module in (model, self.host.multimodal):
            changes.set(module, MARK, self)
        self._swap()
        self._processor.num_additional_image_tokens += self._slots
        changes.add(self._give_slots_back)
        if self._reader is not None:
            changes.stand_in(self.host.multimodal, self._asking)
            if encodes_ahead(model):  # the question is with the prompt
                changes.set(model, ENCODES_AHEAD, lambda: False)

    def _swap(self) -> None:
        multimodal: Any = self.host.multimodal
        stock = multimodal.multi_modal_projector
        home = execution_device(stock), floating_dtype(stock)

        def undo() -> None:
            self._inside = multimodal.multi_modal_projector
            here = execution_device(self._inside), floating_dtype(self._inside)
            if here != home:  # the model was moved meanwhile
                stock.to(*here)
            stock.train(self._inside.training)
            multimodal.multi_modal_projector = stock
            self._attached = False

        self._inside.train(stock.training)
        multimodal.multi_modal_projector = self._inside
        self._attached = True
        self._changes.add(undo)

    def _give_slots_back(self) -> None:
        self._processor.num_additional_image_tokens -= self._slots

    # ---- the question ------------------------------------------------------------------------------------------

    def _asking(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Stands in for the forward that merges image features and text: here a prompt's question is known."""
        names = list(inspect.signature(stock).parameters)

        @functools.wraps(stock)
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs.update(zip(names, args, strict=False))
            if kwargs.get(self.host.media[0]) is None:
                return stock(**kwargs)
            self._asked.question = self._questions(kwargs.get("input_ids"), kwargs.get("attention_mask"))
            try:
                return stock(**kwargs)
            finally:
                del self._asked.question

        return forward

    def _questions(self, ids: Tensor | None, mask: Any) -> tuple[Tensor, Tensor]:
        """Of each image of a batch (B, T) the token ids of its prompt's question (I, L), and what is no padding."""
        assert self._reader is not None
        if ids is None:
            raise InputError(f"{self.name} reads the question; pass input_ids instead of inputs_embeds")
        told = isinstance(mask, Tensor) and mask.shape == ids.shape
        valid = mask if told else torch.ones_like(ids)  # of padding at its ends the reader knows that nobody typed it
        found: list[list[int]] = []
        for row, real in zip(ids.tolist(), valid.tolist(), strict=True):
            columns = [c for c, token in enumerate(row) if real[c] and token != self.host.image_token]
            asked = self._reader.read([row[c] for c in columns], columns).columns
            images = row.count(self.host.image_token) // self.tokens
            found += [[row[c] for c in asked]] * images
        longest = max((len(question) for question in found), default=0)
        question = torch.tensor([own + [0] * (longest - len(own)) for own in found], dtype=torch.long)
        read = torch.tensor([[True] * len(own) + [False] * (longest - len(own)) for own in found])
        return on_device(question, ids.device), on_device(read, ids.device)


def _asks(local: threading.local) -> Callable[..., Any]:
    """A hook that hands a compressor what is asked in this thread. A function: PEFT copies modules with their hooks."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        question, asked = getattr(local, "question", (None, None))
        return args, {**kwargs, "question": question, "asked": asked}

    return hook


def compress(model: nn.Module, processor: Any, name: str, *, tokens: int = 64, seed: int = 0) -> Compression:
    """Put the compressor `name` of `ivtp.list_compressors()` in place of the projector of a LLaVA with a CLIP tower.

    It gives `tokens` visual tokens of each image; `processor` then writes as many slots, also for other models.
    Its weights are random, drawn from `seed`, until they are trained or loaded: answers are worthless before. Raises
    `UnsupportedModelError` for any other family (such as LLaVA-NeXT, or a LLaVA with a SigLIP tower),
    `ConfigError`, and `AttachError` where a compressor or a pruner is in already; nothing is changed then.
    """
    host = find_host(model)
    check_unpruned(host)
    check_uncompressed(host)
    if not host.compressible:
        raise UnsupportedModelError(
            f"a compressor stands in for the projector of a LLaVA with a CLIP tower alone, and this model is "
            f"{host.name}; use a LLaVA or LLaVA-1.5"
        )
    stock = host.multimodal.multi_modal_projector
    assert isinstance(stock, nn.Module)
    compressor = compressor_class(name).seeded(host.size, tokens, seed)
    compression = Compression(host, processor, compressor.to(execution_device(stock), floating_dtype(stock)))
    compression.install()
    return compression


def compression_of(model: nn.Module) -> Compression | None:
    """What stands in for the projector of `model`, also where it is wrapped (by PEFT, say); None without one."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found: Iterator[Compression] = (m.__dict__[MARK] for m in modules if MARK in m.__dict__)
    return next(found, None)


# ---- beside a checkpoint ----------------------------------------------------------------------------------------


def read_compression(model: nn.Module, processor: Any, folder: Path) -> None:
    """Put in what the `ivtp.json` of a checkpoint's `folder` names, with its weights; nothing where it names none.

    Raises `LoadError` and `ValueError` for weights that are not there or do not fit, as `read_checkpoint` expects.
    """
    named = Compressed.of(sidecar(folder).get(COMPRESSOR))
    if named is None:
        return
    file = folder / COMPRESSOR_WEIGHTS
    if not file.is_file():
        raise ValueError(f"{COMPRESSOR_WEIGHTS}, the weights of its compressor {named.name}, are missing")
    weights = load_file(file)
    check_finite(weights.items())
    compression = compress(model, processor, named.name, tokens=named.tokens)
    try:
        compression.compressor.load_state_dict(weights)
    except RuntimeError as error:
        compression.detach()
        reason = short_reason(error)
        raise ValueError(f"{COMPRESSOR_WEIGHTS} does not fit its compressor {named.name}: {reason}") from None


def write_compression(compression: Compression | None, folder: Path, beside: dict[str, Any]) -> None:
    """Write `beside` as the `ivtp.json` of a checkpoint's `folder`, with its compressor and that one's weights.

    Without one, nothing of an earlier one is left there.
    """
    before = sidecar(folder)
    content = {key: value for key, value in (beside or before).items() if key != COMPRESSOR}
    if compression is not None:
        content[COMPRESSOR] = {"name": compression.name, "tokens": compression.tokens}
        weights = {name: weight.contiguous() for name, weight in compression.compressor.state_dict().items()}
        save_file(weights, folder / COMPRESSOR_WEIGHTS, metadata={"format": "pt"})
    elif COMPRESSOR in before:
        (folder / COMPRESSOR_WEIGHTS).unlink(missing_ok=True)
    if content != before:
        (folder / SIDECAR).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _slots_written(processor: Any, host: Host) -> int:
    """Image slots that the processor writes for an image. Raises `ConfigError` where the model has other patches."""
    patch, more = (getattr(processor, name, None) for name in ("patch_size", "num_additional_image_tokens"))
    if not isinstance(patch, int) or not isinstance(more, int):
        raise ConfigError(
            f"processor={type(processor).__name__} writes no image slots; pass the model's processor, "
            "ivtp.load(...)[1] or AutoProcessor.from_pretrained(...)"
        )
    crop = processor.image_processor.crop_size
    slots = (crop["height"] // patch) * (crop["width"] // patch) + more
    slots -= processor.vision_feature_select_strategy == "default"
    if slots != host.size.num_patches:
        raise ConfigError(
            f"the processor writes {slots} slots for an image, of which this model makes {host.size.num_patches} "
            "patches; pass the processor of this model, without a compressor's number of slots"
        )
    return int(slots)

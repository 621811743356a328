"""Image and question in, answer and record out."""

from __future__ import annotations

import dataclasses
import math
import numbers
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from ivtp.config import PruneConfig, check_none
from ivtp.errors import ConfigError, ImageError, InputError, LoadError, OutputError, short_reason
from ivtp.files.checkpoint import check_finite, check_weights, read_checkpoint
from ivtp.files.sidecar import MICRO, local_folder, sidecar
from ivtp.guide.familiar import KEY, watching
from ivtp.images import is_sequence, load_image
from ivtp.plug import Pruner, attach, check_unpruned, compression_of, exclusive, find_host
from ivtp.plug.compressing import read_compression, write_compression
from ivtp.prompt.chat import check_template, image_token_of, prompt_writer
from ivtp.prompt.question import check_question
from ivtp.registry import host_class, list_hosts, method_name
from ivtp.trace import Grids, PruneTrace
from ivtp.visualize import draw


@dataclass(frozen=True, repr=False)
class Answer:
    """The answer to one question."""

    text: str
    trace: PruneTrace | None
    """The record of the prefill; None without pruning."""
    seconds: float
    """Wall-clock of `generate` alone: prefill and decoding, not reading the image, attaching or preparing inputs."""
    notes: tuple[str, ...] = ()
    """What the reader of the answer has to know; of a prompt that is longer than the model was made for."""
    question: str = ""
    pictures: tuple[Image.Image, ...] = ()
    """The images as they were shown to the model, upright and in RGB."""
    threshold: float | None = None
    """Relevance above which a word guided; None where none was read."""
    prompt_columns: int = 0
    """Tokens of the prompt, one for each patch of its images."""
    grids: tuple[Grids, ...] = ()
    """What the patches of each image form."""
    tiles: tuple[tuple[int, ...], ...] = ()
    """Of each image, how many tokens of each tile that the encoder read reached the prompt; one tile of most models."""
    windowed: tuple[int | None, ...] = ()
    """Of each image `ivtp.hosts.base.Visual.windowed`."""

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return f"Answer({text!r}, {1000 * self.seconds:.0f} ms, {self.trace or 'all visual tokens'!r})"

    @property
    def record(self) -> PruneTrace:
        """The trace; without pruning one that keeps every patch."""
        if self.trace is not None:
            return self.trace
        patches = tuple(sum(map(math.prod, grids)) for grids in self.grids)
        return PruneTrace(max(patches), (len(patches),), patches=(patches,), grids=(self.grids,))

    def draw(self, file: str | Path | None = None) -> Image.Image:
        """The pictures with what was kept of them, the question, its words' relevances and the answer.

        Also written to `file` where one is named. Raises `ConfigError` for an answer without a trace, and
        `OutputError` where the file cannot be written.
        """
        if self.trace is None:
            raise ConfigError("this answer has no trace: the method was 'none', nothing was pruned")
        return draw(self.pictures, self.trace, file, question=self.question, answer=self.text, threshold=self.threshold)


class Ask(Protocol):
    """What `asking` gives: a question about one image, or several of one prompt, to its answer."""

    def __call__(self, image: Any, question: str, *, streamer: Any = None) -> Answer:
        """`streamer` is transformers' own: it gets the tokens as they come."""


def load(name: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> tuple[nn.Module, Any]:
    """A stock model in evaluation mode and its processor.

    `name` is "micro" (the embedded model), a local folder or a hub id. On the CPU "auto" means float32, elsewhere the
    checkpoint's own dtype. Threads load one after the other. Raises `LoadError`, also for a checkpoint that lacks
    weights which the model has, or whose weights are not finite, or whose chat template cannot be read.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    kind = check_device(device)
    if dtype == "auto" and kind == "cpu":
        dtype = torch.float32

    def read(path: str) -> tuple[nn.Module, Any]:
        processor = AutoProcessor.from_pretrained(path)
        if not hasattr(processor, "image_processor"):  # AutoProcessor hands out a tokenizer where a part cannot be made
            raise ValueError("its processor reads no images here; some need torchvision, which is not part of ivtp")
        check_template(processor)
        model, report = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, output_loading_info=True)
        check_weights(model, report)
        model = model.to(device).eval()
        check_finite(model.named_parameters())
        folder = local_folder(path)
        if folder is not None:
            read_compression(model, processor, folder)
        return model, processor

    path = MICRO if str(name) == "micro" else name
    advice = 'use "micro", a folder with a transformers checkpoint, or a hub id'
    if hub := next((h.hub for h in map(host_class, list_hosts()) if str(name) in h.stock), None):
        advice = f"did you mean {hub.format(name)}, its hub id?"
    return read_checkpoint(path, read, what="model", advice=advice)


def save(model: nn.Module, processor: Any, folder: str | Path) -> None:
    """Write a checkpoint that `load` and `ivtp ask --model` take as it is: model, processor and what lies beside them.

    transformers' own `save_pretrained` writes neither `ivtp.json`, with the recommended options, nor the folder of the
    CLIP text side that it names; they are copied from where the model was loaded. A compressor has a file of its own
    beside the checkpoint, which is the stock one, with the projector that the compressor stands in for. Raises
    `OutputError`.
    """
    any_model: Any = model
    compression = compression_of(model)
    try:
        with compression.aside() if compression else nullcontext():
            any_model.save_pretrained(folder)
            processor.save_pretrained(folder)
    except OSError as error:
        raise OutputError(f"{folder} could not be written ({short_reason(error)}); name another folder") from None
    save_beside(model, local_folder(getattr(model, "name_or_path", None)), Path(folder))


def save_beside(model: nn.Module, source: Path | None, target: Path, more: Mapping[str, Any] | None = None) -> None:
    """Write what lies beside a checkpoint's weights: a compressor's, and what lay beside those of the folder `source`.

    `more` is added to its `ivtp.json`. Raises `OutputError`.
    """
    beside = {**sidecar(source), **(more or {})}
    try:
        write_compression(compression_of(model), target, beside)
        if source is not None and beside and source.resolve() != target.resolve():
            if KEY in beside:
                shutil.copyfile(source / str(beside[KEY]), target / str(beside[KEY]))
            if beside.get("clip"):
                shutil.copytree(source / str(beside["clip"]), target / str(beside["clip"]), dirs_exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target} could not be written ({short_reason(error)}); name another folder") from None


def check_device(device: str) -> str:
    """The kind of `device`, which is known to work from here on."""
    try:
        return torch.empty(0, device=device).device.type
    except (AssertionError, RuntimeError) as error:  # the former from a torch that was built without CUDA
        raise LoadError(
            f"device {device!r} cannot be used ({short_reason(error)}); use cpu, or cuda with a GPU"
        ) from None


def _notes(model: Any, tokens: int) -> tuple[str, ...]:
    """What there is to say about a prompt of so many tokens."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", tokens)
    if tokens <= most:
        return ()
    return (f"the prompt has {tokens} tokens, the model was made for {most}; its answer may be worthless",)


def prompt_for(processor: Any, question: str, *, images: int = 1) -> str:
    """One user turn with images before the question, as the chat template of processor or tokenizer writes it.

    A processor that takes none writes what stands around them itself, when it is called with the prompt. Raises
    `LoadError` without a template that can be rendered, and `InputError` for a question with an image token.
    """
    token = image_token_of(processor)
    if token in question:
        raise InputError(
            f"the question contains {token!r}, which this model reads as the place of a picture; "
            f"write it in another way, for example {token.strip('<|>')!r}"
        )
    return prompt_writer(processor).write([("user", question)], images=images)


def ask(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    *,
    method: str | type[Any] | None = None,
    keep: int | str = 64,
    max_new_tokens: int = 64,
    clip: Any = None,
    **config: Any,
) -> Answer:
    """Answer `question` about `image`, greedily.

    `image` is what `ivtp.images.load_image` takes (a path, bytes, a PIL image, an array, ...), or a list of them, which
    stand before the question in this order. `method="none"` answers with all tokens; None is "ivtp", or "none" for a
    model with a compressor. `config` are further fields of `PruneConfig` or options of the method. The model is left as
    it was; threads that ask one model wait for each other. Many questions are asked faster through `asking`. Raises
    `ImageError`, `ConfigError`, `InputError` for a question that is empty or no text, and what `prompt_for` and
    `attach` raise.
    """
    check_question(question)
    _check_asking(processor, max_new_tokens)
    pictures = _pictures(image)
    prompt_for(processor, question, images=len(pictures))  # what is wrong with it is said before anything is attached
    with asking(
        model, processor, method=method, keep=keep, max_new_tokens=max_new_tokens, clip=clip, **config
    ) as answer:
        return answer(pictures, question)


@contextmanager
def asking(
    model: nn.Module,
    processor: Any,
    *,
    method: str | type[Any] | None = None,
    keep: int | str = 64,
    max_new_tokens: int = 64,
    clip: Any = None,
    **config: Any,
) -> Iterator[Ask]:
    """Attach once and ask many questions: gives a function of image and question, with the meaning of `ask`.

    Other threads that ask or run the model meanwhile wait until the block ends, which leaves the model as it was.
    """
    host = find_host(model)
    if method is None:
        method = "none" if host.size.compressed else "ivtp"
    _check_asking(processor, max_new_tokens)
    with exclusive(host.model), ExitStack() as stack:
        if isinstance(method, str) and method_name(method) == "none":
            check_unpruned(host)
            check_none(PruneConfig.of(method="none", keep=keep, **config))  # the same bad options are refused
            pruner = None
        else:
            pruner = stack.enter_context(attach(model, processor, clip=clip, method=method, keep=keep, **config))

        strange = stack.enter_context(watching(host.model, host.vision.module))

        def answer(image: Any, question: str, *, streamer: Any = None) -> Answer:
            found = _answer(host, model, processor, pruner, _pictures(image), question, max_new_tokens, streamer)
            return dataclasses.replace(found, notes=(*found.notes, *strange()))

        yield answer


def _answer(
    host: Any,
    model: Any,
    processor: Any,
    pruner: Pruner | None,
    pictures: tuple[Image.Image, ...],
    question: str,
    max_new_tokens: int,
    streamer: Any,
) -> Answer:
    """One prompt with its pictures to its answer."""
    check_question(question)
    prompt = prompt_for(processor, question, images=len(pictures))
    inputs = host.process(processor, [prompt], [pictures]).to(model.device, model.dtype)
    began = time.perf_counter()
    (text,) = complete(model, processor, inputs, max_new_tokens, streamer=streamer)
    seconds = time.perf_counter() - began
    trace = pruner.trace if pruner else None
    if trace is not None:
        trace = dataclasses.replace(trace, pictures=pictures)
    columns, visuals = inputs["input_ids"].shape[1], host.visuals(dict(inputs))
    return Answer(
        text,
        trace,
        seconds,
        notes=(*(trace.notes if trace else ()), *_notes(host.model, columns)),
        question=question,
        pictures=pictures,
        threshold=_threshold_of(pruner),
        prompt_columns=columns,
        grids=tuple(visual.grids for visual in visuals),
        tiles=tuple(visual.visible for visual in visuals),
        windowed=tuple(visual.windowed for visual in visuals),
    )


def _threshold_of(pruner: Pruner | None) -> float | None:
    """Relevance above which a word guides; None where no word does."""
    guide = pruner.method.guide_options if pruner else None
    return None if guide is None else guide.threshold


def _pictures(image: Any) -> tuple[Image.Image, ...]:
    """One image or several, read. Raises `ImageError`, also for none."""
    pictures = tuple(load_image(one) for one in (image if is_sequence(image) else (image,)))
    if not pictures:
        raise ImageError("there is no image in the list; pass one at least")
    return pictures


def _check_asking(processor: Any, max_new_tokens: Any) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r} leaves no answer; use a whole number from 1 up")
    if getattr(processor, "image_processor", None) is None:
        raise ConfigError(
            f"processor={type(processor).__name__} reads no images; pass the model's processor, ivtp.load(...)[1] or "
            "AutoProcessor.from_pretrained(...)"
        )


def complete(model: Any, processor: Any, inputs: Any, max_new_tokens: int, streamer: Any = None) -> list[str]:
    """What the model says, greedily, behind each prompt of `inputs` (the processor's, left-padded)."""
    with torch.inference_mode():
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [str(text).strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

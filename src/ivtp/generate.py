"""Image and question in, answer and record out."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from torch import nn

from ivtp.config import PruneConfig
from ivtp.errors import InputError, LoadError, short_reason
from ivtp.files.checkpoint import FAILURES, check_finite, check_weights, read_checkpoint
from ivtp.files.sidecar import MICRO
from ivtp.images import load_image
from ivtp.plug import attach, check_unpruned, exclusive, find_host
from ivtp.prompt.chat import ChatTemplate, image_token_of
from ivtp.trace import PruneTrace


@dataclass(frozen=True)
class Answer:
    """The answer to one question."""

    text: str
    trace: PruneTrace | None
    """The record of the prefill; None without pruning."""
    seconds: float
    """Wall-clock of `generate` alone: prefill and decoding, not reading the image, attaching or preparing inputs."""
    notes: tuple[str, ...] = ()
    """What the reader of the answer has to know; of a prompt that is longer than the model was made for."""


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
        _check_template(processor)
        model, report = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, output_loading_info=True)
        check_weights(model, report)
        model = model.to(device).eval()
        check_finite(model.named_parameters())
        return model, processor

    path = MICRO if str(name) == "micro" else name
    advice = 'use "micro", a folder with a transformers checkpoint, or a hub id'
    return read_checkpoint(path, read, what="model", advice=advice)


def _check_template(processor: Any) -> None:
    """Refuse a chat template that is no template, with a `ValueError`; what it says to a prompt shows there."""
    if getattr(processor, "chat_template", None):
        turn = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        try:
            processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(f"its chat template is broken in line {error.lineno}: {error.message}") from None
        except (TemplateError, *FAILURES):
            return


def check_device(device: str) -> str:
    """The kind of `device`, which is known to work from here on."""
    try:
        return torch.empty(0, device=device).device.type
    except (AssertionError, RuntimeError) as error:  # the former from a torch that was built without CUDA
        raise LoadError(
            f"device {device!r} cannot be used ({short_reason(error)}); use cpu, or cuda with a GPU"
        ) from None


def check_question(question: object) -> None:
    """Refuse what asks nothing. Raises `InputError`."""
    if not isinstance(question, str):
        raise InputError(f"a question is text, not {type(question).__name__}; pass a str")
    if not question.strip():
        raise InputError("the question is empty; ask something about the image")
    if any("\ud800" <= c <= "\udfff" for c in question):
        raise InputError(f"the question {question!r} is no valid Unicode (UTF-8 on a command line); write it anew")


def _notes(model: Any, tokens: int) -> tuple[str, ...]:
    """What there is to say about a prompt of so many tokens."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", tokens)
    if tokens <= most:
        return ()
    return (f"the prompt has {tokens} tokens, the model was made for {most}; its answer may be worthless",)


def prompt_for(processor: Any, question: str, *, images: int = 1) -> str:
    """One user turn with images before the question, as the chat template of processor or tokenizer writes it.

    Raises `LoadError` without a template that can be rendered, and `InputError` for a question with an image token.
    """
    token = image_token_of(processor)
    if token in question:
        raise InputError(
            f"the question contains {token!r}, which this model reads as the place of a picture; "
            f"write it in another way, for example {token.strip('<|>')!r}"
        )
    return ChatTemplate.required(processor).write([("user", question)], images=images)


def ask(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    *,
    method: str | type[Any] = "ivtp",
    keep: int | str = 64,
    max_new_tokens: int = 64,
    clip: Any = None,
    **config: Any,
) -> Answer:
    """Answer `question` about `image` (a path, bytes or a PIL image), greedily.

    `method="none"` answers with all tokens. `config` are further fields of `PruneConfig` or options of the method.
    The model is left as it was; threads that ask one model wait for each other. Raises `ImageError`, `ConfigError`,
    `InputError` for a question that is empty or no text, and what `prompt_for` and `attach` raise.
    """
    check_question(question)
    picture, prompt, host = load_image(image), prompt_for(processor, question), find_host(model)
    with exclusive(host.model), ExitStack() as stack:
        if method == "none":
            check_unpruned(host)
            PruneConfig.of(method=method, keep=keep, **config)  # the same bad options are refused without pruning too
            pruner = None
        else:
            pruner = stack.enter_context(attach(model, processor, clip=clip, method=method, keep=keep, **config))
        any_model: Any = model
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        inputs = inputs.to(any_model.device, any_model.dtype)
        began = time.perf_counter()
        (text,) = complete(model, processor, inputs, max_new_tokens)
        seconds = time.perf_counter() - began
        trace = pruner.trace if pruner else None
        notes = (*(trace.notes if trace else ()), *_notes(host.model, inputs["input_ids"].shape[1]))
        return Answer(text, trace, seconds, notes)


def complete(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """What the model says, greedily, behind each prompt of `inputs` (the processor's, left-padded)."""
    with torch.inference_mode():
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [str(text).strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

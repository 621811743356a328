"""Image and question in, answer and record out."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ivtp.chat import ChatTemplate, image_token_of
from ivtp.config import PruneConfig
from ivtp.errors import InputError, LoadError, short_reason
from ivtp.images import load_image
from ivtp.plug import attach, check_unpruned, exclusive, find_host
from ivtp.sizes import MICRO
from ivtp.trace import PruneTrace


@dataclass(frozen=True)
class Answer:
    """The answer to one question."""

    text: str
    trace: PruneTrace | None
    """The record of the prefill; None without pruning."""
    seconds: float
    """Wall-clock of `generate` alone: prefill and decoding, not reading the image, attaching or preparing inputs."""


def load(name: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> tuple[nn.Module, Any]:
    """A stock model in evaluation mode and its processor.

    `name` is "micro" (the embedded model), a local folder or a hub id. On the CPU "auto" means float32, elsewhere the
    checkpoint's own dtype. Raises `LoadError`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = MICRO if str(name) == "micro" else name
    kind = check_device(device)
    if dtype == "auto" and kind == "cpu":
        dtype = torch.float32
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LoadError(
            f"model {str(name)!r} could not be loaded ({short_reason(error)}); "
            'use "micro", a folder with a transformers checkpoint, or a hub id'
        ) from None
    return model.to(device).eval(), processor


def check_device(device: str) -> str:
    """The kind of `device`, which is known to work from here on."""
    try:
        return torch.empty(0, device=device).device.type
    except (AssertionError, RuntimeError) as error:  # the former from a torch that was built without CUDA
        raise LoadError(
            f"device {device!r} cannot be used ({short_reason(error)}); use cpu, or cuda with a GPU"
        ) from None


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
    The model is left as it was; several threads that ask one model wait for each other. Raises `ImageError`,
    `ConfigError`, and what `prompt_for` and `attach` raise.
    """
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
        return Answer(text, pruner.trace if pruner else None, seconds)


def complete(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """What the model says, greedily, behind each prompt of `inputs` (the processor's, left-padded)."""
    with torch.inference_mode():
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [str(text).strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

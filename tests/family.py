"""A model family as its tests see it: a random stock model, prompts about pictures of several sizes, and `attach`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pytest
import torch
import transformers
from reference import Reference, check_stages, prompt_of
from tiny import clip_side
from torch import Tensor, nn

import ivtp
from ivtp.errors import ConfigError, UnsupportedModelError
from ivtp.hosts.tiny import IMAGE, tiny_images
from ivtp.registry import host_class, method_class

Size = tuple[int, int]
Prompt = tuple[str, tuple[Size, ...]]

METHODS = ("divprune", "fastv", "ivtp", "ivtp+", "sparsevlm", "tome", "topk")
"""One of each kind: by variety, in the decoder, in both with and without CLIP, merging or not, by attention."""
EVERYWHERE = ("divprune", "fastv", "ivtp", "random", "sparsevlm")
"""Methods that ask for nothing that a family may lack."""
KEEP = 8

# A nearly square picture, a tall and a wide one: a family with tiles cuts them into different numbers.
ONE: Prompt = ("What is left of the small red dog?", ((50, 40),))
TWO: Prompt = ("How many bananas are there, near the blue house?!", ((30, 90), (120, 40)))
NONE: Prompt = ("Say something about dogs.", ())
THREE: Prompt = ("Is it a cat", ((84, 84), (200, 60), (40, 50)))
BATCHES: dict[str, tuple[Prompt, ...]] = {
    "one": (ONE,),
    "two images": (TWO,),
    "mixed": (ONE, TWO, NONE, THREE),
}


class Family:
    """What `tiny` of the host gives; every model handed out is a fresh copy."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host = host_class(name)
        self._stock, self.processor = self.host.tiny(seed=1)
        self.image_token = self.host(self._stock).image_token
        """The id in an image's slots."""
        self._counts: dict[tuple[Size, ...], list[int]] = {}

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """A stock model, in evaluation mode, without any hook."""
        model = copy.deepcopy(self._stock).to(dtype)
        try:
            model.set_attn_implementation(attention)
        except ValueError:  # a decoder without that kernel keeps its own
            model.set_attn_implementation({"vision_config": attention})
        return model

    def inputs(self, *prompts: Prompt, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The arguments of one call, padded on the left."""
        made = self.host.tiny_inputs(self._stock, self.processor, prompts)
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in made.items()}

    @property
    def has_stock_processor(self) -> bool:
        """False where the stock one needs torchvision, which a part of it stands in for then."""
        return is_stock(self.processor)

    @cached_property
    def clip(self) -> Any:
        """A CLIP for the family's tower; None where that is no CLIP."""
        vision = self._stock.config.vision_config
        return clip_side(vision) if vision.model_type == "clip_vision_model" else None

    @property
    def everywhere(self) -> tuple[str, ...]:
        """`EVERYWHERE`, without what merges in the encoder where the projector reads several of its tokens each."""
        alone = self.host.geometry(self._stock.config).unit == 1
        return tuple(method for method in EVERYWHERE if alone or method != "ivtp+")

    def options(self, method: str, **changes: Any) -> dict[str, Any]:
        """A few tokens of each image, and of the tests' defaults those that the method reads."""
        kind = method_class(method)
        read = kind.reads | {field.name for field in dataclasses.fields(kind.Options)}
        guide = {} if self.clip is not None else {"guide": "text"}
        stages = {} if "inside" in self.host.cuts else {"stages": "llm"}
        defaults = {"llm_layers": 6, "threshold": 0.06, **guide, **stages}
        return {"method": method, "keep": KEEP, **{k: v for k, v in defaults.items() if k in read}, **changes}

    def attach(self, model: nn.Module, method: str = "ivtp", **changes: Any) -> ivtp.Pruner:
        """A pruner with the tests' defaults; skips the test where the family lacks what the method needs."""
        if method not in self.everywhere and (refusal := self.refusal(model, method)):
            pytest.skip(refusal)
        return ivtp.attach(model, self.processor, clip=self.clip, **self.options(method, **changes))

    def refusal(self, model: nn.Module, method: str) -> str | None:
        """Why the family does not take the method; None where it does."""
        try:
            ivtp.attach(model, self.processor, clip=self.clip, **self.options(method)).detach()
        except (ConfigError, UnsupportedModelError) as error:
            return str(error)
        return None

    def counts(self, sizes: Sequence[Size]) -> list[int]:
        """Visual tokens of the images of these sizes in one prompt: those that are there where all stay."""
        asked = tuple(sizes)
        if asked and asked not in self._counts:
            with torch.no_grad(), self.attach(model := self.model(), "random", keep="100%") as pruner:
                model(**self.inputs(("?", asked)))
            (self._counts[asked],) = map(list, pruner.trace.patches)
        return self._counts.get(asked, [])

    def kept_of_each_image(self, prompt: Prompt, row: Sequence[int]) -> list[list[int]]:
        """`row` of what a trace says was kept, -1 behind its end, image by image; image m counts from those before."""
        images, first = [], 0
        for count in self.counts(prompt[1]):
            images.append([i for i in row if first <= i < first + count])
            first += count
        assert all(-1 <= i < first for i in row), "an index is of no image"
        return images


def is_stock(processor: Any) -> bool:
    """Whether transformers loads it again without torchvision, which some releases want of more classes than others."""
    made = type(processor.image_processor)
    return type(processor).__module__.startswith("transformers.") and getattr(transformers, made.__name__, None) is made


def generated(output: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The new tokens of `generate`."""
    return output[:, inputs["input_ids"].shape[1] :]


def check_kept(
    host: Any,
    model: Any,
    processor: Any,
    reference: Reference,
    prompts: Sequence[Prompt],
    options: dict[str, Any],
    slot: str = IMAGE,
) -> None:
    """A batch of prompts keeps what the reference keeps of each; `slot` is what the processor makes of an image's."""
    expected = []
    for question, sizes in prompts:
        content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        text, images = text.replace(IMAGE, slot), tiny_images(question, sizes)
        expected.append(reference.run(prompt_of(processor, text, question, images, reference.num_patches)))
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        logits = model(**host.tiny_inputs(model, processor, prompts)).logits
    check_stages(pruner.trace, expected)
    for row, result in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-1].double(), result.logits[-1], atol=1e-4, rtol=0)

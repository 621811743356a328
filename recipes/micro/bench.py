"""A model and questions of every format in one process: what choices on the validation split are made with."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Any

from ivtp.generate import complete, load, prompt_for
from ivtp.micro.formats import list_formats
from ivtp.micro.formats.base import Example
from ivtp.plug import Pruner, attach
from recipes.micro.units import Unit, collect

LONGEST_ANSWER = 64  # tokens


class Bench:
    """A model and the questions of every format, each photo drawn once: what `measure` is asked with."""

    def __init__(self, model: str, questions: int, batch: int, dtype: str, split: str = "test") -> None:
        self.model: Any
        self.processor: Any
        self.model, self.processor = load(model, dtype=dtype)
        each = -(-questions // len(list_formats()))
        self.units = sorted((u for group in collect(split, each, even=True) for u in group), key=lambda u: u.form.title)
        self.examples = [example for unit in self.units for example in unit.examples]
        self._batch = batch

    @cached_property
    def batches(self) -> list[Any]:
        """The inputs of all questions."""
        starts = range(0, len(self.examples), self._batch)
        return [self.inputs(self.examples[start : start + self._batch]) for start in starts]

    def inputs(self, examples: list[Example]) -> Any:
        """The model's inputs, left-padded."""
        prompts = [prompt_for(self.processor, example.prompt) for example in examples]
        images = [example.photo.picture() for example in examples]
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def attach(self, method: str | type[Any], keep: int, positions: str, **options: Any) -> Pruner | None:
        """The pruner of a run; none for the full model."""
        if method == "none":
            return None
        return attach(self.model, self.processor, method=method, keep=keep, positions=positions, **options)

    def score(self, pruner: Pruner | None) -> list[tuple[Unit, list[float]]]:
        """Ask all questions, and let the pruner go; how right the answers of every unit are."""
        answers: list[str] = []
        with pruner or nullcontext():
            for inputs in self.batches:
                answers += complete(self.model, self.processor, inputs, LONGEST_ANSWER)
        said = iter(answers)
        return [(unit, [unit.form.score(example, next(said)) for example in unit.examples]) for unit in self.units]

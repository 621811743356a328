"""What every format shares: examples with their references, LLaVA-1.5's answer prompts, and the benchmarks' metrics."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ivtp.micro.world.photo import Photo, take_photo

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCD"
ANNOTATORS = 10


@dataclass(frozen=True)
class Example:
    """One question about a photo: what the user writes, what a right answer is, and what it is about.

    ``answer`` is the text that a model is trained to give; ``references`` are what its answer is compared with (ten
    annotators in the VQA formats); ``objects`` are indices of the scene's objects; ``group`` is the benchmark's own
    division (POPE's sampling, SEED's dimension, MME's task).
    """

    format: str
    photo: Photo
    prompt: str
    answer: str
    objects: tuple[int, ...]
    references: tuple[str, ...]
    group: str = ""


class Format:
    """One benchmark's format. A subclass makes examples from a photo and, where it differs, scores answers."""

    title: ClassVar[str]
    metric: ClassVar[str] = "exact match"

    def photo(self, split: str, index: int) -> Photo:
        """Photo ``index`` of a split, as this format takes them."""
        return take_photo(split, index)

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """Examples that belong together (mostly one) about a photo; none where it offers no clear question."""
        raise NotImplementedError

    def score(self, example: Example, answer: str) -> float:
        """How right an answer is, 0..1."""
        return float(normalise(answer) in map(normalise, example.references))

    def total(self, examples: Sequence[Example], scores: Sequence[float]) -> float:
        """The benchmark's figure, 0..1, from all scores; the mean unless the benchmark has another."""
        return sum(scores) / len(scores)

    def _example(
        self,
        photo: Photo,
        prompt: str,
        answer: str,
        objects: tuple[int, ...],
        *,
        references: tuple[str, ...] = (),
        group: str = "",
    ) -> Example:
        return Example(self.title, photo, prompt, answer, objects, references or (answer,), group)


class ChoiceFormat(Format):
    """Formats whose answer is the letter of an option."""

    metric = "accuracy of the option letter"

    def score(self, example: Example, answer: str) -> float:
        """Whether the letter is right."""
        return float(letter_of(answer) == example.answer)


class VqaFormat(Format):
    """Formats whose answer is compared with those of ten annotators."""

    metric = "VQA accuracy, ten annotators"

    def score(self, example: Example, answer: str) -> float:
        """VQA accuracy."""
        return vqa_score(answer, example.references)


def normalise(answer: str) -> str:
    """Lower case, without surrounding blanks, articles and the final full stop."""
    words = answer.strip().rstrip(".").lower().split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def short(question: str) -> str:
    """The prompt of a question whose answer is a word or a phrase."""
    return f"{question}\n{SHORT}"


@dataclass(frozen=True)
class Choice:
    """A question with lettered options and the letter of the right one."""

    text: str
    answer: str


def lettered(question: str, answer: str, others: Sequence[str], rng: random.Random, request: str = LETTER) -> Choice:
    """The prompt with up to four options in random order; ``others`` are wrong ones to draw from."""
    options = [answer, *rng.sample(list(dict.fromkeys(others)), min(3, len(set(others))))]
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return Choice("\n".join((question, *lines, request)), LETTERS[options.index(answer)])


def mixed_names(answer: str, shown: Sequence[str], names: Sequence[str], rng: random.Random) -> list[str]:
    """Three wrong names, up to two of them of objects that are there, so that seeing one is not enough."""
    visible = sorted(set(shown) - {answer})
    near = rng.sample(visible, min(2, len(visible)))
    far = [name for name in names if name not in shown and name != answer]
    return near + rng.sample(far, 3 - len(near))


def letter_of(answer: str) -> str:
    """The option's letter that an answer names first; empty where it names none."""
    word = answer.strip()[:2].rstrip(".)").upper()
    return word if word in tuple(LETTERS) else ""


def annotate(answer: str, others: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """Ten simulated annotators: most give the answer, one in ten something else of its kind."""
    return tuple(rng.choice(list(others)) if others and rng.random() < 0.1 else answer for _ in range(ANNOTATORS))


def vqa_score(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy: min(matches / 3, 1), averaged over the ten sets of nine annotators."""
    given, said = normalise(answer), [normalise(reference) for reference in references]
    matches = sum(word == given for word in said)
    return sum(min((matches - (word == given)) / 3, 1.0) for word in said) / len(said)


def overlap_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags of phrases."""
    hits = sum((Counter(found) & Counter(wanted)).values())
    return 2 * hits / (len(found) + len(wanted)) if found or wanted else 1.0

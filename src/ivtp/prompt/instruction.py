"""The instruction inside a prompt: its text, its tokens, and what CLIP reads in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivtp.core.characters import Span
from ivtp.errors import ConfigError
from ivtp.prompt.chat import ChatTemplate, Marks
from ivtp.prompt.token_text import TokenText


@dataclass(frozen=True)
class Instruction:
    """The user's text in one prompt: `columns[i]` of the prompt covers the characters `spans[i]` of `text`."""

    text: str
    columns: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class _Mark:
    """Text that a chat template writes between turns, without white space around it.

    `special` are the special tokens in it, by place: typed text that merely looks like them is none.
    """

    text: str = ""
    special: tuple[tuple[int, int], ...] = ()
    apart: bool = False
    """Whether white space, a special token or an image stands before it."""


@dataclass(frozen=True)
class _Spelled:
    """Tokens as text: the characters of each, and the special tokens by place."""

    text: str
    spans: list[Span]
    special: dict[int, int]
    edges: frozenset[int]
    """Places behind special tokens and images."""
    image: int
    """Where the first image stands between the characters."""

    def find(self, mark: _Mark, start: int, stop: int) -> list[int]:
        """Where `mark` stands in the text from `start` to `stop`."""
        places = []
        place = self.text.find(mark.text, start, stop) if mark.text else -1
        while place >= 0:
            if self.stands(mark, place) and (not mark.apart or place in self.edges or self.text[place - 1].isspace()):
                places.append(place)
            place = self.text.find(mark.text, place + 1, stop)
        return places

    def led(self, mark: _Mark, start: int, stop: int) -> list[Span]:
        """The characters of `mark` where it stands in front of a special token, as one that opens an image."""
        spans = [(place, place + len(mark.text)) for place in self.find(mark, start, stop)]
        return [(a, b) for a, b in spans if len(self.text) - len(self.text[b:].lstrip()) in self.special]

    def stands(self, mark: _Mark, place: int) -> bool:
        """Whether the special tokens of `mark` are at `place`, where the text reads like it."""
        return all(self.special.get(place + offset) == token for offset, token in mark.special)

    def ending(self, mark: _Mark, start: int) -> int:
        """Where `mark` stands at the end of the text behind `start`; -1: it does not."""
        place = len(self.text.rstrip()) - len(mark.text)
        found = bool(mark.text) and place >= start and self.text.startswith(mark.text, place)
        return place if found and self.stands(mark, place) else -1


class InstructionReader:
    """Finds what the user typed in the last user turn of token ids, by the chat template of the processor.

    A turn begins where the template's words for it stand behind an answer: a role word inside a question is text.
    What tokens alone cannot tell is read as the template would write it: text that imitates an answer and another
    user turn is both, and so is a role word of the assistant in a prompt that is not open for an answer. Without a
    chat template the whole text is the user's, but for special tokens at its ends and next to images.
    """

    def __init__(self, processor: Any, writes: Sequence[str] = ()) -> None:
        """`writes` is `Host.writes`.

        Raises `ConfigError` where `processor` reads no text, `LoadError` for a template that cannot be rendered.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        if not hasattr(tokenizer, "decode") or not callable(tokenizer):
            raise ConfigError(
                f"{type(processor).__name__} reads no text; pass the model's processor (AutoProcessor) or its tokenizer"
            )
        self._tokens = TokenText(tokenizer)
        template = ChatTemplate.of(processor)
        marks = Marks() if template is None else template.marks()
        self._user = self._mark(marks.user, word=True)
        self._assistant, self._asks = self._mark(marks.assistant), self._mark(marks.asks)
        self._end, self._system = self._mark(marks.end), self._mark(marks.system)
        self._writes = [self._mark(text) for text in writes]

    def read(self, ids: Sequence[int], columns: Sequence[int]) -> Instruction:
        """The instruction in `ids`, the prompt's text tokens without image slots and padding, at `columns`."""
        gaps = [i for i in range(1, len(ids)) if columns[i] != columns[i - 1] + 1]
        spelled = self._spell(ids, gaps)
        start, stop = self._turn(spelled)
        framing = self._framing(ids, gaps)
        # what the template, the tokenizer or the processor wrote around an image is left out of the turn's text
        cuts = [(a, b) for a, b in (spelled.spans[i] for i in framing) if start <= a and b <= stop]
        cuts = sorted(cuts + [span for mark in self._writes for span in spelled.led(mark, start, stop)])

        def moved(place: int) -> int:
            return place - sum(min(b, place) - a for a, b in cuts if a < place)

        text = "".join(spelled.text[a:b] for a, b in _between(cuts, start, stop))
        start = moved(start) + len(text) - len(text.lstrip())
        text = text.strip()
        stop = start + len(text)
        own = set(range(len(ids))).difference(framing)
        spans = {i: (moved(a), moved(b)) for i, (a, b) in enumerate(spelled.spans) if i in own}
        inside = [i for i, (a, b) in spans.items() if a < stop and b > start and a < b and text]
        return Instruction(
            text,
            [columns[i] for i in inside],
            [(max(spans[i][0], start) - start, min(spans[i][1], stop) - start) for i in inside],
        )

    def _turn(self, spelled: _Spelled) -> Span:
        """The characters of the last user turn, white space around it included."""
        start = self._first_turn(spelled)
        stop = spelled.ending(self._asks, start)
        asks = stop >= 0
        stop = stop if asks else len(spelled.text)
        for system in spelled.find(self._system, start, stop)[:1]:
            start = system + len(self._system.text)
        users, answers = (spelled.find(mark, start, stop) for mark in (self._user, self._assistant))
        answer = _behind(answers, start)
        while answer >= 0 and (again := _behind(users, answer + len(self._assistant.text))) >= 0:
            start = again + len(self._user.text)
            answer = _behind(answers, start)
        if not asks:
            end = answer if answer >= 0 else spelled.ending(self._end, start)
            stop = stop if end < 0 else end
        return start, stop

    def _first_turn(self, spelled: _Spelled) -> int:
        """Where the text of the first user turn begins; 0 where no role word opens it."""
        users = spelled.find(self._user, 0, len(spelled.text))
        led = [place for place in users if place < spelled.image]
        if not self._assistant.text:  # nothing tells a turn from a role word inside it
            first = users[-1:]
        elif led and not spelled.find(self._assistant, 0, spelled.image):
            first = led[-1:]  # templates write a picture next to the role word; before, a system prompt may name it
        else:
            first = users[:1]
        return first[0] + len(self._user.text) if first else 0

    def _spell(self, ids: Sequence[int], gaps: Sequence[int] = ()) -> _Spelled:
        text, spans = self._tokens.read(ids, frozenset(gaps))
        special = {spans[i][0]: token for i, token in enumerate(ids) if token in self._tokens.special}
        ends = [spans[i][1] for i, token in enumerate(ids) if token in self._tokens.special]
        images = [spans[i][0] for i in gaps]
        return _Spelled(text, spans, special, frozenset([0, *ends, *images]), images[0] if images else 0)

    def _framing(self, ids: Sequence[int], gaps: Sequence[int]) -> list[int]:
        """Special tokens at either end of the prompt and next to images; nobody typed them."""
        found = set()
        for place in (0, *gaps, len(ids)):
            for places in (range(place - 1, -1, -1), range(place, len(ids))):
                for i in places:
                    if ids[i] not in self._tokens.special:
                        break
                    found.add(i)
        return sorted(found)

    def _mark(self, text: str, *, word: bool = False) -> _Mark:
        """What a template writes, as tokens spell it: some tokenizers lower-case, or normalise characters."""
        spelled = self._spell(self._tokens.encode(text.strip()))
        lead = len(spelled.text) - len(spelled.text.lstrip())
        special = tuple((place - lead, token) for place, token in spelled.special.items())
        mark = spelled.text.strip()
        return _Mark(mark, special, apart=text[:1].isspace() or (word and mark[:1].isalnum()))


def _behind(places: Sequence[int], start: int) -> int:
    """The first of the ordered `places` from `start` on; -1: none."""
    return next((place for place in places if place >= start), -1)


def _between(cuts: Sequence[Span], start: int, stop: int) -> list[Span]:
    """What is left of `start` to `stop` without the ordered `cuts` in it."""
    places = [start, *(place for cut in cuts for place in cut), stop]
    return list(zip(places[::2], places[1::2], strict=True))

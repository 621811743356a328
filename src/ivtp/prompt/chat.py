"""Chat templates: the prompts that they write, and what they write around a user's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from ivtp.errors import LoadError, short_reason
from ivtp.registry import host_classes

Turn = tuple[str, str]
"""A role and what it says."""
Message = tuple[str, Sequence[str | None]]
"""A role and its parts in their order: texts, and None in the place of each image."""

_QUESTION, _ANSWER, _NEXT, _LAST = "first-question-here", "first-answer-here", "next-question-here", "last-answer-here"
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template raises over messages that it does not expect."""
_ADVICE = "give the processor or its tokenizer the chat_template of the checkpoint"


@dataclass(frozen=True)
class Marks:
    """What stands around the user's text in a prompt; empty where the template writes nothing there."""

    user: str = ""
    """Opens a user's turn, the first as any later one."""
    assistant: str = ""
    """Closes the user's turn and opens the answer."""
    asks: str = ""
    """Ends a prompt that waits for an answer, and no other prompt; empty: nothing tells."""
    end: str = ""
    """Ends a prompt that ends in a user's turn and does not ask."""
    system: str = ""
    """Closes a system prompt that is written inside the first user turn."""


class ChatTemplate:
    """The chat template of a processor or of its tokenizer, whatever form of messages it takes."""

    def __init__(self, owner: Any, image_token: str) -> None:
        """`owner` has the template. Raises `LoadError` where it cannot be rendered."""
        self._owner = owner
        self._image_token = image_token
        self._content = self._find_form()

    @classmethod
    def required(cls, processor: Any) -> ChatTemplate:
        """Like `of`, but without one it raises `LoadError`."""
        template = cls.of(processor)
        if template is None:
            raise LoadError(f"{type(processor).__name__} has no chat template; {_ADVICE}")
        return template

    @classmethod
    def of(cls, processor: Any) -> ChatTemplate | None:
        """The template of `processor`, or else of its tokenizer; None without one."""
        for owner in (processor, getattr(processor, "tokenizer", None)):
            if getattr(owner, "chat_template", None):
                return cls(owner, image_token_of(processor))
        return None

    def write(self, turns: Sequence[Turn], *, images: int = 0, asks: bool = True) -> str:
        """A conversation with `images` before the first text; `asks`: the assistant's next turn is opened.

        Raises `LoadError` where the template refuses it.
        """
        return self._render(turns, self._content, images, asks)

    def write_messages(self, messages: Sequence[Message], *, asks: bool = True) -> str:
        """A conversation of (role, parts), where a part is a text, or None in the place of an image.

        Raises `LoadError` where the template refuses it.
        """
        return self._render_messages([(role, self._of_parts(parts)) for role, parts in messages], asks)

    def _of_parts(self, parts: Sequence[str | None]) -> Any:
        """The content of a message in the form that the template takes."""
        if self._content == self._parts:
            return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        plain = "".join(f"{self._image_token}\n" if part is None else part for part in parts)
        return self._content(plain, 0)

    def marks(self) -> Marks:
        """What the template writes between the turns of a conversation."""
        turns = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT), ("assistant", _LAST)]
        try:
            whole = _around(self.write(turns, asks=False), _QUESTION, _ANSWER, _NEXT, _LAST)
            asked = _around(self.write(turns[:3]), _NEXT)
            ended = _around(self.write(turns[:3], asks=False), _NEXT)
        except LoadError:
            whole = []
        if not whole or not asked or not ended:
            return self._marks_of_one_turn()
        head, answer, again, _, last = whole
        asks, end = asked[1], ended[1]
        tells = bool(asks.strip()) and asks.strip() != last.strip()
        opened = _common_start(answer, asks) if tells else ""
        user = _common_start(head[::-1], again[::-1])[::-1]
        return Marks(
            user=user if _has_letters(user) else again,
            assistant=opened if _has_letters(opened) else answer,
            asks=asks if tells else "",
            end=end,
            system=self._behind_system(user),
        )

    def _marks_of_one_turn(self) -> Marks:
        """Of a template that takes no conversation: the role word next to the text, and what follows."""
        head, asks = _around(self.write([("user", _QUESTION)]), _QUESTION)
        lines = head.strip().splitlines() or [""]
        return Marks(user=lines[-1], assistant=asks, asks=asks, end="", system="")

    def _behind_system(self, user: str) -> str:
        try:
            parts = _around(self.write([("system", _ANSWER), ("user", _QUESTION)]), _ANSWER, _QUESTION)
        except LoadError:
            return ""
        return parts[1] if parts and user.strip() and user.strip() not in parts[1] else ""

    def _find_form(self) -> Callable[[str, int], Any]:
        """The first form of content, from the usual one on, whose text and images the template writes."""
        refusal = f"the chat template of {type(self._owner).__name__} writes no text or no image of a user; {_ADVICE}"
        for form in (self._parts, self._parts_with_token, self._plain):
            try:
                written, without = (self._render([("user", _QUESTION)], form, images, True) for images in (1, 0))
            except LoadError as error:
                refusal = str(error)
                continue
            if _is_plain(without) and written != without:
                return form
        raise LoadError(refusal)

    def _render(self, turns: Sequence[Turn], form: Callable[[str, int], Any], images: int, asks: bool) -> str:
        contents = []
        for role, text in turns:
            contents.append((role, form(text, images if role == "user" else 0)))
            images = 0 if role == "user" else images
        return self._render_messages(contents, asks)

    def _render_messages(self, contents: Sequence[tuple[str, Any]], asks: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in contents]
        try:
            return str(self._owner.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False))
        except _REFUSALS as error:
            name, reason = type(self._owner).__name__, short_reason(error)
            raise LoadError(f"the chat template of {name} cannot be rendered ({reason}); {_ADVICE}") from None

    def _parts(self, text: str, images: int) -> list[dict[str, str]]:
        return [{"type": "image"}] * images + [{"type": "text", "text": text}]

    def _parts_with_token(self, text: str, images: int) -> list[dict[str, str]]:
        return [{"type": "text", "text": self._plain(text, images)}]

    def _plain(self, text: str, images: int) -> str:
        return f"{self._image_token}\n" * images + text


class OneQuestion:
    """Stands in for a template where the processor itself writes what stands around images and a question."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def write(self, turns: Sequence[Turn], *, images: int = 0, asks: bool = True) -> str:
        """The only turn of `turns`, behind `images`. Raises `LoadError` for a conversation."""
        return self.write_messages([(role, [*[None] * images, text]) for role, text in turns], asks=asks)

    def write_messages(self, messages: Sequence[Message], *, asks: bool = True) -> str:
        """The only message, its images in front of its texts. Raises `LoadError` for a conversation."""
        if [role for role, _ in messages] != ["user"] or not asks:
            raise LoadError(f"{type(self._processor).__name__} writes one question of a user alone; ask that by itself")
        parts = messages[0][1]
        return image_token_of(self._processor) * parts.count(None) + "".join(filter(None, parts))


def prompt_writer(processor: Any) -> ChatTemplate | OneQuestion:
    """What writes questions for `processor`: its chat template, or what takes its place. Raises `LoadError`."""
    template = ChatTemplate.of(processor)
    kinds = {kind.__name__ for kind in type(processor).__mro__}
    if template is None and kinds & {host.writes_prompts for host in host_classes().values()}:
        return OneQuestion(processor)
    return template or ChatTemplate.required(processor)


def check_template(processor: Any) -> None:
    """Refuse a chat template that is no template, with a `ValueError`; what a good one refuses to write shows later."""
    if getattr(processor, "chat_template", None):
        turn = [{"role": "user", "content": [{"type": "text", "text": _QUESTION}]}]
        try:
            processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(f"its chat template is broken in line {error.lineno}: {error.message}") from None
        except _REFUSALS:
            return


def image_token_of(processor: Any) -> str:
    """What stands for a picture in a prompt's text."""
    return str(getattr(processor, "image_token", None) or "<image>")


def _around(text: str, *texts: str) -> list[str]:
    """What is written around `texts`, which follow each other in `text`; empty where one of them is missing."""
    found = []
    for part in texts:
        before, there, text = text.partition(part)
        if not there:
            return []
        found.append(before)
    return [*found, text]


def _is_plain(written: str) -> bool:
    """Whether a template wrote the text of a message, and not the Python list that holds it."""
    return _QUESTION in written and f"'text': '{_QUESTION}'" not in written and f'"text": "{_QUESTION}"' not in written


def _common_start(one: str, other: str) -> str:
    return one[
        : next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


def _has_letters(text: str) -> bool:
    return any(character.isalnum() for character in text)

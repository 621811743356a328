"""What a question has to be, whatever reads it."""

from __future__ import annotations

from ivtp.errors import InputError


def check_question(question: object) -> None:
    """Refuse what asks nothing. Raises `InputError`."""
    if not isinstance(question, str):
        raise InputError(f"a question is text, not {type(question).__name__}; pass a str")
    if not question.strip():
        raise InputError("the question is empty; ask something about the image")
    if any("\ud800" <= c <= "\udfff" for c in question):
        raise InputError(f"the question {question!r} is no valid Unicode (UTF-8 on a command line); write it anew")

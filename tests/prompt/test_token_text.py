"""Characters that a tokenizer cuts into several tokens: nothing of what the user typed is lost or moved."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vocabularies import IMAGE, TOKENIZERS, added_spaces, byte_level, random_texts

from ivtp.core.characters import lay_out, letters, widened
from ivtp.core.relevance import words
from ivtp.prompt.instruction import Instruction, InstructionReader
from ivtp.prompt.token_text import TokenText

PATCHES = 9
Span = tuple[int, int]


def prompt_of(question: str) -> str:
    return f"USER: {IMAGE}\n{question} ASSISTANT:"


def cut_out(tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Ids and columns of a prompt's text, as a prefill hands them to the reader."""
    ids = tokenizer(prompt.replace(IMAGE, IMAGE * PATCHES))["input_ids"]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    columns = [i for i, token in enumerate(ids) if token != image]
    return [ids[i] for i in columns], columns


def read(tokenizer: Any, prompt: str) -> Instruction:
    return InstructionReader(tokenizer).read(*cut_out(tokenizer, prompt))


def bytes_of(tokenizer: Any, token: int) -> bytes:
    """What one token stands for, by the two vocabularies of these tests."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name in tokenizer.all_special_tokens:
        return str(name).encode()
    if tokenizer is not byte_level():
        if re.fullmatch("<0x..>", name):
            return bytes([int(name[3:5], 16)])
        return str(name).replace("\u2581", " ").encode()
    signs = {}
    rest = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            signs[chr(byte)] = byte
        else:
            signs[chr(256 + rest)] = byte
            rest += 1
    return bytes(signs[sign] for sign in name)


def laid_over(tokenizer: Any, prompt: str) -> dict[int, Span]:
    """The slow way: walk the token bytes along the bytes of the prompt as it was typed. Column: its characters."""
    typed = prompt.replace(IMAGE, IMAGE * PATCHES)
    character = [i for i, c in enumerate(typed) for _ in c.encode()]
    data, place, spans = typed.encode(), 0, {}
    for column, token in enumerate(tokenizer(typed)["input_ids"]):
        piece = bytes_of(tokenizer, token)
        if column == 0:
            before = token
            continue  # nobody typed the begin
        if not data.startswith(piece, place):
            assert bytes_of(tokenizer, before).startswith(b"<")  # nobody typed the space behind a special token
            piece = piece.removeprefix(b" ")
        assert data.startswith(piece, place)
        if piece:
            spans[column] = character[place], character[place + len(piece) - 1] + 1
        place, before = place + len(piece), token
    assert place == len(data)
    return spans


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_random_texts_of_many_scripts(kind: str) -> None:
    """The text is what was typed, and every token of a character carries it."""
    tokenizer, straddling, cut = TOKENIZERS[kind](), 0, 0
    reader = InstructionReader(tokenizer)
    for question in random_texts(200):
        prompt = prompt_of(question)
        first = len(prompt.replace(IMAGE, IMAGE * PATCHES)) - len(question) - len(" ASSISTANT:")
        last = first + len(question)
        expected = {
            column: (max(a, first) - first, min(b, last) - first)
            for column, (a, b) in laid_over(tokenizer, prompt).items()
            if a < last and b > first
        }
        found = reader.read(*cut_out(tokenizer, prompt))
        assert found.text == question
        assert dict(zip(found.columns, found.spans, strict=True)) == expected
        spans = found.spans
        cut += sum(a == b for a, b in pairwise(spans))
        straddling += sum(a[1] > b[0] for a, b in pairwise(spans) if a != b)
    assert cut > 1000
    assert straddling > 100 or kind != "byte level"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "question",
    [
        "\ufffd",
        "what is \ufffd\ufffd here?",
        "a\x00b",
        "\x00",
        "</s>",
        "What does </s> mean?",
        "<s>bold</s> <pad>",
        "x™",
        "👩\u200d👧",
        "a\u00a0b\u3000c",
    ],
)
def test_odd_texts(kind: str, question: str) -> None:
    """Broken characters, NUL and the names of special tokens are text where the user typed them."""
    found = read(TOKENIZERS[kind](), prompt_of(question))
    assert found.text == question
    assert {c for a, b in found.spans for c in range(a, b)} == set(range(len(question)))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_window_that_begins_inside_a_character(kind: str) -> None:
    """A prompt that was truncated on the left: whole characters stay, the rest of a cut one is nothing."""
    tokenizer = TOKENIZERS[kind]()
    ids, columns = cut_out(tokenizer, prompt_of("dog 左𪚥龍"))
    inside = next(i for i in range(len(ids)) if "𪚥".encode()[:1] in bytes_of(tokenizer, ids[i])) + 1
    found = InstructionReader(tokenizer).read(ids[inside:], columns[inside:])
    assert found.text == "龍"
    assert found.spans == [(0, 1)] * len(found.spans)


@pytest.mark.parametrize("question", ["What does </s> mean?", "</s>mean 字", "a </s>  b", "plain 左边"])
def test_spaces_that_a_tokenizer_adds_behind_special_tokens(question: str) -> None:
    assert read(added_spaces(), prompt_of(question)).text == question


class Letters:
    """A tokenizer that shows no bytes: one token for each third of a letter's three bytes."""

    all_special_ids: tuple[int, ...] = ()
    chat_template = None

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode(errors="replace")

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_a_tokenizer_that_only_decodes() -> None:
    """Tokens are collected until their character is whole."""
    text = "ab 左边 😀™\ufffdx"
    ids = list(text.encode())
    found, spans = TokenText(Letters()).read(ids)
    assert found == text
    assert spans[3:6] == [(3, 4)] * 3
    assert spans[10:14] == [(6, 7)] * 4
    cut, _ = TokenText(Letters()).read(ids[:5])
    assert cut == "ab "


def test_a_vocabulary_of_whole_words() -> None:
    """Its spelling is not known from the names; the tokenizer's own offsets tell."""
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "dog": 1, "##s": 2, "?": 3, "the": 4}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    ids = tokenizer("the dogs")["input_ids"]
    text, spans = TokenText(tokenizer).read(ids)
    assert [text[a:b].strip() for a, b in spans] == ["the", "dog", "s"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_long_question_is_read_without_decoding_token_by_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[kind]()
    reader, (ids, columns) = InstructionReader(tokenizer), cut_out(tokenizer, prompt_of("左边的dog 😀 " * 400))
    calls: list[object] = []
    monkeypatch.setattr(type(tokenizer), "decode", lambda *args, **_: calls.append(args))
    found = reader.read(ids, columns)
    assert len(found.columns) > 2000
    assert not calls


def test_bytes_of_no_character_spell_nothing() -> None:
    assert lay_out([b"\x80a", b"\xe5\xb7", b"\xa6b\xe5", b"c"]) == ("a左bc", [(0, 1), (1, 2), (1, 3), (3, 4)])


def test_letters_of_the_composed_text() -> None:
    text = "e\u0301te 한\u1112\u1161\u11ab \u0301x"
    assert [text[a:b] for a, b in letters(text)] == [
        "e\u0301", "t", "e", " ", "한", "\u1112\u1161\u11ab", " ", "\u0301", "x",
    ]  # fmt: skip
    assert [text[a:b] for a, b in words(text)] == ["e\u0301te", "한", "\u1112\u1161\u11ab", "\u0301", "x"]
    assert widened([(0, 1), (2, 3), (6, 7), (7, 8)], text) == [(0, 2), (2, 3), (6, 9), (6, 9)]

"""Offsets of tokens whose text does not encode to the same ids again."""

from __future__ import annotations

from ivtp.instruction import InstructionReader


class Pieces:
    """A tokenizer that merges greedily, so that a text never gives single letters back."""

    is_fast = True
    all_special_ids = (0,)
    texts = ("<s>", "USER:", " ASSISTANT:", " d", "o", "g", "?", "")

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.texts[i] for i in ids)

    def __call__(self, text: str, **_: object) -> dict[str, list[object]]:
        return {"input_ids": [99], "offset_mapping": [(0, len(text))]}


class Processor:
    tokenizer = Pieces()
    chat_template = "yes"

    def apply_chat_template(self, turns: list[dict[str, object]], **_: object) -> str:
        content = turns[0]["content"]
        assert isinstance(content, list)
        return f"A chat.\nUSER: {content[0]['text']} ASSISTANT:"


def test_offsets_by_decoding() -> None:
    found = InstructionReader(Processor()).read([0, 1, 3, 4, 5, 6, 7, 2], list(range(10, 18)))
    assert found.text == "dog?"
    assert found.columns[:4] == [12, 13, 14, 15]
    assert found.spans[:4] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_without_role_words_the_whole_text_counts() -> None:
    found = InstructionReader(Pieces()).read([0, 3, 4, 5], [0, 1, 2, 3])
    assert found.text == "dog"
    assert found.columns == [1, 2, 3]

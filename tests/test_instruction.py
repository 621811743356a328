"""Offsets of tokens whose text does not encode to the same ids again."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ivtp.instruction import InstructionReader


class Pieces:
    """A tokenizer that merges greedily, so that a text never gives single letters back."""

    is_fast = True
    all_special_ids = (0,)
    texts = ("<s>", "USER:", " ASSISTANT:", " d", "o", "g", "?", "")

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.texts[i] for i in ids)

    def __call__(self, text: str, **_: object) -> dict[str, list[object]]:
        known: dict[str, list[object]] = {"USER:": [1], "ASSISTANT:": [2]}
        return {"input_ids": known.get(text, [99]), "offset_mapping": [(0, len(text))]}


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


def test_role_words_of_a_lower_casing_tokenizer() -> None:
    model = Tokenizer(models.BPE())
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        ["user: where is the dog? assistant:"] * 9, trainers.BpeTrainer(initial_alphabet=alphabet)
    )
    processor = Processor()
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)  # type: ignore[assignment]
    ids = processor.tokenizer("A chat.\nUSER: Where is the dog? ASSISTANT:")["input_ids"]
    found = InstructionReader(processor).read(ids, list(range(len(ids))))
    assert found.text == "where is the dog?"

"""Tokenizers of the two kinds that cut characters into bytes, trained on the spot, and random texts of many scripts."""

from __future__ import annotations

import json
import random
import unicodedata
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CORPUS = [
    "USER: What is left of the small red dog? ASSISTANT: the blue house, 左边 a naïve café.",
    "图中有什么？这是一只狗。的一是不了 的一的一 图图图中中中",
    "이것은 무엇입니까 강아지 집 😀😀😀👍 हिन्दी क्या है ما هذا อะไร",
] * 20

SCRIPTS = {
    "latin": "abcXYZ éèüñçøßłžőı ﬁ Ω",
    "marked": "e\u0301 a\u0300 o\u0302\u0323 n\u0303",
    "chinese": "图中有什么这是一只狗的左边𠀀𪚥龍",
    "japanese": "これは何ですかカタカナ犬ｶﾞ々",
    "korean": "이것은무엇입니까강아지집",
    "jamo": unicodedata.normalize("NFD", "한국어강아지"),
    "arabic": "ماهذافيالصورةِّ",
    "devanagari": "यह क्या है नमस्ते क़",
    "thai": "นี่คืออะไรในรูปภาพ",
    "emoji": "😀🐶🏠👍🏽👩\u200d👧\u200d👦🏳️\u200d🌈❤️🇩🇪",
    "signs": "™©®°±²½∑∫√∞≠≤∂𝒳𝔸→\ufffd\x00€",
    "plain": "What is the dog, left of it? 3.14 (x_2) 'q' <s >",
}


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of one to five runs of one script each, with and without spaces between."""
    draw, texts = random.Random(seed), []
    while len(texts) < count:
        runs = [
            "".join(draw.choices(SCRIPTS[draw.choice(list(SCRIPTS))], k=draw.randint(1, 12)))
            for _ in range(draw.randint(1, 5))
        ]
        text = draw.choice(["", " ", "  "]).join(runs).strip()
        if text:
            texts.append(text)
    return texts


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Like LLaMA's: SentencePiece pieces, spaces as part of them, and a token for every byte."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    alphabet = sorted({c for c in "".join(_CORPUS) if c < "\u0250"} | {"的", "一", "图", "。"})
    kept = [line for line in _CORPUS if line.startswith("USER")] + ["的一 图。"] * 3
    raw.train_from_iterator(kept, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", "<pad>", IMAGE, *(f"<0x{b:02X}>" for b in range(256)), *model["vocab"]]
    raw = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(dict.fromkeys(names))},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(raw)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Like those of GPT-2, Llama 3 and Qwen: merges of bytes, also across characters."""
    raw = Tokenizer(models.BPE())
    # a line break takes the spaces before it along, so that "USER: <image>\n" without its image is cut in another way
    lines = pre_tokenizers.Split(Regex(r"\s*\n+|\s?\p{L}+|\s?[^\s\p{L}]+|\s+"), behavior="isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([lines, bytes_alone])
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [*_CORPUS, *["what: \nis"] * 20],
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", "<s>", "</s>", "<pad>", IMAGE],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrapped(raw)


@cache
def added_spaces() -> PreTrainedTokenizerFast:
    """The same vocabulary behind LLaMA's older normaliser: a space before every text that a special token ends."""
    raw = Tokenizer.from_str(byte_fallback().backend_tokenizer.to_str())
    raw.pre_tokenizer = None  # type: ignore[assignment]
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _wrapped(raw)


TOKENIZERS = {"byte fallback": byte_fallback, "added spaces": added_spaces, "byte level": byte_level}


def _wrapped(raw: Tokenizer) -> PreTrainedTokenizerFast:
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE},
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer

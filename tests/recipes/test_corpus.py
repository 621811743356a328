"""The corpus, and the tokenizers that are trained on it: every word of the world is one token, Chinese ones too."""

from __future__ import annotations

import random
import re

import pytest
from transformers import PreTrainedTokenizerBase

from ivtp.micro import world
from ivtp.micro.tokenizer import build_tokenizer
from ivtp.micro.world.chinese import CHINESE_WORDS
from ivtp.micro.world.photo import take_photo
from recipes.micro.corpus import corpus
from recipes.micro.tasks import TASKS, ask_task
from recipes.micro.vision_model import build_tokenizer as build_clip_tokenizer


@pytest.fixture(scope="module", params=["language model", "clip"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return build_tokenizer(corpus()) if request.param == "language model" else build_clip_tokenizer()


def test_it_holds_every_word_of_every_task() -> None:
    known = {word for line in corpus() for word in re.findall(r"[^\W一-鿿]+", line.lower())}
    for index in range(100):
        photo = take_photo("test", index, bad=index % 8 == 0)
        for task in TASKS:
            for question in ask_task(photo, random.Random(index), task):
                assert set(re.findall(r"[^\W一-鿿]+", f"{question.text} {question.answer}".lower())) <= known
    assert known >= {*world.NAMES, *world.COLOURS, *world.SIGN_TEXTS}


def test_every_chinese_word_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    for word in CHINESE_WORDS:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    ids = tokenizer("图中有多少个熊猫？", add_special_tokens=False).input_ids
    assert len(ids) == 5  # in the picture, there are, how many, panda, question mark
    assert tokenizer("熊猫", add_special_tokens=False).input_ids[0] in ids
    assert tokenizer("龘", add_special_tokens=False).input_ids  # any other text is still taken

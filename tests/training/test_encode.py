"""Labels lie on the assistant's turns alone, token for token, behind the very prompt that inference would send."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import Tiny

import ivtp
from ivtp.errors import ImageError, InputError, LoadError
from ivtp.plug import find_host
from ivtp.registry import host_class, list_hosts
from ivtp.training.encode import IGNORED, Conversations, Encoder, spread
from ivtp.training.records import Record, Turn

END_MARKS = (
    "{% for message in messages %}<s>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A template that ends turns with a special token of its own, as ChatML does."""


def record(*texts: str, images: int = 1) -> Record:
    turns = [Turn("assistant" if i % 2 else "user", text, images if i == 0 else 0) for i, text in enumerate(texts)]
    return Record("record 0", (Path("a.png"),) * images, tuple(turns))


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (50, 40), (90 * i, 80, 20)) for i in range(count)]


def encoder_of(processor: Any, model: Any, **changes: Any) -> Encoder:
    host = find_host(model)
    return Encoder(processor, host.media, process=host.process, **{"plain": False, "max_length": 4096, **changes})


def checked(encoder: Encoder, processor: Any, one: Record) -> None:
    """Against the prompt of inference, and the answer tokenized where it stands."""
    shown = pictures(len(one.images))
    batch = encoder([(one, shown)])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    prompt = ivtp.prompt_for(processor, one.turns[0].text, images=len(one.images))
    asked = processor(images=[shown] if shown else None, text=[prompt], return_tensors="pt")["input_ids"][0]
    end = processor.tokenizer.eos_token_id
    assert ids[: len(asked)].tolist() == asked.tolist()
    assert (labels[: len(asked)] == IGNORED).all()
    answer = labels[len(asked) :].tolist()
    assert answer == ids[len(asked) :].tolist()
    assert answer[-1] == end
    assert end not in answer[:-1]
    assert processor.tokenizer.decode(answer[:-1]).strip() == one.turns[1].text


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("host", list_hosts())
def test_a_turn_is_learned_behind_the_prompt_of_inference(host: str, images: int) -> None:
    model, processor = host_class(host).tiny()
    if host_class(host).writes_prompts:
        with pytest.raises(LoadError, match="no chat template"):
            encoder_of(processor, model)
        return
    for text in ("A house, near the 2 dogs.", "5", "Yes"):
        checked(encoder_of(processor, model), processor, record("What is left of it?", text, images=images))


@pytest.mark.parametrize("host", [name for name in list_hosts() if not host_class(name).writes_prompts])
def test_a_batch_may_have_records_without_images(host: str) -> None:
    model, processor = host_class(host).tiny()
    encoder = encoder_of(processor, model)
    shown = [(record("What is it?", "A dog.", images=count), pictures(count)) for count in (1, 0, 2)]
    batch = encoder(shown)
    for row, one in enumerate(shown):
        alone = encoder([one])["input_ids"][0]
        assert batch["input_ids"][row, batch["attention_mask"][row].bool()].tolist() == alone.tolist()


def test_the_embedded_model_too() -> None:
    model, processor = ivtp.load("micro")
    checked(encoder_of(processor, model), processor, record("What is left of the dog?", "5 blue houses"))


@pytest.mark.parametrize("template", [None, END_MARKS], ids=["no end", "end marks"])
def test_every_answer_of_a_conversation_is_learned_and_nothing_else(tiny: Tiny, template: str | None) -> None:
    processor = copy.deepcopy(tiny.processor)
    if template:
        processor.chat_template = template
    one = record("Why?", "Because.", "Is it a cat?", "Because. It is", "And?", "Because.")
    batch = encoder_of(processor, tiny.model())([(one, pictures(1))])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learned = labels != IGNORED
    assert (labels[learned] == ids[learned]).all()
    starts = (learned & ~learned.roll(1)).nonzero().flatten().tolist()
    stops = (learned & ~learned.roll(-1)).nonzero().flatten().tolist()
    said = [processor.tokenizer.decode(ids[a : b + 1]).strip() for a, b in zip(starts, stops, strict=True)]
    assert said == ["Because.</s>", "Because. It is</s>", "Because.</s>"]
    messages = [{"role": t.role, "content": [{"type": "text", "text": t.text}]} for t in one.turns]
    messages[0]["content"].insert(0, {"type": "image"})
    for number, start in zip((1, 3, 5), starts, strict=True):
        asked = processor.apply_chat_template(messages[:number], add_generation_prompt=True, tokenize=False)
        before = processor.tokenizer.decode(ids[:start])
        # inference has no end marks between turns where the template writes none
        assert (
            before.replace("</s>", "")
            .removeprefix("<s>")
            .replace("<image>" * 36, "<image>")
            .endswith(asked.replace("</s>", "").removeprefix("<s>"))
        )


def test_pretraining_reads_the_caption_alone(tiny: Tiny) -> None:
    one = record("Describe it.", "A red house by the sea.")
    batch = encoder_of(tiny.processor, tiny.model(), plain=True)([(one, pictures(1))])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
    tokenizer = tiny.processor.tokenizer
    begin = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []
    caption = tokenizer("A red house by the sea.\n", add_special_tokens=False)["input_ids"]
    assert ids == begin + [tokenizer.convert_tokens_to_ids("<image>")] * 36 + caption
    assert labels[labels != IGNORED].tolist() == caption


def test_a_batch_is_padded_on_the_left_and_cut_off_at_the_end(tiny: Tiny) -> None:
    long, short = record("Why?", "Because it is a cat. " * 4), record("Why?", "No.", images=0)
    shown = [(long, pictures(1)), (short, [])]
    whole = encoder_of(tiny.processor, tiny.model())(shown)
    alone = encoder_of(tiny.processor, tiny.model())(shown[1:])
    width = alone["input_ids"].shape[1]
    assert whole["input_ids"][1, -width:].tolist() == alone["input_ids"][0].tolist()
    assert whole["attention_mask"][1].tolist() == [0] * (whole["input_ids"].shape[1] - width) + [1] * width
    assert (whole["labels"][1, :-width] == IGNORED).all()
    cut = encoder_of(tiny.processor, tiny.model(), max_length=50)(shown)
    assert cut["input_ids"].shape[1] == 50
    assert cut["input_ids"][0].tolist() == whole["input_ids"][0, :50].tolist()
    with pytest.raises(InputError, match=r"record 0: .*--max-length"):
        encoder_of(tiny.processor, tiny.model(), max_length=20)(shown)


@pytest.mark.parametrize("method", [None, *ivtp.list_methods()])
def test_a_padded_batch_learns_what_its_records_do_alone(tiny: Tiny, method: str | None) -> None:
    """The loss of a batch is that of its records, weighted by their tokens; padding and neighbours do not count."""
    model = tiny.model().train()
    encoder = encoder_of(tiny.processor, model)
    shown = [
        (record("What is left of the dog?", "A house. It is blue."), pictures(1)),
        (record("Is it a cat?", "No", "And this?", "A banana"), pictures(1)),
        (record("Why?", "So.", images=0), []),
    ]
    if method:
        ivtp.attach(model, tiny.processor, method=method, keep=8, clip=tiny.clip)
    with torch.no_grad():
        alone = [(model(**encoder([one])).loss, int((encoder([one])["labels"] != IGNORED).sum())) for one in shown]
    together = model(**encoder(shown)).loss
    expected = sum(float(loss) * count for loss, count in alone) / sum(count for _, count in alone)
    assert together.item() == pytest.approx(expected, abs=2e-4)
    together.backward()
    for name in ("multi_modal_projector.linear_1.weight", "language_model.layers.7.mlp.down_proj.weight"):
        assert model.model.get_parameter(name).grad.abs().sum() > 0


def test_a_picture_that_cannot_be_decoded_is_named_with_its_record(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    broken = Record("record 7 (id 'x')", (tmp_path / "a.png",), ())
    with pytest.raises(ImageError, match=r"record 7 \(id 'x'\): "):
        Conversations([broken])[0]


IMAGE = 0


@given(
    texts=st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    slots=st.lists(st.integers(1, 6), min_size=4, max_size=4),
)
def test_labels_follow_their_tokens_past_any_number_of_slots(texts: Any, slots: list[int]) -> None:
    short: list[int] = []
    learned: list[bool] = []
    long: list[int] = []
    expected: list[bool] = []
    for number, text in enumerate(texts):
        if number:
            short, learned = [*short, IMAGE], [*learned, False]
            long, expected = [*long, *[IMAGE] * slots[number - 1]], [*expected, *[False] * slots[number - 1]]
        for token, own in text:
            short, learned, long, expected = [*short, token], [*learned, own], [*long, token], [*expected, own]
    assert spread(short, learned, long, IMAGE) == expected
    assert spread(short, learned, [9, *long], IMAGE) is None

"""A cache that is handed back for the next turn of a conversation: what it keeps, and what is chosen again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import FOLLOW_UP, NUM_PATCHES, QUESTIONS, Tiny, samples, with_cache
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, pipeline

import ivtp
from ivtp.cost.prefill import unread_encoder
from ivtp.errors import InputError
from ivtp.registry import method_class

Inputs = dict[str, Tensor]
MODES = [{"cache": c, "positions": p} for c in ("evict", "layered") for p in ("original", "compact")]


def generate(model: Any, inputs: Inputs, cache: Any = None, **options: Any) -> Any:
    """Five tokens, their logits and the cache."""
    given = {} if cache is None else with_cache(model, cache)
    options = {"max_new_tokens": 5, "do_sample": False, **given, **options}
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def next_turn(tiny: Tiny, inputs: Inputs, answer: Tensor, question: str = FOLLOW_UP) -> Inputs:
    """The inputs of the whole conversation: `answer` (B, T) are the first turn's prompts and answers."""
    text = tiny.processor.tokenizer(f" USER: {question} ASSISTANT:", add_special_tokens=False, return_tensors="pt")
    ids = torch.cat([answer, text["input_ids"].expand(len(answer), -1)], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), grown, dtype=torch.long)], 1)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def with_images(
    tiny: Tiny, inputs: Inputs, answer: Tensor, questions: list[tuple[str, int]], seed: int = 70
) -> tuple[Inputs, Inputs]:
    """The inputs of a conversation whose next turn, padded on the left, shows each row so many new images.

    Once with these images alone, and once with all.
    """
    new = [tiny.sample(question, images=count, seed=seed + 10 * row) for row, (question, count) in enumerate(questions)]
    prompts = tiny.inputs(*new)
    ids, mask = (prompts[name] for name in ("input_ids", "attention_mask"))
    start = tiny.processor.tokenizer.bos_token_id
    mask = mask.masked_fill(ids == start, 0)  # it opens a prompt, not a turn
    again = next_turn(tiny, inputs, answer, "")
    length = answer.shape[1]
    later = {
        "input_ids": torch.cat([again["input_ids"][:, :length], ids], 1),
        "attention_mask": torch.cat([again["attention_mask"][:, :length], mask], 1),
    }
    if not any(count for _, count in questions):
        return later, {**later, **({"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {})}
    image = tiny.processor.image_token_id
    counts = [(row == image).sum().item() // NUM_PATCHES for row in inputs["input_ids"]]
    old = list(inputs.get("pixel_values", torch.zeros(0, 3, 24, 24)).split(counts))
    fresh = prompts["pixel_values"].split([count for _, count in questions])
    both = torch.cat([part for pair in zip(old, fresh, strict=True) for part in pair])
    return {**later, "pixel_values": prompts["pixel_values"]}, {**later, "pixel_values": both}


def without_pixels(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


def logits(output: Any) -> Tensor:
    return torch.stack(output.logits)


# ---- what the first turn kept stays ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two images", "mixed"])
def test_images_of_earlier_turns_may_be_handed_over_again(tiny: Tiny, name: str) -> None:
    """As a processor hands them over with the whole conversation; they are in the cache."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, name))
    with tiny.attach(model) as pruner:
        first = generate(model, inputs)
        kept = pruner.trace.kept()
        again = next_turn(tiny, inputs, first.sequences)
        held = copy.deepcopy(first.past_key_values)
        without = generate(model, without_pixels(again), held)
        whole = generate(model, again, first.past_key_values)
        assert torch.equal(pruner.trace.kept(), kept)
    assert torch.equal(logits(whole), logits(without))
    assert whole.past_key_values.get_seq_length() == whole.sequences.shape[1] - 1
    sizes = [layer.keys.shape[-2] for layer in whole.past_key_values.layers]
    assert sizes == [layer.keys.shape[-2] for layer in held.layers]


@pytest.mark.parametrize("repruning", ["first", "turn"])
@pytest.mark.parametrize("name", ["two images", "mixed"])
def test_with_all_tokens_kept_turns_are_stock(tiny: Tiny, name: str, repruning: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, name))
    first = generate(model, inputs)
    again = next_turn(tiny, inputs, first.sequences)
    stock = generate(model, without_pixels(again), first.past_key_values)
    with tiny.attach(model, keep=NUM_PATCHES, repruning=repruning):
        held = generate(model, inputs).past_key_values
        second = generate(model, again, held)
    valid = again["attention_mask"].bool().all(dim=1)
    torch.testing.assert_close(logits(second)[:, valid], logits(stock)[:, valid], atol=1e-4, rtol=0)
    assert second.sequences.tolist() == stock.sequences.tolist()


@pytest.mark.parametrize("repruning", ["first", "turn"])
def test_a_pipeline_chats_on_its_cache(tiny: Tiny, repruning: str) -> None:
    sample, model = samples(tiny, "one")[0], tiny.model()
    chat = [{"role": "user", "content": [{"type": "image", "image": sample.images[0]}, _text(sample.question)]}]
    with tiny.attach(model, repruning=repruning):
        pipe = pipeline("image-text-to-text", model=model, processor=tiny.processor)

        def ask(chat: list[Any], cache: Any = None) -> list[Any]:
            options = {"do_sample": False, **({} if cache is None else with_cache(model, cache))}
            return pipe(text=chat, max_new_tokens=5, generate_kwargs=options)[0]["generated_text"]

        cache = DynamicCache()
        chat = [*ask(chat, cache), {"role": "user", "content": [_text(FOLLOW_UP)]}]
        cached, fresh = ask(chat, cache), ask(chat)
        assert cache.get_seq_length() > NUM_PATCHES > cache.layers[0].keys.shape[-2] / 2
        if repruning == "turn":
            assert cached == fresh


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "new", [[(QUESTIONS[0], 1)], [(QUESTIONS[1], 2), (QUESTIONS[2], 0), (QUESTIONS[3], 1)]], ids=len
)
def test_a_first_image_behind_turns_of_text_is_pruned_as_in_one_pass(
    tiny: Tiny, new: Any, mode: dict[str, str]
) -> None:
    model, inputs = tiny.model(), tiny.inputs(*(tiny.sample(QUESTIONS[row], images=0) for row in range(len(new))))
    with tiny.attach(model, **mode) as pruner:
        first = generate(model, inputs)
        again, _ = with_images(tiny, inputs, first.sequences, new)
        expected, trace = generate(model, again), pruner.trace
        second = generate(model, again, first.past_key_values)
        assert pruner.trace.kept().tolist() == trace.kept().tolist()
        assert [[w.used for w in row] for row in pruner.trace.words] == [[w.used for w in row] for row in trace.words]
        assert pruner.trace.before == ()
    torch.testing.assert_close(logits(second), logits(expected), atol=2e-4, rtol=0)
    assert second.sequences.tolist() == expected.sequences.tolist()
    assert second.past_key_values.get_seq_length() == again["input_ids"].shape[1] + 4


@pytest.mark.parametrize("method", [m for m in ivtp.list_methods() if method_class(m).info.stage != "vision"])
def test_methods_that_cut_the_decoder_do_so_behind_a_cache(tiny: Tiny, method: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(tiny.sample(QUESTIONS[2], images=0))
    with tiny.attach(model, method=method) as pruner:
        first = generate(model, inputs)
        again, _ = with_images(tiny, inputs, first.sequences, [(QUESTIONS[0], 2)])
        expected, kept = generate(model, again), pruner.trace.kept()
        second = generate(model, again, first.past_key_values)
        assert pruner.trace.kept().tolist() == kept.tolist()
    torch.testing.assert_close(logits(second), logits(expected), atol=2e-4, rtol=0)


@pytest.mark.parametrize("given", ["new images", "all images"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_new_image_is_pruned_behind_one_that_was(tiny: Tiny, mode: dict[str, str], given: str) -> None:
    """Where no question moves what is kept, turn by turn is one pass; and a further turn goes on with both."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "mixed"))
    new = [(QUESTIONS[0], 1), (QUESTIONS[1], 0), (QUESTIONS[3], 2), (QUESTIONS[2], 1)]
    with tiny.attach(model, method="topk", **mode) as pruner:
        first = generate(model, inputs)
        kept = pruner.trace.kept()
        alone, both = with_images(tiny, inputs, first.sequences, new)
        expected = generate(model, both)
        second = generate(model, alone if given == "new images" else both, first.past_key_values)
        torch.testing.assert_close(logits(second), logits(expected), atol=2e-4, rtol=0)
        assert torch.equal(pruner.trace.before[0].kept(), kept)
        assert pruner.trace.images == (1, 0, 2, 1)
        third = next_turn(tiny, both, second.sequences)
        expected = generate(model, third)
        last = generate(model, third, second.past_key_values)
        torch.testing.assert_close(logits(last), logits(expected), atol=2e-4, rtol=0)


def test_a_new_image_behind_a_cache_that_the_question_shaped(tiny: Tiny) -> None:
    """As behind a stock cache of just the tokens that are left, at their positions."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad(), tiny.attach(model) as pruner:
        first = generate(model, inputs)
        held = first.past_key_values
        plain = DynamicCache()
        for number, layer in enumerate(held.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), number)
        again, _ = with_images(tiny, inputs, first.sequences, [(QUESTIONS[1], 1)])
        length = held.get_seq_length()
        rest = again["input_ids"][:, length:]
        mask = again["attention_mask"]
        found = model(
            input_ids=rest, attention_mask=mask, pixel_values=again["pixel_values"], **with_cache(model, held)
        )
        trace = pruner.trace
        expected = model(
            input_ids=rest,
            attention_mask=torch.cat([torch.ones(1, plain.get_seq_length(), dtype=torch.long), mask[:, length:]], 1),
            position_ids=torch.arange(length, mask.shape[1])[None],
            pixel_values=again["pixel_values"],
            **with_cache(model, plain),
        )
        assert torch.equal(trace.kept(), pruner.trace.kept())
        assert len(trace.before) == 1
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    assert {layer.get_seq_length() for layer in held.layers} == {mask.shape[1]}


def test_another_conversation_does_not_go_on_with_the_cache(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model):
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        again["input_ids"][0, 2] += 1
        with pytest.raises(InputError, match="does not begin with"):
            generate(model, again, first.past_key_values)


def test_the_trace_is_of_the_conversation_that_goes_on(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model) as pruner:
        first = generate(model, inputs)
        kept = pruner.trace.kept()
        generate(model, tiny.inputs(*samples(tiny, "two images")))
        generate(model, next_turn(tiny, inputs, first.sequences), first.past_key_values)
        assert torch.equal(pruner.trace.kept(), kept)


# ---- the new question chooses again ---------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["all images", "no images"])
@pytest.mark.parametrize("cache", ["evict", "layered"])
@pytest.mark.parametrize("name", ["two images", "mixed"])
def test_a_turn_that_chooses_again_is_the_conversation_in_one_pass(
    tiny: Tiny, name: str, cache: str, given: str
) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, name))
    with tiny.attach(model, repruning="turn", cache=cache) as pruner:
        first = generate(model, inputs)
        kept = pruner.trace.kept()
        again = next_turn(tiny, inputs, first.sequences)
        expected = generate(model, again)
        anew = pruner.trace.kept()
        second = generate(model, again if given == "all images" else without_pixels(again), first.past_key_values)
        assert torch.equal(pruner.trace.kept(), anew)
        assert torch.equal(pruner.trace.before[0].kept(), kept)
        assert not torch.equal(anew, kept), "the question should matter"
    torch.testing.assert_close(logits(second), logits(expected), atol=1e-4, rtol=0)
    held, fresh = second.past_key_values, expected.past_key_values
    assert second.past_key_values is first.past_key_values
    assert held.get_seq_length() == fresh.get_seq_length()
    assert [layer.keys.shape for layer in held.layers] == [layer.keys.shape for layer in fresh.layers]


@pytest.mark.parametrize("given", ["new images", "all images"])
def test_new_images_are_chosen_from_beside_those_of_earlier_turns(tiny: Tiny, given: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "mixed"))
    new = [(QUESTIONS[0], 1), (QUESTIONS[1], 0), (QUESTIONS[3], 2), (QUESTIONS[2], 1)]
    with tiny.attach(model, repruning="turn") as pruner:
        first = generate(model, inputs)
        alone, both = with_images(tiny, inputs, first.sequences, new)
        expected, kept = generate(model, both), pruner.trace.kept()
        second = generate(model, alone if given == "new images" else both, first.past_key_values)
        assert torch.equal(pruner.trace.kept(), kept)
        assert pruner.trace.images == (2, 2, 2, 2)
        third = next_turn(tiny, both, second.sequences)
        last = generate(model, without_pixels(third), second.past_key_values)
        assert len(pruner.trace.before) == 2
        expected_last = generate(model, third)
    torch.testing.assert_close(logits(second), logits(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(last), logits(expected_last), atol=1e-4, rtol=0)


def test_a_forward_behind_a_cache_cannot_choose_again(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad(), tiny.attach(model, repruning="turn"):
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.ones(1, 2 * inputs["input_ids"].shape[1], dtype=torch.long)
        with pytest.raises(InputError, match='use generate, or repruning="first"'):
            model(**{**inputs, "attention_mask": mask}, **with_cache(model, cache))


def test_choosing_again_does_not_encode_again(tiny: Tiny) -> None:
    model, inputs, encoded = tiny.model(), tiny.inputs(*samples(tiny, "two images")), []
    model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    with tiny.attach(model, repruning="turn") as pruner:
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        assert len(encoded) == 1
        generate(model, again, first.past_key_values)
        assert len(encoded) == 1
        cost = pruner.trace.flops
        generate(model, again)
        assert len(encoded) == 2
        assert cost < pruner.trace.flops


@pytest.mark.parametrize("method", ["ivtp", "fastv", "pyramiddrop"])
def test_a_turn_costs_what_a_counter_sees(tiny: Tiny, method: str) -> None:
    """Behind a cache, and where stage 1 is done already; what is chosen again is not encoded again."""
    model, inputs = tiny.model("eager"), tiny.inputs(*samples(tiny, "two images"))
    tiny.clip[0].set_attn_implementation("eager")
    with torch.no_grad(), tiny.attach(model, method=method) as pruner:
        first = generate(model, inputs)
        alone, both = with_images(tiny, inputs, first.sequences, [(QUESTIONS[0], 1)])
        held, length = copy.deepcopy(first.past_key_values), first.past_key_values.get_seq_length()
        with FlopCounterMode(display=False) as counter:
            rest = {**alone, "input_ids": alone["input_ids"][:, length:]}
            model(**rest, **with_cache(model, held))
        # of the layers behind the one that is read CLIP's guide alone needs the output
        unread = 0.0 if method == "ivtp" else unread_encoder(pruner.host.size, pruner.method.plan, NUM_PATCHES)
        assert pruner.trace.flops + unread == pytest.approx(counter.get_total_flops(), rel=0.01)
        with pruner.using(repruning="turn"):
            cache = generate(model, inputs).past_key_values
            said, seen = [], []
            for held in (None, cache):
                with FlopCounterMode(display=False) as counter:
                    generate(model, both, held, max_new_tokens=1)
                said.append(pruner.trace.flops)
                seen.append(counter.get_total_flops())
    assert said[0] - said[1] + 2 * unread == pytest.approx(seen[0] - seen[1], rel=0.01)


def test_other_options_read_the_images_again(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "two images"))
    with tiny.attach(model, repruning="turn") as pruner:
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        with pruner.using(keep=4):
            with pytest.raises(InputError, match="pixel_values of all images"):
                generate(model, without_pixels(again), first.past_key_values)
            expected = generate(model, again)
            torch.testing.assert_close(
                logits(generate(model, again, first.past_key_values)), logits(expected), atol=1e-4, rtol=0
            )


def test_a_method_whose_encoder_reads_the_question_encodes_again(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model, method="cdpruner", repruning="turn") as pruner:
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        expected = generate(model, again)
        kept = pruner.trace.kept()
        with pytest.raises(InputError, match="pixel_values of all images"):
            generate(model, without_pixels(again), first.past_key_values)
        second = generate(model, again, first.past_key_values)
        assert torch.equal(pruner.trace.kept(), kept)
    torch.testing.assert_close(logits(second), logits(expected), atol=1e-4, rtol=0)


def test_a_method_that_no_question_moves_reads_the_new_turn_alone(tiny: Tiny) -> None:
    model, inputs, columns = tiny.model(), tiny.inputs(*samples(tiny, "one")), []
    with tiny.attach(model, method="topk", repruning="turn"):
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        expected = generate(model, again)
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: columns.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        second = generate(model, again, first.past_key_values)
    torch.testing.assert_close(logits(second), logits(expected), atol=1e-4, rtol=0)
    assert columns[0] == again["input_ids"].shape[1] - first.sequences.shape[1] + 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_choose_again_together(tiny: Tiny, options: dict[str, int]) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    with tiny.attach(model, repruning="turn"):
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        expected = generate(model, again, **options).sequences
        assert generate(model, again, first.past_key_values, **options).sequences.tolist() == expected.tolist()


def test_beams_on_a_cache_without_rows_for_them_are_refused(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model):
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        with pytest.raises(InputError, match="batch_repeat_interleave"):
            generate(model, again, copy.deepcopy(first.past_key_values), num_beams=3)
        first.past_key_values.batch_repeat_interleave(3)
        assert generate(model, again, first.past_key_values, num_beams=3).sequences.shape[0] == 1


@pytest.mark.parametrize("repruning", ["first", "turn"])
def test_every_returned_sequence_goes_on(tiny: Tiny, repruning: str) -> None:
    """Three answers to one prompt, a next turn behind each of them."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model, repruning=repruning):
        torch.manual_seed(0)
        first = generate(model, inputs, do_sample=True, num_return_sequences=3)
        three = {"attention_mask": inputs["attention_mask"].expand(3, -1)}
        again = next_turn(tiny, three, first.sequences)
        together = generate(model, again, copy.deepcopy(first.past_key_values))
        for row in range(3):
            held = copy.deepcopy(first.past_key_values)
            held.batch_select_indices(torch.tensor([row]))
            alone = {name: value[row : row + 1] for name, value in again.items()}
            if repruning == "turn":  # a cache with other rows has forgotten whose images it holds
                alone["pixel_values"] = inputs["pixel_values"]
            expected = generate(model, alone, held)
            torch.testing.assert_close(logits(together)[:, row], logits(expected)[:, 0], atol=1e-4, rtol=0)


def test_drafted_tokens_do_not_lead_a_later_choice(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    draft = tiny.model()
    draft.lm_head.weight.data.mul_(-1)
    with tiny.attach(model, repruning="turn") as pruner:
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        expected = generate(model, again).sequences
        kept = pruner.trace.kept()
        held = first.past_key_values
        assert generate(model, again, held, assistant_model=draft).sequences.tolist() == expected.tolist()
        assert torch.equal(pruner.trace.kept(), kept)


def test_a_failed_turn_leaves_the_cache_as_it_was(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model, repruning="turn"):
        first = generate(model, inputs)
        again = next_turn(tiny, inputs, first.sequences)
        held = first.past_key_values
        expected = generate(model, again, copy.deepcopy(held)).sequences
        with pytest.raises(ValueError, match="max_length"):
            model.generate(**again, **with_cache(model, held), num_beams=3, max_length=5)
        assert generate(model, again, held).sequences.tolist() == expected.tolist()


# ---- attached, detached, other callers ------------------------------------------------------------------------


def test_attached_in_the_middle(tiny: Tiny) -> None:
    """A cache of the stock model goes on as it is, or the whole conversation is pruned."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    first = generate(model, inputs)
    again = next_turn(tiny, inputs, first.sequences)
    held = [copy.deepcopy(first.past_key_values) for _ in range(3)]
    stock = generate(model, without_pixels(again), held.pop())
    with tiny.attach(model) as pruner:
        assert torch.equal(logits(generate(model, again, held.pop())), logits(stock))
        with pruner.using(repruning="turn"):
            with pytest.raises(InputError, match="pixel_values of all images"):
                generate(model, without_pixels(again), held[0])
            expected = generate(model, again)
            torch.testing.assert_close(logits(generate(model, again, held[0])), logits(expected), atol=1e-4, rtol=0)


def test_detached_in_the_middle(tiny: Tiny) -> None:
    """The stock model goes on with what was kept."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model):
        first = generate(model, inputs)
        again = without_pixels(next_turn(tiny, inputs, first.sequences))
        expected = generate(model, again, copy.deepcopy(first.past_key_values))
    assert torch.equal(logits(generate(model, again, first.past_key_values)), logits(expected))


def test_the_new_turn_alone_is_enough_where_nothing_is_chosen_again(tiny: Tiny) -> None:
    """As stock takes it: the new tokens beside the mask of all."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model) as pruner:
        first = generate(model, inputs)
        again = without_pixels(next_turn(tiny, inputs, first.sequences))
        expected = logits(generate(model, again, copy.deepcopy(first.past_key_values)))
        alone = {**again, "input_ids": again["input_ids"][:, first.past_key_values.get_seq_length() :]}
        assert torch.equal(logits(generate(model, alone, copy.deepcopy(first.past_key_values))), expected)
        with pruner.using(repruning="turn"), pytest.raises(InputError, match="all of its input_ids"):
            generate(model, alone, first.past_key_values)


def test_a_conversation_without_images_is_stock(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "no image"))
    first = generate(model, inputs)
    again = next_turn(tiny, inputs, first.sequences)
    stock = logits(generate(model, again, first.past_key_values))
    with tiny.attach(model, repruning="turn"):
        held = generate(model, inputs).past_key_values
        assert torch.equal(logits(generate(model, again, held)), stock)


def test_a_copied_cache_goes_on_and_does_not_copy_the_model(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model, repruning="turn"):
        first = generate(model, inputs)
        again = without_pixels(next_turn(tiny, inputs, first.sequences))
        held = [copy.deepcopy(first.past_key_values), first.past_key_values]
        one, other = (generate(model, again, cache).sequences.tolist() for cache in held)
    assert one == other


def test_a_cache_through_forward_keeps_what_it_has(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    found = []
    for repruning in ("first", "turn"):
        with torch.no_grad(), tiny.attach(model, repruning=repruning):
            cache = model(**inputs, use_cache=True).past_key_values
            found.append(model(input_ids=torch.tensor([[17, 100]]), **with_cache(model, cache)).logits)
    assert torch.equal(*found)

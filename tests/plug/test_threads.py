"""Several threads on one model: each reads its own record, none breaks another, nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import QUESTIONS, Tiny, samples
from torch import Tensor
from transformers import TextIteratorStreamer

import ivtp
from ivtp.errors import AttachError


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """Runs each task in a thread of its own, all begun together; raises what they raise."""
    gate = threading.Barrier(len(tasks))

    def begin(task: Callable[[], Any]) -> Any:
        gate.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [done.result(timeout=120) for done in [pool.submit(begin, task) for task in tasks]]


def configs(model: Any) -> list[Any]:
    return [getattr(module, "config", None) for module in model.modules()]


def test_each_thread_reads_the_record_of_its_own_prompt(tiny: Tiny) -> None:
    model = tiny.model()
    prompts = [tiny.inputs(tiny.sample(question, seed=7 * i)) for i, question in enumerate(QUESTIONS)]
    with tiny.attach(model) as pruner:
        expected = []
        for inputs in prompts:
            generate(model, inputs)
            expected.append(pruner.trace.kept().tolist())
        everyone = threading.Barrier(len(prompts))

        def ask(inputs: dict[str, Tensor]) -> Any:
            generate(model, inputs)
            everyone.wait()  # all have generated before any of them reads
            return pruner.trace.kept().tolist()

        for _ in range(3):
            assert at_once(*[lambda i=i: ask(i) for i in prompts]) == expected


def test_a_thread_that_did_not_call_reads_the_last_record(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with tiny.attach(model) as pruner:
        assert pruner.trace is None
        thread = threading.Thread(target=generate, args=(model, inputs))
        thread.start()
        thread.join()
        assert pruner.trace is not None


def test_streaming_from_another_thread(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    streamer = TextIteratorStreamer(tiny.processor.tokenizer, skip_prompt=True, timeout=60)
    with tiny.attach(model):
        expected = tiny.processor.tokenizer.decode(generate(model, inputs)[0])
        thread = threading.Thread(target=generate, args=(model, inputs), kwargs={"streamer": streamer})
        thread.start()
        assert "".join(streamer) == expected
        thread.join()


def test_detach_waits_for_the_call_that_runs(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    stock, before = generate(model, inputs), configs(model)
    with tiny.attach(model):
        pruned = generate(model, inputs)
    for _ in range(5):
        pruner = tiny.attach(model)
        found = at_once(lambda: generate(model, inputs), pruner.detach)[0]
        assert found in (pruned, stock)  # whichever came first
        assert all(a is b for a, b in zip(configs(model), before, strict=True))
        assert generate(model, inputs) == stock


def test_detach_while_layers_run_leaves_the_models_own_configs(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    before = configs(model)
    pruner = tiny.attach(model)
    inside, leave = threading.Event(), threading.Event()

    def stop_here(*_: Any) -> None:
        inside.set()
        leave.wait(5)

    hook = model.model.language_model.layers[1].register_forward_pre_hook(stop_here)
    thread = threading.Thread(target=generate, args=(model, inputs))
    thread.start()
    assert inside.wait(60)
    ends = threading.Thread(target=pruner.detach)
    ends.start()
    leave.set()
    thread.join()
    ends.join()
    hook.remove()
    assert all(a is b for a, b in zip(configs(model), before, strict=True))


@pytest.mark.parametrize("method", ["ivtp", "tome"])
def test_image_features_from_another_thread_meet_stock_layers(tiny: Tiny, method: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    pixels = inputs["pixel_values"]

    def features() -> Tensor:
        with torch.no_grad():
            return torch.stack(list(model.get_image_features(pixels).pooler_output))

    stock = features()
    with tiny.attach(model, method=method) as pruner:
        pruned = generate(model, inputs)
        inside, leave = threading.Event(), threading.Event()

        def stop_here(*_: Any) -> None:
            if threading.current_thread() is runner:
                inside.set()
                leave.wait(60)

        found: list[Any] = []
        hook = model.model.vision_tower.encoder.layers[3].register_forward_pre_hook(stop_here)
        runner = threading.Thread(target=lambda: found.append(generate(model, inputs)))
        runner.start()
        assert inside.wait(60)
        assert torch.equal(features(), stock)  # in the middle of the other thread's prefill
        leave.set()
        runner.join()
        hook.remove()
        assert found == [pruned]
        assert pruner.trace is not None
    assert torch.equal(features(), stock)


def test_many_threads_at_work(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad():
        stock = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    with tiny.attach(model):
        pruned = generate(model, inputs)

        def features() -> Any:
            with torch.no_grad():
                return torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))

        for found in at_once(*[lambda: [generate(model, inputs) for _ in range(3)]] * 2, *[features] * 2):
            if isinstance(found, list):
                assert found == [pruned] * 3
            else:
                assert torch.equal(found, stock)
    assert torch.equal(features(), stock)


def test_ask_from_four_threads_on_one_model_waits(tiny: Tiny) -> None:
    model = tiny.model()
    questions = [tiny.sample(question, seed=i) for i, question in enumerate(QUESTIONS)]

    def ask(number: int) -> ivtp.Answer:
        sample = questions[number]
        return ivtp.ask(
            model, tiny.processor, sample.images[0], sample.question, keep=8, clip=tiny.clip, max_new_tokens=4,
            llm_layers=6, threshold=0.06,
        )  # fmt: skip

    alone = [ask(number) for number in range(4)]
    together = at_once(*[lambda n=n: ask(n) for n in range(4)])
    for one, other in zip(alone, together, strict=True):
        assert one.text == other.text
        assert torch.equal(one.trace.kept(), other.trace.kept())


def test_ask_still_refuses_a_model_that_is_attached_to(tiny: Tiny) -> None:
    model, sample = tiny.model(), tiny.sample()
    with tiny.attach(model), pytest.raises(AttachError, match="detach"):
        ivtp.ask(model, tiny.processor, sample.images[0], sample.question, clip=tiny.clip, keep=8)

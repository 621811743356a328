"""lmms-eval's model `ivtp`: any model that `ivtp.load` reads, pruned by any method, in batches.

    python -m lmms_eval --model ivtp --model_args pretrained=micro,method=ivtp,keep=64 --tasks pope --batch_size 8

`method`, `keep` and every other option of `PruneConfig` and of the method are `--model_args`. What each sample kept and
cost is in the logged samples, beside its tokens. An error ends the run: it is never an empty answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ivtp.cost.prefill import count_prompt
from ivtp.errors import ConfigError, InputError
from ivtp.evaluation.answers import Answers, file_of, source_of, weights_of
from ivtp.generate import load
from ivtp.images import load_image
from ivtp.plug import attach, find_host
from ivtp.prompt.chat import Message, prompt_writer
from ivtp.registry import method_name

LONGEST_ANSWER = 1024  # tokens, where a task names no limit; as lmms-eval's own models


@dataclass
class Cost(TokenCounts):  # type: ignore[misc]  # lmms-eval is untyped
    """What lmms-eval logs of a sample, and what it cost."""

    visual_tokens: int = 0
    """Those that are left behind the last cut, of all its images."""
    tflops: float = 0.0
    """Of its prefill by itself, choosing included."""
    seconds: float = 0.0
    """Its share of its batch's time, answer included."""

    def to_dict(self) -> dict[str, Any]:
        """Also what lmms-eval does not know of."""
        own = {"visual_tokens": self.visual_tokens, "tflops": self.tflops, "seconds": self.seconds}
        return {**super().to_dict(), **own}


@dataclass(frozen=True)
class Prompt:
    """One conversation, its images in their order, and how to answer."""

    text: str
    images: tuple[Image.Image, ...]
    generation: dict[str, Any]
    until: tuple[str, ...]


class IvtpModel(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """Tasks hand over conversations, which the checkpoint's own chat template writes."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "micro",
        method: str = "ivtp",
        keep: int | str = 64,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        clip: str | None = None,
        max_batch_size: int | None = None,
        answers: str | Path | None = None,
        on_answers: Callable[[int], None] | None = None,
        **options: Any,
    ) -> None:
        """`method="none"` is the untouched model. Raises `LoadError` and `ConfigError` as `load` and `attach` do.

        `answers` is a folder in which they are kept, and those of earlier runs found. `on_answers` is told how many
        there are more of; without it a progress bar is.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r} is not a number of prompts; use a whole number from 1 up")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.model: Any
        self.processor: Any
        self.model, self.processor = load(pretrained, dtype=dtype, device=str(self.device))
        self.host = find_host(self.model)
        self.processor.tokenizer.padding_side = "left"
        self.template = prompt_writer(self.processor)
        self.pruner = None
        if method_name(method) == "none":
            if options:
                raise ConfigError(f"method 'none' prunes nothing and takes no {', '.join(sorted(options))}")
        else:
            self.pruner = attach(self.model, self.processor, clip=clip, method=method, keep=keep, **options)
        self.on_answers = on_answers
        self.answers = None
        if answers is not None:
            run: dict[str, Any] = {"model": pretrained, "weights": weights_of(self.model), "clip": file_of(clip)}
            run["dtype"] = str(self.model.dtype)
            if self.pruner is not None:
                run |= {"config": dataclasses.asdict(self.pruner.config), "code": source_of(type(self.pruner.method))}
                run["files"] = [file_of(value) for _, value in sorted(self.pruner.config.options.items())]
            self.answers = Answers(Path(answers), run, self.rank)

    # ---- what lmms-eval calls ---------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer for each request, in their order; those with questions of similar length run together."""
        found: list[Any] = [None] * len(requests)
        with self._progress(len(requests)) as told:
            for numbers in self._batches(requests):
                batch = [requests[number] for number in numbers]
                for number, answer in zip(numbers, self._remembered(batch), strict=True):
                    found[number] = answer
                told(len(numbers))
        return found

    def _remembered(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers of a batch. Where one of them is new all are asked: a batch is always the same."""
        prompts = [self.prompt(request.args) for request in requests]
        if self.answers is None:
            return self.answer(prompts)
        names = [_item(request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
        known = [self.answers.get(name) for name in names]
        if all(known):
            return [GenerationResult(answer["text"], Cost(**answer["cost"])) for answer in known if answer]
        found = self.answer(prompts)
        kept = [{"text": answer.text, "cost": vars(answer.token_counts)} for answer in found]
        self.answers.add(dict(zip(names, kept, strict=True)))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request; a round's conversation depends on the answers before it."""
        found = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Answering"):
            _, messages_of, asked, number, task, split = request.args
            doc, said, info = self.task_dict[task][split][number], [], None
            messages = messages_of(doc)
            while True:
                (answer,) = self.answer([self._prompt(messages, asked)])
                said.append(answer.text)
                going_on = messages_of(doc, round_idx=len(said), previous_output=list(said), previous_round_info=info)
                if not isinstance(going_on, tuple) or going_on[1]:
                    break
                messages, _, _, info = going_on
            found.append(said)
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Mean negative log-likelihood of each continuation, of which lmms-eval takes the lowest, and if it is greedy.

        The continuation takes no part in the pruning. The pairs are wrapped: lmms-eval 0.7.3 turns a bare one to text.
        Raises `ConfigError` for a processor that ends every prompt itself.
        """
        if self.host.writes_prompts:
            raise ConfigError(
                f"the processor of {self.host.name} ends every prompt itself, and nothing can be rated behind it; "
                "run tasks that generate answers"
            )
        found = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Rating"):
            context, target, visuals_of, number, task, split = request.args
            doc = self.task_dict[task][split][number]
            text = target if isinstance(target, str) else target(doc)
            prompt = self._prompt(_one_turn(context, visuals_of(doc)), {})
            found.append(GenerationResult(self.rate(prompt, text)))
        return found

    def clean(self) -> None:
        """Leave the model as it was."""
        if self.pruner is not None:
            self.pruner.detach()
        super().clean()

    # ---- the model --------------------------------------------------------------------------------------------

    def prompt(self, args: tuple[Any, ...]) -> Prompt:
        """The conversation of a request of `generate_until`."""
        _, messages_of, asked, number, task, split = args
        return self._prompt(messages_of(self.task_dict[task][split][number]), asked)

    def answer(self, prompts: list[Prompt]) -> list[GenerationResult]:
        """What the model says to prompts that are to be answered in the same way, as one left-padded batch."""
        inputs = self._inputs(prompts)
        began = time.perf_counter()
        with torch.inference_mode():
            made = self.model.generate(**inputs, **prompts[0].generation)
        new = made[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        seconds = (time.perf_counter() - began) / len(prompts)
        lengths = self._answer_lengths(new)
        costs = self._costs(prompts, inputs)
        found = []
        for prompt, text, (left, flops), asked, said in zip(
            prompts, texts, costs, inputs["attention_mask"].sum(dim=1).tolist(), lengths, strict=True
        ):
            for end in prompt.until:
                text = text.partition(end)[0]
            cost = Cost(asked, said, visual_tokens=left, tflops=flops / 1e12, seconds=seconds)
            found.append(GenerationResult(text.strip(), cost))
        return found

    def rate(self, prompt: Prompt, text: str) -> tuple[float, bool]:
        """Mean negative log-likelihood of `text` behind `prompt`, and whether the model would say it greedily."""
        whole = Prompt(prompt.text + text, prompt.images, {}, ())
        inputs = self._inputs([whole])
        first = self._inputs([prompt])["input_ids"].shape[1]
        labels = inputs["input_ids"].clone()
        labels[:, :first] = -100
        with torch.inference_mode():
            logits = self.model(**inputs, labels=labels).logits[0, first - 1 : -1].float()
        said = labels[0, first:]
        likely = logits.log_softmax(dim=-1).gather(1, said[:, None])
        return -float(likely.mean()), bool((logits.argmax(dim=-1) == said).all())

    def _inputs(self, prompts: list[Prompt]) -> Any:
        texts, pictures = [prompt.text for prompt in prompts], [prompt.images for prompt in prompts]
        made = self.host.process(self.processor, texts, pictures)
        return made.to(self.device, self.model.dtype)

    def _prompt(self, messages: Iterable[Any], asked: dict[str, Any]) -> Prompt:
        """`messages` as lmms-eval writes them: of a role and parts of a type, an image's picture under `url`."""
        conversation: list[Message] = []
        images = []
        for message in messages:
            parts: list[str | None] = []
            for part in message["content"]:
                if part["type"] not in ("text", "image"):
                    raise InputError(f"a task hands over {part['type']!r}; models are asked about text and images")
                parts.append(part["text"] if part["type"] == "text" else None)
                images += [load_image(part["url"])] if part["type"] == "image" else []
            conversation.append((message["role"], parts))
        generation, until = _generation(asked)
        return Prompt(self.template.write_messages(conversation), tuple(images), generation, until)

    def _batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Numbers of requests that are to be answered in the same way, the longest questions first."""
        asked = [request.args[1 if self.is_simple else 2] for request in requests]
        ways = [repr(sorted(way.items(), key=repr)) for way in asked]
        order = sorted(range(len(requests)), key=lambda n: (ways[n], -len(str(requests[n].args[0]))))
        for _, alike in itertools.groupby(order, key=lambda n: ways[n]):
            numbers = list(alike)
            for start in range(0, len(numbers), self.batch_size):
                yield numbers[start : start + self.batch_size]

    def _costs(self, prompts: list[Prompt], inputs: Any) -> list[tuple[int, float]]:
        """Visual tokens that are left of each prompt, and the FLOPs of its prefill."""
        trace = self.pruner.trace if self.pruner else None
        if trace is not None:
            repeats = len(trace.images) // len(prompts)  # beams
            kept: list[int] = (trace.kept() >= 0).sum(dim=1).tolist()
            return list(zip(kept[::repeats], trace.flops_each[::repeats], strict=True))
        visuals = iter(self.host.visuals(dict(inputs)) if any(prompt.images for prompt in prompts) else ())
        found = []
        for prompt, length in zip(prompts, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
            own = [next(visuals) for _ in prompt.images]
            left = sum(visual.patches for visual in own)
            kinds = [visual.counted for visual in own]
            found.append((left, count_prompt(self.host.size, None, kinds, text_tokens=length - left).total))
        return found

    def _answer_lengths(self, new: torch.Tensor) -> list[int]:
        """Tokens of each answer (B, T), its end included."""
        end = self.model.generation_config.eos_token_id
        ends = torch.tensor(end if isinstance(end, list) else [end], device=new.device)
        ended = torch.isin(new, ends).cumsum(dim=1)
        lengths: list[int] = ((ended - torch.isin(new, ends).long()) == 0).sum(dim=1).tolist()
        return lengths

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[int], Any]]:
        """What is told how many more were answered."""
        if self.on_answers is not None:
            yield self.on_answers
            return
        with tqdm(total=total, disable=self.rank != 0, desc="Answering") as bar:
            yield bar.update


class IvtpSimpleModel(IvtpModel):
    """Tasks hand over one text and its images: those that rate given answers know no other way."""

    is_simple = True

    def prompt(self, args: tuple[Any, ...]) -> Prompt:
        """The conversation of a request of `generate_until`."""
        context, asked, visuals_of, number, task, split = args
        return self._prompt(_one_turn(context, visuals_of(self.task_dict[task][split][number])), asked)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Of conversations alone."""
        raise ConfigError("tasks of several rounds are conversations; run them without --force_simple")


def _item(request: Instance, prompt: Prompt) -> str:
    """Names what a request asks: the task's item, and all that the model is handed for it."""
    *_, number, task, split = request.args
    asked = hashlib.sha256(repr((prompt.text, sorted(prompt.generation.items()), prompt.until)).encode())
    for image in prompt.images:
        asked.update(repr((image.mode, image.size)).encode() + image.tobytes())
    return f"{task}/{split}/{number}/{asked.hexdigest()[:16]}"


def _one_turn(context: str, visuals: Iterable[Any]) -> list[dict[str, Any]]:
    """A user's turn with images before the text."""
    images = [{"type": "image", "url": visual} for visual in visuals]
    return [{"role": "user", "content": [*images, {"type": "text", "text": context}]}]


def _generation(asked: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a task asks, as arguments of `generate`, and the texts that end an answer.

    Greedy, unless it asks for a temperature and does not forbid sampling.
    """
    temperature = asked.get("temperature") or 0
    sample = bool(asked.get("do_sample", temperature > 0))
    chosen: dict[str, Any] = {
        "max_new_tokens": asked.get("max_new_tokens", LONGEST_ANSWER),
        "num_beams": asked.get("num_beams", 1),
        "do_sample": sample,
    }
    if sample:
        chosen["temperature"] = temperature or 1.0
        chosen["top_p"] = asked.get("top_p")
    until = asked.get("until") or ()
    return chosen, (until,) if isinstance(until, str) else tuple(until)

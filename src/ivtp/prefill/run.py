"""One prefill with pruning: from the prompt and its images to shortened layers, a shortened cache and a record."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ivtp.core.select import on_device
from ivtp.core.sequence import TokenSequence, enter_decoder
from ivtp.guide.pseudo_cls import Guide, GuideMaker, reads_question
from ivtp.hosts.base import Host
from ivtp.methods.base import Cut, Method
from ivtp.prefill.cache import prune_cache
from ivtp.prefill.decoder import DecoderStage
from ivtp.prefill.encoder import Encoded, EncoderStage
from ivtp.prefill.stage import CutResult
from ivtp.prompt.batch import PromptBatch
from ivtp.prompt.instruction import Instruction


class Stopwatch:
    """Seconds between its creation and `stop`, measured on the device; reading them waits for it."""

    def __init__(self, device: torch.device) -> None:
        event: Any = torch.cuda.Event
        self._events = [event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self._events:
            self._events[0].record()
        self._began = time.perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        """The end."""
        if self._events:
            self._events[1].record()
        self._seconds = time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        """The time between."""
        if self._events:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._seconds


class Prefill:
    """`start` runs encoder and guide and makes the decoder's inputs; hooks call `see`, `cut` and `layer_inputs` while
    the layers run; `finish` shortens the cache. Afterwards it is the record that `PruneTrace` is built from."""

    def __init__(
        self, host: Host, method: Method, guide_maker: GuideMaker, prompts: PromptBatch, device: torch.device
    ) -> None:
        """`prompts` are on the host, the model on `device`."""
        self.host = host
        self.method = method
        self.guide_maker = guide_maker
        self.watch = Stopwatch(device)
        self.prompts = (prompts.with_instructions(guide_maker.read) if reads_question(method) else prompts).to(device)
        self.guides: list[Guide] = []
        self.clip_tokens: list[int] = []
        """Tokens that CLIP read of each row."""
        self._features: Tensor | None = None
        self._encoder = EncoderStage(host, method)
        self._decoder: DecoderStage | None = None
        self._shift: Tensor | None = None
        self._running = ""

    @property
    def results(self) -> list[CutResult]:
        """The cuts so far, in order."""
        return self._encoder.results + (self._decoder.results if self._decoder else [])

    def start(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replace `input_ids` and `pixel_values` among the model's inputs by a shortened `inputs_embeds`."""
        self._running = "vision"
        relevance = self._relevance if self.method.reads_clip else None
        encoded = self._encoder.run(inputs["pixel_values"], relevance)
        encoded = encoded[on_device(self.prompts.image_of_slot, encoded.patches.device)]
        sequence, embeddings = self._embed(encoded)
        if self.method.plan.guide_layers:
            guides = self._make_guides(encoded)  # (B, 1, D)
            embeddings = torch.cat([embeddings, guides.to(embeddings.dtype)], dim=1)
            sequence = sequence.with_guide(self.prompts.answer_in(sequence))
        self._decoder = DecoderStage(
            self.host, self.method, self.prompts, sequence, encoded.sources, embeddings.detach()
        )
        self._running = "llm"
        return {
            **inputs,
            "input_ids": None,
            "pixel_values": None,
            "inputs_embeds": embeddings,
            "attention_mask": self._decoder.entry_mask(embeddings),
            "position_ids": sequence.position,
        }

    def runs(self, where: str) -> bool:
        """Whether the layers of the encoder ("vision") or the decoder ("llm") are running for this prefill."""
        return self._running == where

    def feature_layer_done(self, hidden: Tensor) -> None:
        """Called with the output (I, T, D) of the encoder layer that the projector reads."""
        self._encoder.feature_layer_done(hidden)

    def see(self, where: str, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Called with what a tapped layer computed."""
        self._stage(where).see(layer, query, key, value, scale)

    def bias(self, cut: Cut) -> Tensor | None:
        """Called before the attention of a cut layer: what its logits get beside their mask."""
        return self._encoder.bias(cut) if cut.where == "vision" else None

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Called between attention and MLP of a cut layer, or behind it."""
        return self._stage(cut.where).cut(cut, hidden)

    def peek(self, cut: Cut, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Called behind a cut layer with its output and its arguments, where the cut reads the next layer."""
        self._stage(cut.where).peek(cut, hidden, arguments)

    def layer_inputs(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Called with the keyword arguments of every decoder layer."""
        assert self._decoder is not None
        return self._decoder.layer_inputs(hidden, kwargs)

    def finish(self, cache: Cache | None) -> Tensor | None:
        """Shorten the cache that the decoder filled, if there is one; returns the image features (slots, D).

        What is left afterwards is small and holds no graph: this object lives on as the record.
        """
        assert self._decoder is not None
        self._running = ""
        if cache is not None:
            prune_cache(
                cache,
                self._decoder.seen,
                prompt_length=self.prompts.length,
                fixed_length=self.prompts.fixed_length,
                shift=self._shift,
                evict=self.method.config.cache == "evict",
            )
        self.watch.stop()
        self._encoder.release()
        self._decoder.release()
        features, self._features = self._features, None
        return features

    def shorten_labels(self, labels: Tensor) -> Tensor:
        """Labels (B, T) of the prompt for the columns (B, T') that the logits have; visual tokens have none."""
        assert self._decoder is not None
        sequence = self._decoder.sequence
        shortened = labels.to(sequence.source.device).gather(1, sequence.source.clamp_min(0))
        return shortened.masked_fill(sequence.visual | ~sequence.valid | (sequence.source < 0), -100)

    def columns(self) -> Tensor:
        """(B, T): for every column of the prompt the last one that is left at or before it.

        Logits that are gathered by it stand where those of the stock model do, and a column behind a pruned token is
        predicted by what the pruned model saw before it.
        """
        sequence = self.sequence
        left = torch.arange(sequence.length, device=sequence.source.device)
        filled = left >= on_device(sequence.slack, left.device).unsqueeze(1)
        source = sequence.source.masked_fill(~filled, -1)
        wanted = torch.arange(self.prompts.length, device=left.device).expand(source.shape[0], -1)
        return (torch.searchsorted(source, wanted.contiguous(), right=True) - 1).clamp_min(0)

    @property
    def sequence(self) -> TokenSequence:
        """What is left behind the last cut so far."""
        assert self._decoder is not None
        return self._decoder.sequence

    def _stage(self, where: str) -> EncoderStage | DecoderStage:
        if where == "vision":
            return self._encoder
        assert self._decoder is not None
        return self._decoder

    def _embed(self, encoded: Encoded) -> tuple[TokenSequence, Tensor]:
        """The decoder's tokens after stage 1 and their embeddings (B, T', D), image features in their slots."""
        slots, patches = self.prompts.slots, encoded.patches
        compact = self.method.config.positions == "compact"
        sequence, index = enter_decoder(slots, self.prompts.tokens, patches, compact)
        embeddings: Tensor = self.host.embedding(self.prompts.ids.gather(1, index))
        features = encoded.features.to(embeddings.device, embeddings.dtype)
        self._features = features.flatten(0, 1)
        if compact:
            gone = slots.num_patches - patches.shape[1]
            self._shift = on_device(slots.images, index.device).unsqueeze(1) * gone
        return sequence, embeddings.masked_scatter(sequence.visual.unsqueeze(-1), features)

    @torch.no_grad()
    def _relevance(self, last: Tensor) -> Tensor:
        """Cosine (I, N) of every patch with its prompt's instruction, from the encoder's last output (I, 1 + N, D)."""
        sentences: list[Tensor] = []
        for row, instruction in enumerate(self.prompts.instructions):
            if row % self.prompts.repeats == 0:
                sentence, count = self.guide_maker.sentence(instruction)
                sentences += [sentence] * self.prompts.images[row]
            self.clip_tokens.append(count)
        patches = self.host.normalise(last[:, self.host.size.vision_cls :])
        return self.guide_maker.cosines(patches, torch.stack(sentences))

    @torch.no_grad()
    def _make_guides(self, encoded: Encoded) -> Tensor:
        """The pseudo CLS token of each row: (B, 1, D)."""
        embeddings = self.host.embedding(self.prompts.ids)  # (B, T, D)
        first = 0
        nothing = (Instruction("", [], []),) * len(self.prompts.images)  # where the guide reads no text
        for row, instruction in enumerate(self.prompts.instructions or nothing):
            own = slice(first, first + self.prompts.images[row])
            if row % self.prompts.repeats:
                self.guides.append(self.guides[-1])
            else:
                guide = self.guide_maker.make(instruction, embeddings[row], encoded.cls[own], encoded.pooled[own])
                self.guides.append(guide)
            first = own.stop
        self.clip_tokens = [guide.clip_tokens for guide in self.guides]
        return torch.stack([guide.token for guide in self.guides]).unsqueeze(1)

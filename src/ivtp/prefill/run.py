"""One prefill with pruning: from the prompt and its images to shortened layers, a shortened cache and a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ivtp.core.select import on_device
from ivtp.core.sequence import TokenSequence, enter_decoder
from ivtp.guide.pseudo_cls import Guide, GuideMaker, reads_question
from ivtp.methods.base import Method
from ivtp.prefill.cache import prune_cache
from ivtp.prefill.decoder import DecoderStage
from ivtp.prefill.encoder import Encoded
from ivtp.prefill.images import Read, encode
from ivtp.prefill.past import Past
from ivtp.prefill.record import Record, Stopwatch
from ivtp.prefill.stage import Plug, Seats
from ivtp.prefill.turns import Conversation, Turn, reads_in_encoder
from ivtp.prompt.batch import PromptBatch
from ivtp.prompt.instruction import Instruction


class Prefill:
    """`start` runs encoder and guide and makes the decoder's inputs; `finish` shortens the cache and gives the record.

    Between the two the decoder runs. Each of the two stages puts its own hooks into its layers.
    """

    def __init__(
        self,
        plug: Plug,
        method: Method,
        guide_maker: GuideMaker,
        prompts: PromptBatch,
        seats: Seats,
        turn: Turn | None = None,
        past: Past | None = None,
    ) -> None:
        """`prompts` are on the host; hooks go into `seats`, whose owner takes them out when the prefill ends.

        `turn` says which images of a later turn are read already, and `past` is cached in front of it.
        """
        self.host = plug.host
        self.method = method
        self.guide_maker = guide_maker
        self._plug, self._seats = plug, seats
        self._past = past
        self._turn = turn or Turn(tuple(range(len(prompts.visuals))), prompts.visuals)
        self._on_host = prompts.with_instructions(guide_maker.read) if reads_question(method) else prompts
        self._guides: list[Guide] = []
        self._clip_tokens: list[int] = []
        self._sentences: list[Tensor] = []
        self._features: Tensor | None = None
        self._deep: Tensor | None = None
        self._decoder: DecoderStage | None = None
        self._shift: Tensor | None = None

    def start(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replace `input_ids` and the images among the model's inputs by a shortened `inputs_embeds`."""
        device = inputs["input_ids"].device
        self.watch = Stopwatch(device)
        self.prompts = self._on_host.to(device)
        visuals = self._on_host.visuals
        batch = encode(
            self._plug,
            self.method,
            self._seats,
            visuals,
            self._tiles(inputs),
            self._relevance if self.method.reads_clip else None,
            self._words if self.method.reads_words else None,
        )
        self._results = batch.results
        self._reads = batch.images
        encoded = [batch.images[m].encoded for m in self.prompts.image_of_slot]
        sequence, embeddings = self._embed(encoded)
        if self.method.plan.guide_layers:
            guides = self._make_guides(encoded)  # (B, 1, D)
            embeddings = torch.cat([embeddings, guides.to(embeddings.dtype)], dim=1)
            sequence = sequence.with_guide(self.prompts.answer_in(sequence))
        self._decoder = DecoderStage(
            self._plug,
            self.method,
            self.prompts,
            sequence,
            [e.sources for e in encoded],
            embeddings.detach(),
            self._past,
            self._deep,
        )
        self._decoder.install(self._seats)
        if self._past is not None:
            self._past.expect()
        left = (*self.host.media, *self.host.of_columns)
        return {
            **{name: None if name in left else value for name, value in inputs.items()},
            "input_ids": None,
            "inputs_embeds": embeddings,
            "attention_mask": self._decoder.entry_mask(),
            "position_ids": sequence.position_ids,
        }

    def _tiles(self, inputs: dict[str, Any]) -> list[Tensor | Read]:
        """Of each image of the prompts what the encoder reads, or what it made of it in an earlier turn."""
        if all(isinstance(image, Read) for image in self._turn.images):
            return list(self._turn.images)  # type: ignore[arg-type]  # mypy does not follow `all`
        tiles = self.host.tiles(inputs, self._turn.given)
        return [tiles[image] if isinstance(image, int) else image for image in self._turn.images]

    def finish(self, cache: Cache | None) -> tuple[Record, Tensor | None]:
        """Shorten the cache that the decoder filled, if there is one; the record and the image features (slots, D)."""
        decoder = self._decoder
        assert decoder is not None
        record = Record(
            host=self.host,
            method=self.method,
            clip=self.guide_maker.clip,
            prompts=self.prompts,
            results=(*self._results, *decoder.results),
            guides=tuple(self._guides),
            clip_tokens=tuple(self._clip_tokens),
            sequence=decoder.sequence,
            watch=self.watch,
            read_before=tuple(isinstance(image, Read) for image in self._turn.images),
            before=self._turn.before,
            past=tuple(self._past.keys) if self._past else (),
        )
        if cache is not None:
            length = self._past.length if self._past else 0
            prune_cache(
                cache,
                decoder.seen,
                prompt_length=length + self.prompts.length,
                fixed_length=length + self.prompts.fixed_length,
                shift=self._shift,
                evict=self.method.config.cache == "evict",
                conversation=self._conversation(record),
                past=self._past,
            )
        self.watch.stop()
        decoder.release()
        return record, self._features

    def _conversation(self, record: Record) -> Conversation:
        """What the cache remembers for the next turn; images where the method may choose from them again."""
        prompts = self._on_host
        own = slice(None, None, prompts.repeats)
        columns = slice(prompts.fixed_length)
        images: list[tuple[Read, ...]] = []
        if self.method.config.repruning == "turn" and not reads_in_encoder(self.method):
            following = iter(self._reads)
            images = [tuple(next(following).detached() for _ in range(n)) for n in prompts.images[own]]
        begun = self._turn.begun
        if self._past is not None and begun is None:
            return Conversation(record=record)
        ids, valid = prompts.ids[own, columns], prompts.tokens.valid[own, columns]
        if begun is not None:
            ids, valid = torch.cat([begun[0], ids], dim=1), torch.cat([begun[1], valid], dim=1)
        return Conversation(ids, valid, record, tuple(images))

    def _embed(self, encoded: list[Encoded]) -> tuple[TokenSequence, Tensor]:
        """The decoder's tokens after stage 1 and their embeddings (B, T', D), image features in their slots."""
        slots = self.prompts.slots
        compact = self.method.config.positions == "compact"
        kept = [e.patches for e in encoded]
        sequence, index, self._shift = enter_decoder(slots, self.prompts.tokens, kept, compact)
        embeddings: Tensor = self.host.embedding(self.prompts.ids.gather(1, index))
        if encoded:
            self._features = torch.cat([e.features for e in encoded]).to(embeddings.device, embeddings.dtype)
            embeddings = embeddings.masked_scatter(sequence.visual.unsqueeze(-1), self._features)
            self._deep = torch.cat([e.deep for e in encoded])
        separator = self.host.separator()
        if separator is not None:
            between = slots.mask.gather(1, index) & ~sequence.visual
            embeddings = torch.where(between.unsqueeze(-1), separator.to(embeddings), embeddings)
        if self._past is not None and self._past.shift is not None:
            before = on_device(self._past.shift, index.device)
            self._shift = before if self._shift is None else self._shift + before
        return sequence, embeddings

    @torch.no_grad()
    def _relevance(self, last: Tensor, images: Sequence[int]) -> Tensor:
        """Cosine (R, N) of the patches of tiles, of the given images, with what their prompts ask.

        `last` (R, 1 + N, D) is the encoder's last output.
        """
        if not self._sentences:
            for row, instruction in enumerate(self.prompts.instructions):
                if row % self.prompts.repeats == 0:
                    sentence, count = self.guide_maker.sentence(instruction)
                    self._sentences += [sentence] * self.prompts.images[row]
                self._clip_tokens.append(count)
        patches = self.host.vision.normalise(last[:, self.host.size.vision_cls :])
        return self.guide_maker.cosines(patches, torch.stack([self._sentences[m] for m in images]))

    @torch.no_grad()
    def _words(self, images: Sequence[int]) -> Tensor:
        """Embeddings (R, W, D) of the questions' tokens for tiles of the given images, zeros behind each one's last."""
        host = self._on_host
        assert host.question is not None
        asked = [
            host.ids[row, host.question[row]]
            for row in range(0, len(host.ids), host.repeats)
            for _ in range(host.images[row])
        ]
        own = [asked[m] for m in images]
        lengths = torch.tensor([len(ids) for ids in own])
        ids = nn.utils.rnn.pad_sequence(own, batch_first=True)  # (R, W)
        there = torch.arange(ids.shape[1]) < lengths[:, None]
        device = self.prompts.ids.device
        words: Tensor = self.host.embedding(on_device(ids, device))
        return words * on_device(there, device).unsqueeze(-1)

    @torch.no_grad()
    def _make_guides(self, encoded: list[Encoded]) -> Tensor:
        """The pseudo CLS token of each row: (B, 1, D)."""
        embeddings = self.host.embedding(self.prompts.ids)  # (B, T, D)
        first = 0
        nothing = (Instruction("", [], []),) * len(self.prompts.images)  # where the guide reads no text
        for row, instruction in enumerate(self.prompts.instructions or nothing):
            own = slice(first, first + self.prompts.images[row])
            if row % self.prompts.repeats:
                self._guides.append(self._guides[-1])
            else:
                cls, pooled = (self._stack([getattr(e, part) for e in encoded[own]]) for part in ("cls", "pooled"))
                guide = self.guide_maker.make(instruction, embeddings[row], cls, pooled)
                self._guides.append(guide)
            first = own.stop
        self._clip_tokens = [guide.clip_tokens for guide in self._guides]
        return torch.stack([guide.token for guide in self._guides]).unsqueeze(1)

    def _stack(self, parts: list[Tensor]) -> Tensor:
        """(m, D_vision), also of no image."""
        return torch.stack(parts) if parts else torch.zeros(0, self.host.size.vision_hidden, dtype=torch.float32)

"""Questions as training text: the prompt's template, the question mix and the loss on answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ivtp.micro import world
from ivtp.micro.model import SYSTEM
from recipes.micro.blocks import IGNORE, TextBlocks, pack
from recipes.micro.tasks import TASKS

PATCHES = world.GRID * world.GRID


@dataclass(frozen=True)
class Template:
    """Token ids of the prompt's fixed parts, and the cutting of questions into block prompts and answers."""

    tokenizer: PreTrainedTokenizerBase
    system: bool = False

    @property
    def head(self) -> list[int]:
        """Ids before the image: begin-of-sequence, the system prompt if there is one, and the user's role word."""
        ids: list[int] = self.tokenizer(f"{SYSTEM} USER: " if self.system else "USER: ").input_ids
        return ids

    @property
    def text_start(self) -> int:
        """Position id of the first token after the image."""
        return len(self.head) + PATCHES

    def blocks(self, scenes: list[list[world.Question]]) -> TextBlocks:
        """The packed blocks of each scene's questions: prompt, answer, end-of-sequence."""
        flat = [q for scene in scenes for q in scene]
        texts = ["\n" + q.text + " ASSISTANT:" for q in flat] + [" " + q.answer for q in flat]
        ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        eos = self.tokenizer.eos_token_id
        found = iter(zip(ids[: len(flat)], ids[len(flat) :], flat, strict=True))
        triples = [[next(found) for _ in scene] for scene in scenes]
        return pack([[(p, [*a, eos], TASKS.index(q.kind)) for p, a, q in scene] for scene in triples])


def answer_loss(head: nn.Linear, hidden: Tensor, text: TextBlocks) -> tuple[Tensor, list[float], list[int]]:
    """Mean cross-entropy of the answer tokens, and by kind: questions answered exactly, questions asked.

    Under teacher forcing an answer is exact when each of its tokens has the highest logit; greedy generation gives
    the same verdict.
    """
    learned = (text.labels != IGNORE).nonzero().squeeze(1)
    logits = nn.functional.linear(hidden[learned], head.weight.to(hidden.dtype)).float()
    target = text.labels[learned]
    loss = nn.functional.cross_entropy(logits, target)
    block = text.owners[learned]
    wrong = torch.zeros(text.blocks, device=hidden.device)
    wrong.index_add_(0, block, (logits.argmax(-1) != target).float())
    asked_kind = torch.full_like(wrong, -1, dtype=torch.long).index_copy(0, block, text.kinds[learned])
    right, asked = [], []
    for kind in range(len(TASKS)):
        mine = asked_kind == kind
        asked.append(int(mine.sum()))
        right.append(float((wrong[mine] == 0).sum()))
    return loss, right, asked

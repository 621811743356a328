"""MMBench-CN: multiple choice in Chinese."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ivtp.micro.formats.base import ChoiceFormat, Example, lettered, mixed_names
from ivtp.micro.world.chinese import NAMES_ZH, ask_chinese
from ivtp.micro.world.photo import Photo

REQUEST = "请直接回答选项字母。"


class MmBenchCn(ChoiceFormat):
    """Liu et al., 2023 (arXiv 2307.06281); the Chinese half, with LLaVA-1.5's Chinese prompt."""

    title = "MMBench-CN"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question with four options."""
        asked = ask_chinese(photo.scene, rng)
        if asked is None:
            return []
        others: Sequence[str] = asked.others
        if asked.kind in ("neighbour", "extreme"):
            shown = [NAMES_ZH[item.name] for item in photo.scene.objects]
            others = mixed_names(asked.answer, shown, asked.others, rng)
        choice = lettered(asked.text, asked.answer, others, rng, REQUEST)
        return [self._example(photo, choice.text, choice.answer, asked.objects, group=asked.kind)]


FORMAT = MmBenchCn

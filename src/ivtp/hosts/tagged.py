"""Prompts that say where each tile of an image is: its slots stand behind a mark and a tag, as Idefics3 writes them.

`<mark><row_1_col_1>SLOTS<mark><row_1_col_2>SLOTS newline ... newline <mark><global-img>SLOTS<mark>`: the whole comes
last, and an image that is not split is its whole alone. A tag may be one token or several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ivtp.errors import InputError

NEWLINES = 2
"""Tokens between two tiles of an image, at most, in front of the mark."""


@dataclass(frozen=True)
class Tagged:
    """One image of a prompt: so many tiles, and the columns of all that its processor wrote for it."""

    tiles: int
    columns: range


def read_tagged(ids: Sequence[int], slot: int, each: int) -> list[Tagged]:
    """The images of a prompt whose token `slot` stands for the tokens of tiles, `each` of them a tile.

    The whole is known by the tag of the last tile of the prompt, and the mark by what follows that. Raises `InputError`
    for slots that no processor writes so.
    """
    edges = [i for i, (before, after) in enumerate(pairwise((-1, *ids, -1))) if (before == slot) != (after == slot)]
    runs = list(zip(edges[::2], edges[1::2], strict=True))  # (start, stop)
    if not runs:
        return []
    mark = ids[runs[-1][1]] if runs[-1][1] < len(ids) else None
    ends = (0, *(stop for _, stop in runs))
    marks = [_last(ids, mark, end, start) for end, (start, _) in zip(ends, runs, strict=False)]
    if -1 in marks or any(stop - start != each for start, stop in runs):
        raise _unwritten(runs, each)
    tags = [ids[place + 1 : start] for place, (start, _) in zip(marks, runs, strict=True)]
    found: list[Tagged] = []
    first = 0
    for number, (_, stop) in enumerate(runs):
        if tags[number] == tags[-1]:
            found.append(Tagged(number + 1 - first, range(marks[first], stop + (ids[stop] == mark))))
            first = number + 1
        elif marks[number + 1] - stop > NEWLINES:
            raise _unwritten(runs, each)
    return found


def _last(ids: Sequence[int], mark: int | None, start: int, stop: int) -> int:
    """The last column of `mark` from `start` on and before `stop`; -1: none."""
    return next((i for i in range(stop - 1, start - 1, -1) if ids[i] == mark), -1)


def _unwritten(runs: Sequence[tuple[int, int]], each: int) -> InputError:
    lengths = sorted({stop - start for start, stop in runs})
    return InputError(
        f"the prompt has runs of {' or '.join(map(str, lengths))} image slots, which are not tiles of {each} slots "
        "each behind their marks and tags; build it with the model's processor, one <image> for each picture"
    )

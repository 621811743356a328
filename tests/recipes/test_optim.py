"""Processes that train together make the updates that one would make."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, multiprocessing

from recipes.micro.optim import orthogonalise, orthogonalise_together


def matrices(count: int) -> torch.Tensor:
    return torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(count))


def work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save([orthogonalise_together(matrices(count)) for count in (1, 2, 5)], f"{out}-{rank}")
    distributed.destroy_process_group()


def test_shares_of_two_processes_make_the_whole(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        for count, found in zip((1, 2, 5), torch.load(tmp_path / f"out-{rank}"), strict=True):
            torch.testing.assert_close(found, orthogonalise(matrices(count)))


def test_alone_nothing_is_shared() -> None:
    assert torch.equal(orthogonalise_together(matrices(3)), orthogonalise(matrices(3)))

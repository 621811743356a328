"""The tensor core of every method against `naive`: choices index by index, merges to 1e-5, relations exactly."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import naive
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ivtp.config import PruneConfig
from ivtp.core.cluster import cluster_means, density_peaks
from ivtp.core.diversity import cosine, coverage, drop_duplicates, farthest, greedy_map, max_min, nearest_better
from ivtp.core.merge import follow, mean_by_size, nearest_grid, pool_grid, sizes, take_up_neighbours
from ivtp.core.rollout import attention_row, column_sum_in_blocks, full_width_row, received
from ivtp.core.schedule import halving, quarters, ratio_of_mean, uniform_ratio
from ivtp.core.select import highest, iqr_outliers, others, ranks
from ivtp.core.tap import AttentionTap
from ivtp.cost.sizes import sizes as sizes_of
from ivtp.hosts.llava import HOST
from ivtp.methods.base import Window
from ivtp.methods.cdpruner import conditional_kernel
from ivtp.methods.dart import least_similar
from ivtp.methods.dynamicvit import Predictor
from ivtp.methods.evit import keep_and_fuse
from ivtp.methods.fsr import focus_and_scan, priority, refined
from ivtp.methods.hiprune import HiPrune, anchors_and_registers
from ivtp.methods.holov import HoloV, crops_of, holistic_scores, quotas, within_quotas
from ivtp.methods.ivtp_plus import IvtpPlus
from ivtp.methods.mmtok import covering_shares
from ivtp.methods.prumerge_plus import with_samples
from ivtp.methods.sparsevlm import raters, recycling
from ivtp.methods.spatial import local_similarity
from ivtp.methods.tome import ToMe
from ivtp.methods.tops import preservation_set
from ivtp.methods.visionzip import contextual_count, merge_contextual
from ivtp.methods.vispruner import important_and_distinct
from ivtp.plan import Cut

CLEAR = 2e-5
"""A decision that is won by less, relative to the values, is left to rounding."""
SOME = settings(max_examples=30)

seeds = st.integers(0, 10_000)
batches = st.integers(1, 3)
lengths = st.integers(2, 40)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def uniform(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=generator(seed)).to(dtype)


def plain(tensor: Tensor) -> Any:
    return tensor.double().tolist()


def distances(seed: int, batch: int, length: int, dim: int = 4) -> Tensor:
    """Symmetric to the last bit, zeros on the diagonal."""
    points = normal(seed, batch, length, dim).double()
    apart = (points[:, :, None] - points[:, None]).norm(dim=-1)
    return ((apart + apart.transpose(1, 2)) / 2).float()


def clear(gaps: list[float]) -> bool:
    return all(gap > CLEAR for gap in gaps)


def near(actual: Tensor, expected: Any) -> None:
    """1e-5 in float32; in bfloat16 what a few roundings to 8 bits make of sums of numbers up to 4."""
    assert torch.isfinite(actual).all()
    atol, rtol = (0.02, 2**-7) if actual.dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=rtol)


# --- diversity -----------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, batch=batches, length=lengths, dim=st.integers(2, 9), dtype=dtypes)
def test_cosine_of_all_pairs(seed: int, batch: int, length: int, dim: int, dtype: torch.dtype) -> None:
    features = normal(seed, batch, length, dim, dtype=dtype)
    actual = cosine(features)
    assert actual.dtype == torch.float32
    near(actual, [naive.cosines(sample) for sample in plain(features)])


def test_cosine_of_a_token_of_zeros_is_finite() -> None:
    features = normal(0, 2, 5, 3)
    features[0, 2] = 0
    assert torch.isfinite(cosine(features)).all()


def test_cosine_of_tiny_and_of_huge_tokens() -> None:
    features = normal(0, 2, 5, 3)
    scaled = features * torch.tensor([1e-6, 1e-3, 1, 1e3, 1e6])[:, None]
    torch.testing.assert_close(cosine(scaled), cosine(features), atol=1e-5, rtol=0)


@SOME
@given(seed=seeds, batch=batches, length=st.integers(1, 40), data=st.data())
def test_max_min_is_greedy(seed: int, batch: int, length: int, data: st.DataObject) -> None:
    distance = distances(seed, batch, length)
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    expected = [naive.max_min(sample, count, gaps) for sample in plain(distance)]
    assume(clear(gaps))
    assert max_min(distance, count).tolist() == expected
    assert all(max_min(distance[b : b + 1], count).tolist() == [row] for b, row in enumerate(expected))


@pytest.mark.parametrize("value", [0.0, 0.5, -1e-7])
def test_max_min_of_equal_distances_takes_the_lower_index(value: float) -> None:
    distance = torch.full((2, 6, 6), value)
    distance.diagonal(dim1=1, dim2=2).zero_()
    assert max_min(distance, 6).tolist() == [list(range(6))] * 2


@given(seed=seeds, copies=st.integers(2, 4))
def test_max_min_of_duplicates_takes_each_token_once(seed: int, copies: int) -> None:
    distance = distances(seed, 1, 5).repeat(1, copies, copies)
    count = 5 * copies
    expected = naive.max_min(plain(distance)[0], count)
    assert max_min(distance, count).tolist() == [expected]
    assert sorted(expected) == list(range(count))


@given(seed=seeds)
def test_max_min_among_small_whole_distances(seed: int) -> None:
    """Many ties, all of them exact."""
    distance = torch.randint(0, 3, (2, 12, 12), generator=generator(seed)).float()
    distance = distance.triu(1) + distance.triu(1).transpose(1, 2)
    assert max_min(distance, 12).tolist() == [naive.max_min(sample, 12) for sample in plain(distance)]


@SOME
@given(seed=seeds, batch=batches, length=st.integers(1, 40), data=st.data())
def test_farthest_from_what_each_row_holds(seed: int, batch: int, length: int, data: st.DataObject) -> None:
    """Rows of a batch begin with different numbers of given points."""
    distance = distances(seed, batch, length)
    given_points = torch.stack([torch.randperm(length, generator=generator(seed + b)) for b in range(batch)])
    count = data.draw(st.integers(1, length))
    held = [data.draw(st.integers(1, count)) for _ in range(batch)]
    gaps: list[float] = []
    expected = [
        naive.farthest(plain(distance[b]), given_points[b, : held[b]].tolist(), count, gaps) for b in range(batch)
    ]
    assume(clear(gaps))
    assert farthest(distance, given_points, torch.tensor(held), count).tolist() == expected


def gram(seed: int, batch: int, length: int, rank: int) -> Tensor:
    factors = normal(seed, batch, length, rank).double()
    return (factors @ factors.transpose(1, 2) / rank).float()


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 9), data=st.data())
def test_greedy_map_raises_the_determinant_most(seed: int, batch: int, length: int, data: st.DataObject) -> None:
    """Every candidate's determinant, by elimination."""
    kernel = gram(seed, batch, length, length + 3)
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    expected = [naive.greedy_determinant(sample, count, gaps) for sample in plain(kernel)]
    assume(all(gap > 1e-4 for gap in gaps))
    assert greedy_map(kernel, count).tolist() == expected


@SOME
@given(seed=seeds, batch=batches, length=lengths, data=st.data())
def test_greedy_map_of_many_items(seed: int, batch: int, length: int, data: st.DataObject) -> None:
    """A kernel with a slowly falling spectrum, so that no variance drowns in rounding."""
    kernel = gram(seed, batch, length, 12) + 0.2 * torch.diag_embed(uniform(seed + 1, batch, length))
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    expected = [naive.greedy_schur(sample, count, gaps=gaps) for sample in plain(kernel)]
    assume(clear(gaps))
    assert greedy_map(kernel, count).tolist() == expected
    assert all(greedy_map(kernel[b : b + 1], count).tolist() == [row] for b, row in enumerate(expected))


@SOME
@given(seed=seeds, batch=batches, length=st.integers(8, 40), rank=st.integers(1, 5))
def test_greedy_map_up_to_the_rank(seed: int, batch: int, length: int, rank: int) -> None:
    kernel = gram(seed, batch, length, rank)
    gaps: list[float] = []
    expected = [naive.greedy_schur(sample, rank, gaps=gaps) for sample in plain(kernel)]
    assume(clear(gaps))
    assert greedy_map(kernel, length)[:, :rank].tolist() == expected


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_greedy_map_beyond_the_rank_still_takes_each_item_once(rank: int) -> None:
    chosen = greedy_map(gram(0, 4, 24, rank), 24)
    assert chosen.sort(dim=1).values.tolist() == [list(range(24))] * 4


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_greedy_map_does_not_depend_on_the_kernels_scale(scale: float) -> None:
    kernel = gram(3, 2, 12, 20)
    assert greedy_map(kernel * scale, 12).tolist() == [naive.greedy_schur(sample, 12) for sample in plain(kernel)]


def test_greedy_map_of_a_kernel_of_zeros_takes_each_item_once() -> None:
    assert greedy_map(torch.zeros(1, 5, 5), 5).sort(dim=1).values.tolist() == [list(range(5))]


def test_greedy_map_does_not_change_its_kernel() -> None:
    kernel = gram(3, 2, 12, 20)
    before = kernel.clone()
    greedy_map(kernel, 5)
    assert torch.equal(kernel, before)


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 24), signed=st.booleans(), data=st.data())
def test_coverage_is_greedy(seed: int, batch: int, length: int, signed: bool, data: st.DataObject) -> None:
    similarity = torch.stack([torch.tensor(naive.cosines(plain(s))) for s in normal(seed, batch, length, 5)]).float()
    similarity = similarity if signed else similarity.abs()
    weight = uniform(seed + 1, batch, length)
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    pairs = list(zip(plain(similarity), plain(weight), strict=True))
    expected = [naive.coverage(s, w, count, gaps) for s, w in pairs]
    assume(clear(gaps))
    assert coverage(similarity, weight, count).tolist() == expected
    for b, row in enumerate(expected):
        assert coverage(similarity[b : b + 1], weight[b : b + 1], count).tolist() == [row]


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 24), targets=st.integers(1, 30), data=st.data())
def test_coverage_of_other_targets_is_greedy(
    seed: int, batch: int, length: int, targets: int, data: st.DataObject
) -> None:
    similarity, weight = uniform(seed, batch, length, targets), uniform(seed + 1, batch, length)
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    expected = [naive.coverage(s, w, count, gaps) for s, w in zip(plain(similarity), plain(weight), strict=True)]
    assume(clear(gaps))
    assert coverage(similarity, weight, count).tolist() == expected


@SOME
@given(seed=seeds, length=st.integers(2, 8), targets=st.integers(1, 9))
def test_greedy_coverage_grows_by_less_and_less_and_is_near_the_best(seed: int, length: int, targets: int) -> None:
    """Monotone and submodular, so that greedy reaches 1 - 1/e of the best set of any size (Nemhauser et al., 1978)."""
    similarity = uniform(seed, 1, length, targets)
    (order,), rows = coverage(similarity, torch.ones(1, length), length).tolist(), plain(similarity[0])
    totals = [naive.covered(rows, order[:k]) for k in range(length + 1)]
    gains = [after - before for before, after in itertools.pairwise(totals)]
    assert all(gain >= 0 for gain in gains)
    assert all(before >= after - 1e-6 for before, after in itertools.pairwise(gains))
    for size in range(1, length + 1):
        best = max(naive.covered(rows, members) for members in itertools.combinations(range(length), size))
        assert totals[size] >= (1 - math.exp(-1)) * best


def test_coverage_without_any_gain_still_takes_each_point_once() -> None:
    similarity = torch.eye(5).repeat(2, 1, 1)
    for weight in (torch.zeros(2, 5), torch.ones(2, 5)):
        assert coverage(similarity, weight, 5).sort(dim=1).values.tolist() == [list(range(5))] * 2
    same = coverage(torch.ones(2, 5, 5), torch.ones(2, 5), 5)
    assert same.sort(dim=1).values.tolist() == [list(range(5))] * 2


@SOME
@given(seed=seeds, batch=batches, length=lengths, step=st.integers(1, 25), dtype=dtypes, data=st.data())
def test_duplicates_leave_in_rounds(
    seed: int, batch: int, length: int, step: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    features = normal(seed, batch, length, 6, dtype=dtype)
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    expected = [naive.drop_duplicates(sample, count, step, gaps) for sample in plain(features)]
    assume(clear(gaps))
    actual = drop_duplicates(features, count, step)
    assert actual.tolist() == expected
    assert all(drop_duplicates(features[b : b + 1], count, step).tolist() == [row] for b, row in enumerate(expected))


def test_of_true_duplicates_one_stays() -> None:
    features = normal(0, 1, 9, 4)
    features[0, 4] = 3 * features[0, 7]
    (left,) = drop_duplicates(features, 8, 8).tolist()
    assert set(range(9)) - set(left) == {4}


# --- clusters ------------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, batch=batches, length=lengths, neighbours=st.integers(2, 7), dtype=dtypes, data=st.data())
def test_density_peaks(
    seed: int, batch: int, length: int, neighbours: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    tokens = normal(seed, batch, length, 5, dtype=dtype)
    clusters = data.draw(st.integers(1, length))
    # two neighbours make two tokens that are each other's nearest equally dense, which `cdist` rounds away above 25
    assume(neighbours > 2 or length <= 25)
    gaps: list[float] = []
    expected = [naive.density_peaks(sample, clusters, neighbours, gaps) for sample in plain(tokens)]
    assume(clear(gaps))
    centres, member = density_peaks(tokens, clusters, neighbours)
    assert centres.shape == (batch, clusters)
    assert [sorted(row) for row in centres.tolist()] == [sorted(row) for row, _ in expected]
    assert centres.gather(1, member).tolist() == [row for _, row in expected]
    for b in range(batch):
        alone = density_peaks(tokens[b : b + 1], clusters, neighbours)
        assert torch.equal(alone[0][0], centres[b])
        assert torch.equal(alone[1][0], member[b])


@pytest.mark.parametrize("clusters", [1, 3, 6])
def test_equal_tokens_still_make_all_clusters(clusters: int) -> None:
    centres, member = density_peaks(torch.ones(2, 6, 4), clusters, 5)
    for row, cluster in zip(centres.tolist(), member.tolist(), strict=True):
        assert len(set(row)) == clusters
        assert [cluster[c] for c in row] == list(range(clusters))


@SOME
@given(seed=seeds, batch=batches, length=lengths, clusters=st.integers(1, 6), dtype=dtypes)
def test_cluster_means(seed: int, batch: int, length: int, clusters: int, dtype: torch.dtype) -> None:
    tokens = normal(seed, batch, length, 5, dtype=dtype)
    clusters = min(clusters, length)
    member = torch.stack([torch.randperm(length, generator=generator(seed + b)) % clusters for b in range(batch)])
    expected = []
    for sample, clustered in zip(plain(tokens), member.tolist(), strict=True):
        expected.append(
            [naive.mean([t for t, c in zip(sample, clustered, strict=True) if c == k]) for k in range(clusters)]
        )
    near(cluster_means(tokens, member, clusters), expected)


# --- merges --------------------------------------------------------------------------------------------------------


def relation(seed: int, patches: int, columns: int) -> tuple[list[int], list[int], list[int]]:
    """Sources, the patch of each column (one in front is none) and where the columns go."""
    draw = generator(seed)
    alive = torch.randperm(patches, generator=draw)[:columns].tolist()
    columns = len(alive)
    sources = [
        alive[torch.randint(columns, (), generator=draw)] if torch.rand((), generator=draw) < 0.8 else -1
        for _ in range(patches)
    ]
    for p in alive:
        sources[p] = p
    stays = [torch.rand((), generator=draw).item() < 0.5 for _ in range(columns)]
    targets = [1 + i for i, s in enumerate(stays) if s] + [-1]
    into = [1 + i if s else targets[torch.randint(len(targets), (), generator=draw)] for i, s in enumerate(stays)]
    return sources, [-1, *alive], [0, *into]


@given(seed=seeds, batch=batches, patches=lengths, data=st.data())
def test_sources_follow_what_was_merged(seed: int, batch: int, patches: int, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, patches))
    samples = [relation(seed + b, patches, columns) for b in range(batch)]
    sources, patch, into = (torch.tensor(column) for column in zip(*samples, strict=True))
    assert follow(sources, patch, into).tolist() == [naive.follow(*sample) for sample in samples]
    assert sizes(sources, patch).dtype == torch.float32
    assert sizes(sources, patch).tolist() == [naive.sizes(s, p) for s, p, _ in samples]


def test_following_twice_is_following_the_chain() -> None:
    """0 goes into 1, then 1 into 3; 2 is dropped at once."""
    sources = torch.tensor([[0, 1, 2, 3]])
    sources = follow(sources, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 1, -1, 3]]))
    assert sources.tolist() == [[1, 1, -1, 3]]
    sources = follow(sources, torch.tensor([[1, 3]]), torch.tensor([[1, 1]]))
    assert sources.tolist() == [[3, 3, -1, 3]]


@SOME
@given(seed=seeds, batch=batches, length=lengths, neighbours=st.integers(1, 40), dtype=dtypes, data=st.data())
def test_kept_tokens_take_up_their_neighbours(
    seed: int, batch: int, length: int, neighbours: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    hidden = normal(seed, batch, 1 + length, 6, dtype=dtype)
    key = normal(seed + 1, batch, 2, 1 + length, 3, dtype=dtype)
    attention = normal(seed + 2, batch, 1 + length).softmax(1)[:, 1:]
    count = data.draw(st.integers(1, length - 1))
    kept = torch.stack([torch.randperm(length, generator=generator(seed + b))[:count] for b in range(batch)])
    expected, gaps = [], []
    for b in range(batch):
        keys = naive.concatenate_heads(plain(key[b]))[1:]
        patches = plain(hidden[b])[1:]
        expected.append(
            naive.take_up_neighbours(patches, keys, plain(attention[b]), kept[b].tolist(), neighbours, gaps)
        )
    assume(clear(gaps))
    merged, into, stay = take_up_neighbours(hidden, key, attention, kept, neighbours)
    assert merged.dtype == dtype
    assert merged.shape == hidden.shape
    for b, (tokens, place, goes) in enumerate(expected):
        assert stay[b].tolist() == [1 + k for k in [*kept[b].tolist(), place]]
        assert into[b, 1:].tolist() == [1 + g for g in goes]
        near(merged[b, stay[b]], tokens)


def test_a_kept_patch_takes_up_its_kept_neighbour_but_not_itself() -> None:
    """Patches 0 and 1 look the same way and both stay; 2 and 3 look elsewhere."""
    hidden = torch.tensor([[[9.0], [1.0], [10.0], [100.0], [1000.0]]])  # CLS, then the patches
    key = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.2]]]).unsqueeze(1)
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    merged, _, order = take_up_neighbours(hidden, key, attention, torch.tensor([[0, 1]]), 1)
    assert order.tolist() == [[1, 2, 3]]
    near(merged[0, order[0], 0], [1 + 0.3 * 10, 10 + 0.4 * 1, 0.2 * 100 + 0.1 * 1000])


def test_pooled_cells_are_those_of_adaptive_pooling() -> None:
    for rows, columns in itertools.product(range(1, 7), repeat=2):
        patches = normal(rows * columns, 2, rows * columns, 3)
        for grid in itertools.product(range(1, rows + 1), range(1, columns + 1)):
            pooled, centre, stands = pool_grid(patches, (rows, columns), grid)
            means = [naive.pool(sample, (rows, columns), grid) for sample in plain(patches)]
            near(pooled, [m for m, _ in means])
            covered = means[0][1]
            centre, stands = centre.tolist(), stands.tolist()
            assert len(set(centre)) == len(covered)
            for cell, middle in zip(covered, centre, strict=True):
                places = [divmod(p, columns) for p in cell]
                row, column = (sum(axis) / len(cell) for axis in zip(*places, strict=True))
                far = {p: abs(r - row) ** 2 + abs(c - column) ** 2 for p, (r, c) in zip(cell, places, strict=True)}
                assert far[middle] == min(far.values())
            for patch in range(rows * columns):
                own = patch in centre
                assert stands[patch] == (
                    patch if own else next(m for c, m in zip(covered, centre, strict=True) if patch in c)
                )


def test_pooling_in_bfloat16() -> None:
    patches = normal(0, 2, 35, 4, dtype=torch.bfloat16)
    pooled, _, _ = pool_grid(patches, (5, 7), (2, 3))
    assert pooled.dtype == torch.bfloat16
    near(pooled, [naive.pool(sample, (5, 7), (2, 3))[0] for sample in plain(patches)])


@given(tokens=st.integers(1, 60), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_the_nearest_grid(tokens: int, rows: int, columns: int) -> None:
    """Nearest size, then squarest cells, then the larger."""
    tokens = min(tokens, rows * columns)

    def rating(grid: tuple[int, int]) -> tuple[float, float, int]:
        height, width = rows / grid[0], columns / grid[1]
        return abs(grid[0] * grid[1] - tokens), abs(height - width), -grid[0] * grid[1]

    every = itertools.product(range(1, rows + 1), range(1, columns + 1))
    actual = rating(nearest_grid(tokens, rows, columns))
    assert actual == pytest.approx(min(map(rating, every)))


# --- selections ----------------------------------------------------------------------------------------------------


@given(seed=seeds, batch=batches, length=st.integers(1, 40), dtype=dtypes, ties=st.booleans(), data=st.data())
def test_highest_ranks_and_others(
    seed: int, batch: int, length: int, dtype: torch.dtype, ties: bool, data: st.DataObject
) -> None:
    """bfloat16 has ties of its own."""
    scores = normal(seed, batch, length, dtype=dtype)
    if ties:
        scores = scores.round()
    count = data.draw(st.integers(0, length))
    chosen = highest(scores, count)
    expected = [naive.descending(row)[:count] for row in plain(scores)]
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == expected
    assert others(chosen, length).tolist() == [naive.others(row, length) for row in expected]
    assert ranks(chosen, length).tolist() == [naive.ranks(row, length) for row in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_of_equal_scores_the_lower_index_is_highest(dtype: torch.dtype) -> None:
    assert highest(torch.zeros(2, 700, dtype=dtype), 300).tolist() == [list(range(300))] * 2
    scores = torch.tensor([[0.0, -0.0, float("-inf"), 0.0]], dtype=dtype)
    assert highest(scores, 4).tolist() == [[0, 1, 3, 2]]


@given(seed=seeds, batch=batches, length=st.integers(1, 40), dtype=dtypes, heavy=st.booleans())
def test_iqr_outliers(seed: int, batch: int, length: int, dtype: torch.dtype, heavy: bool) -> None:
    scores = normal(seed, batch, length, dtype=dtype)
    scores = scores**3 if heavy else scores
    limits = [naive.outlier_limit(row) for row in plain(scores)]
    assume(all(abs(x - limit) > 1e-5 for row, limit in zip(plain(scores), limits, strict=True) for x in row))
    expected = [[x > limit for x in row] for row, limit in zip(plain(scores), limits, strict=True)]
    assert iqr_outliers(scores).tolist() == expected


def test_equal_scores_have_no_outliers() -> None:
    assert not iqr_outliers(torch.full((2, 9), 0.25)).any()


# --- attention rows ------------------------------------------------------------------------------------------------


def tap_of(
    seed: int, batch: int, length: int, groups: int, *, causal: bool, padding: bool, answer: bool, dtype: torch.dtype
) -> AttentionTap:
    """Padding lies on the left of all rows but the first; a short answer lies in front of the last token."""
    query = normal(seed, batch, 4, length, 3, dtype=dtype)
    key, value = (normal(seed + k, batch, 4 // groups, length, 3, dtype=dtype) for k in (1, 2))
    valid = hidden = None
    if padding:
        valid = torch.ones(batch, length, dtype=torch.bool)
        for b in range(1, batch):
            valid[b, : min(b + 1, length - 1)] = False
    if answer:
        hidden = torch.zeros(batch, length, dtype=torch.bool)
        hidden[:, length - 1 - min(2, length - 2) : length - 1] = True
    return AttentionTap(query, key, value, 0.7, causal, valid, hidden)


def maps_of(tap: AttentionTap) -> list[list[list[float]]]:
    """Head-mean attention of every sample."""
    out = []
    for b in range(len(tap.query)):
        valid = None if tap.valid is None else tap.valid[b].tolist()
        hidden = None if tap.hidden_from_last is None else tap.hidden_from_last[b].tolist()
        heads = naive.attention_map(plain(tap.query[b]), plain(tap.key[b]), tap.scale, tap.causal, valid, hidden)
        out.append(naive.head_mean(heads))
    return out


taps = st.builds(
    tap_of,
    seeds,
    batches,
    st.integers(2, 12),
    st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    padding=st.booleans(),
    answer=st.booleans(),
    dtype=dtypes,
)


@SOME
@given(tap=taps, data=st.data())
def test_a_row_of_attention_for_each_sample(tap: AttentionTap, data: st.DataObject) -> None:
    batch, length = len(tap.query), tap.query.shape[2]
    least = 0 if tap.valid is None else min(3, length - 1)
    # the last row, where an answer is hidden, has a test of its own
    most = length - 1 if tap.hidden_from_last is None else max(0, length - 2)
    assume(least <= most)
    rows = [data.draw(st.integers(least, most)) for _ in range(batch)]
    maps = maps_of(tap)
    actual = attention_row(tap, torch.tensor(rows))
    assert actual.dtype == torch.float32
    near(actual, [m[r] for m, r in zip(maps, rows, strict=True)])
    near(attention_row(tap, rows[0]), [m[rows[0]] for m in maps])
    near(attention_row(tap, -1), [m[-1] for m in maps])


@pytest.mark.parametrize("causal", [False, True])
def test_the_last_row_by_number_is_as_blind_as_row_minus_one(causal: bool) -> None:
    tap = tap_of(3, 2, 7, 2, causal=causal, padding=False, answer=True, dtype=torch.float32)
    torch.testing.assert_close(attention_row(tap, torch.tensor([6, 6])), attention_row(tap, -1))


@SOME
@given(tap=taps, first=st.integers(0, 11), block=st.integers(1, 13))
def test_weighted_column_sums_of_the_last_rows(tap: AttentionTap, first: int, block: int) -> None:
    batch, length = len(tap.query), tap.query.shape[2]
    first = min(first, length - 1)
    weights = uniform(5, batch, length)
    weights[:, :first] = 0
    if tap.valid is not None:
        weights = weights * tap.valid  # a row of padding is no question
    expected = [naive.weighted_sum(m, w) for m, w in zip(maps_of(tap), plain(weights), strict=True)]
    near(column_sum_in_blocks(tap, weights, block, first), expected)


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 20), heads=st.integers(1, 4), dtype=dtypes)
def test_attention_over_the_full_width(seed: int, batch: int, length: int, heads: int, dtype: torch.dtype) -> None:
    query, key = (normal(seed + k, batch, heads, length, 3, dtype=dtype) for k in (0, 1))
    tap = AttentionTap(query, key, key, 3**-0.5, False)
    for row in (0, length - 1):
        expected = []
        for q, k in zip(plain(query), plain(key), strict=True):
            wide_q, wide_k = naive.concatenate_heads(q), naive.concatenate_heads(k)
            expected.append(naive.softmax([naive.dot(wide_q[row], other) / (3 * heads) ** 0.5 for other in wide_k]))
        actual = full_width_row(tap, row)
        assert actual.dtype == torch.float32
        near(actual, expected)


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 12), dtype=dtypes)
def test_received_attention_counts_every_query(seed: int, batch: int, length: int, dtype: torch.dtype) -> None:
    tap = tap_of(seed, batch, length, 1, causal=False, padding=False, answer=False, dtype=dtype)
    near(received(tap), [naive.mean(m) for m in maps_of(tap)])


# --- EViT, ToMe ----------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, batch=batches, length=lengths, dtype=dtypes, data=st.data())
def test_evit_keeps_in_score_order_and_fuses(
    seed: int, batch: int, length: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    tokens = normal(seed, batch, length, 5, dtype=dtype)
    attention = normal(seed + 1, batch, 1 + length).softmax(1)[:, 1:]
    count = data.draw(st.integers(0, length))
    kept, gone, fused = keep_and_fuse(tokens, attention, count)
    expected = [naive.keep_and_fuse(t, a, count) for t, a in zip(plain(tokens), plain(attention), strict=True)]
    assert kept.tolist() == [e[0] for e in expected]
    assert gone.tolist() == [e[1] for e in expected]
    assert fused.shape == (batch, 1, 5)
    near(fused, [[e[2]] for e in expected])


def test_evit_of_equal_attention_keeps_the_lower_index() -> None:
    kept, gone, _ = keep_and_fuse(normal(0, 2, 9, 3), torch.full((2, 9), 0.1), 4)
    assert kept.tolist() == [[0, 1, 2, 3]] * 2
    assert gone.tolist() == [[4, 5, 6, 7, 8]] * 2


def test_tome_protects_no_patch_of_a_tower_without_cls() -> None:
    """Patch 0 is the twin of patch 3: with a CLS token in its column it would stay."""
    size = dataclasses.replace(geometry(8), vision_cls=0)
    method = ToMe(PruneConfig(method="tome", keep=7), size)
    key = normal(0, 1, 2, 8, 4)
    key[:, :, 0] = key[:, :, 3]
    tap, patch = AttentionTap(key, key, key, 0.5, False), torch.arange(8)[None]
    cut = Cut("vision", 0, 7, taps=(0,), sized=True)
    merged = method.merge(Window(cut, (tap,), normal(1, 1, 8, 5), patch, 0, sources=patch))
    assert merged.into.tolist() == [[3, 1, 2, 3, 4, 5, 6, 7]]
    assert sorted(merged.order[0].tolist()) == [1, 2, 3, 4, 5, 6, 7]


def geometry(patches: int = 36) -> Any:
    return dataclasses.replace(HOST.geometry(HOST.tiny()[0].config), num_patches=patches)


@pytest.fixture(scope="module")
def tome() -> ToMe:
    return ToMe(PruneConfig(method="tome", keep=4), geometry())


@SOME
@given(seed=seeds, batch=batches, columns=lengths, dtype=dtypes, data=st.data())
def test_tome_merges_by_size(
    tome: ToMe, seed: int, batch: int, columns: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A later layer: the tokens stand for different numbers of patches already."""
    patches = columns + data.draw(st.integers(0, 20))
    keep = data.draw(st.integers((columns + 1) // 2, columns))
    samples = []
    for b in range(batch):
        draw = generator(seed + b)
        alive = torch.randperm(patches, generator=draw)[:columns].tolist()
        sources = [alive[torch.randint(columns, (), generator=draw)] for _ in range(patches)]
        for p in alive:
            sources[p] = p
        samples.append((sources, [-1, *alive]))
    sources, patch = (torch.tensor(column) for column in zip(*samples, strict=True))
    hidden = normal(seed, batch, 1 + columns, 5, dtype=dtype)
    key = normal(seed + 1, batch, 2, 1 + columns, 4, dtype=dtype)
    tap = AttentionTap(key, key, key, 0.5, False)
    cut = Cut("vision", 3, keep, taps=(3,), sized=True)
    merged = tome.merge(Window(cut, (tap,), hidden, patch, 0, sources=sources))
    assert merged is not None
    assert merged.order is not None
    for b in range(batch):
        metric = [naive.mean(heads) for heads in zip(*plain(key[b]), strict=True)]
        gaps: list[float] = []
        into, stay = naive.match(metric, columns - keep, gaps)
        assume(clear(gaps))
        assert merged.into[b, 1:].tolist() == into[1:]
        assert [c for c in merged.order[b].tolist() if c != 0] == [c for c in stay if c != 0]
        tokens = naive.merge_by_size(plain(hidden[b]), naive.sizes(*samples[b]), into)
        near(merged.hidden[b, stay], [tokens[c] for c in stay])


# --- IVTP+ ---------------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, batch=batches, length=lengths, dtype=dtypes)
def test_the_nearest_better_one(seed: int, batch: int, length: int, dtype: torch.dtype) -> None:
    features = normal(seed, batch, length, 4, dtype=dtype)
    scores = torch.randint(3, (batch, length), generator=generator(seed)).float()  # many are equal
    found = nearest_better(scores, features)
    assert found.dtype == torch.float32
    for b in range(batch):
        near(found[b], naive.nearest_better(plain(scores[b]), plain(features[b])))


@pytest.mark.parametrize("shared", [False, True])
def test_a_token_is_worth_less_beside_a_better_one_of_its_budget(shared: bool) -> None:
    """Two images of which the second repeats the keys of the first: twins count where both share a budget."""
    size = geometry(6)
    method = IvtpPlus(PruneConfig(method="ivtp+", keep=3, options={"llm_layers": 6}), size)
    cut = next(cut for cut in method.plan.cuts if cut.where == "llm")
    heads, width = size.text_heads, size.text_head_dim
    half = normal(0, 1, size.text_kv_heads, 6, width)
    key = torch.cat(
        [normal(1, 1, size.text_kv_heads, 2, width), half, half, normal(2, 1, size.text_kv_heads, 3, width)], 2
    )
    query, value = normal(3, 1, heads, 17, width), normal(4, 1, size.text_kv_heads, 17, width)
    tap = AttentionTap(query, key, value, 0.5, causal=True)
    patch = torch.tensor([[-1, -1, *range(12), -1, -1, -1]])
    segment = None if shared else torch.tensor([[-1, -1, *[0] * 6, *[1] * 6, -1, -1, -1]])
    window = Window(
        cut, (tap,) * 3, key[0, 0][None], patch, -1, images=(2,), entered=((6, 6),), keeps=((3, 3),), segment=segment
    )
    worth, scores = super(IvtpPlus, method).score(window)[0], method.score(window)[0]
    keys = plain(key[0].transpose(0, 1).flatten(1))
    for own in [range(2, 14)] if shared else [range(2, 8), range(8, 14)]:
        less = naive.nearest_better([float(worth[i]) for i in own], [keys[i] for i in own])
        near(scores[list(own)], [float(worth[i]) * (1 - x) for i, x in zip(own, less, strict=True)])
    twins = [(scores[i] * scores[i + 6]).item() for i in range(2, 8)]
    assert all((abs(product) < 1e-8) == shared for product in twins)


@SOME
@given(seed=seeds, length=st.integers(2, 12))
def test_gradients_of_a_mean_reach_all_that_is_in_it(seed: int, length: int) -> None:
    hidden = normal(seed, 1, length, 3).requires_grad_()
    into = torch.zeros(1, length, dtype=torch.long)
    into[0, -1] = -1
    mean_by_size(hidden, into, torch.ones(1, length))[0, 0].sum().backward()
    reached = hidden.grad[0].abs().sum(dim=1) > 0
    assert reached[:-1].all()
    assert not reached[-1]


# --- VisionZip, VisPruner, HiPrune ---------------------------------------------------------------------------------


def test_ten_of_sixty_four_are_contextual() -> None:
    assert contextual_count(64) == 10
    counts = [contextual_count(keep) for keep in range(1, 577)]
    assert counts == sorted(counts)
    for keep, count in enumerate(counts, start=1):
        assert 0 <= count < keep  # CLS is always there
        assert abs(count - keep * 10 / 64) < 1


@SOME
@given(seed=seeds, batch=batches, length=lengths, dtype=dtypes, data=st.data())
def test_contextual_tokens(seed: int, batch: int, length: int, dtype: torch.dtype, data: st.DataObject) -> None:
    hidden = normal(seed, batch, length, 5, dtype=dtype)
    metric = normal(seed + 1, batch, length, 4)
    size = data.draw(st.integers(1, length))
    count = data.draw(st.integers(1, size))
    rest = torch.stack([torch.randperm(length, generator=generator(seed + b))[:size].sort()[0] for b in range(batch)])
    gaps: list[float] = []
    expected = [
        naive.merge_contextual(h, m, r, count, gaps)
        for h, m, r in zip(plain(hidden), plain(metric), rest.tolist(), strict=True)
    ]
    assume(clear(gaps))
    targets, loose, merged, goes = merge_contextual(hidden, metric, rest, count)
    assert targets.tolist() == [e[0] for e in expected]
    assert loose.tolist() == [e[1] for e in expected]
    assert goes.tolist() == [e[3] for e in expected]
    near(merged, [e[2] for e in expected])


@SOME
@given(seed=seeds, batch=batches, length=lengths, step=st.sampled_from([1, 3, 8]), dtype=dtypes, data=st.data())
def test_important_and_distinct(
    seed: int, batch: int, length: int, step: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    features = normal(seed, batch, length, 6, dtype=dtype)
    attention = normal(seed + 1, batch, length).softmax(1)
    keep = data.draw(st.integers(1, length))
    important = data.draw(st.integers(0, keep))
    gaps: list[float] = []
    expected = [
        naive.important_and_distinct(f, a, keep, important, step, gaps)
        for f, a in zip(plain(features), plain(attention), strict=True)
    ]
    assume(clear(gaps))
    assert important_and_distinct(features, attention, keep, important, step).tolist() == expected


@pytest.mark.parametrize(("keep", "anchors"), [(64, 1), (128, 3), (192, 4)])
def test_hiprune_at_the_papers_sizes(keep: int, anchors: int) -> None:
    """Layers 9 and 23 of 24, counted from 1; a tenth of the tokens are anchors with their four neighbours."""
    method = HiPrune(PruneConfig(method="hiprune", keep=keep), sizes_of("llava-1.5-7b").geometry)
    assert [cut.taps for cut in method.plan.cuts] == [(8, 22)]
    assert method.anchors == anchors


@SOME
@given(seed=seeds, batch=batches, rows=st.integers(1, 6), columns=st.integers(1, 6), data=st.data())
def test_anchors_neighbours_and_registers(seed: int, batch: int, rows: int, columns: int, data: st.DataObject) -> None:
    length = rows * columns
    middle, deep = uniform(seed, batch, length), uniform(seed + 1, batch, length)
    keep = data.draw(st.integers(1, length))
    anchors = data.draw(st.integers(0, keep // 5))
    chosen = anchors_and_registers(middle, deep, (rows, columns), anchors, keep)
    assert chosen.shape == (batch, keep)
    for b, row in enumerate(chosen.tolist()):
        first, registers = naive.anchors_and_registers(plain(middle[b]), plain(deep[b]), (rows, columns), anchors, keep)
        assert len(row) == len(set(row))
        assert set(row) == first | registers
        assert set(row[: len(first)]) == first


# --- TOPS, MMTok, HoloV, FSR ---------------------------------------------------------------------------------------

weights = st.sampled_from([0.0, 0.5, 1.0])


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 24), diversity=weights, reach=weights, data=st.data())
def test_preservation_set(
    seed: int, batch: int, length: int, diversity: float, reach: float, data: st.DataObject
) -> None:
    features, relevance = normal(seed, batch, length, 6), normal(seed + 1, batch, length).softmax(1)
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    expected = [
        naive.preservation_set(naive.cosines(f), r, count, diversity, reach, gaps)
        for f, r in zip(plain(features), plain(relevance), strict=True)
    ]
    assume(clear(gaps))
    assert preservation_set(cosine(features), relevance, count, diversity, reach).tolist() == expected


def test_relevance_alone_is_a_ranking() -> None:
    features, relevance = normal(0, 3, 20, 6), normal(1, 3, 20).softmax(1)
    assert preservation_set(cosine(features), relevance, 9, 0.0, 0.0).tolist() == highest(relevance, 9).tolist()


def test_preservation_set_of_equal_tokens_takes_each_once() -> None:
    """Neither diversity nor coverage has anything to say then."""
    chosen = preservation_set(torch.ones(2, 7, 7), normal(0, 2, 7).softmax(1), 7, 0.5, 0.5)
    assert chosen.sort(dim=1).values.tolist() == [list(range(7))] * 2


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 16), words=st.integers(0, 5), data=st.data())
def test_the_question_and_the_image_are_covered(
    seed: int, batch: int, length: int, words: int, data: st.DataObject
) -> None:
    """Prompts of a batch ask with different numbers of words; zeros fill up."""
    tokens, features, asked = (normal(seed + k, batch, n, 6) for k, n in enumerate((length, length, words)))
    for b in range(batch):
        asked[b, max(0, words - b) :] = 0
    alpha, temperatures = data.draw(st.sampled_from([0.5, 2.0])), data.draw(st.sampled_from([(0.02, 0.2), (0.5, 1.0)]))
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    expected = [
        naive.cover_question_and_image(
            plain(asked[b, : max(0, words - b)]), plain(tokens[b]), plain(features[b]), count, alpha, temperatures, gaps
        )
        for b in range(batch)
    ]
    assume(clear(gaps))
    shares = covering_shares(asked, tokens, features, alpha, *temperatures)
    assert coverage(shares, torch.ones(batch, length), count).tolist() == expected


def test_every_word_and_every_patch_is_shared_out() -> None:
    """Targets weigh the same within either side, the image `alpha` times as much as the question."""
    words = normal(0, 2, 4, 6)
    words[1, 3] = 0
    shares = covering_shares(words, normal(1, 2, 9, 6), normal(2, 2, 9, 5), 0.5, 0.02, 0.2)
    near(shares.sum(dim=1), [[0.25] * 4 + [0.5 / 9] * 9, [1 / 3] * 3 + [0.0] + [0.5 / 9] * 9])


def test_without_words_the_image_alone_counts() -> None:
    tokens, features = normal(0, 2, 12, 6), normal(1, 2, 12, 5)
    shares = covering_shares(torch.zeros(2, 3, 6), tokens, features, 0.5, 0.02, 0.2)
    alone = (cosine(features) / 0.2).softmax(dim=2).transpose(1, 2)
    assert coverage(shares, torch.ones(2, 12), 7).tolist() == coverage(alone, torch.ones(2, 12), 7).tolist()


@SOME
@given(seed=seeds, batch=batches, length=st.integers(1, 40), data=st.data())
def test_the_best_of_every_crop(seed: int, batch: int, length: int, data: st.DataObject) -> None:
    features, attention = normal(seed, batch, length, 6), normal(seed + 1, batch, length).softmax(1)
    crops, keep = data.draw(st.integers(1, max(1, length // 2))), data.draw(st.integers(1, length))
    tau = data.draw(st.sampled_from([0.5, 1.0, 6.0]))
    gaps: list[float] = []
    expected = [
        naive.best_of_crops(f, a, crops, keep, tau, gaps)
        for f, a in zip(plain(features), plain(attention), strict=True)
    ]
    assume(clear(gaps))
    crop = crops_of(length, crops)
    rating = holistic_scores(features, attention, crop)
    for b in range(batch):
        flat = [
            s
            for row in naive.crops_of(length, crops)
            for s in naive.holistic(plain(features[b]), plain(attention[b]), row)
        ]
        near(rating[b][crop >= 0], flat)
    kept = within_quotas(rating, crop, keep, tau)
    assert [set(crop[row].tolist()) for row in kept] == expected


@SOME
@given(seed=seeds, crops=st.integers(1, 12), tau=st.sampled_from([0.0, 1.0, 30.0]), data=st.data())
def test_quotas_spend_the_budget_and_fit(seed: int, crops: int, tau: float, data: st.DataObject) -> None:
    size = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=crops, max_size=crops)))
    share = uniform(seed, 3, crops) ** tau
    keep = data.draw(st.integers(1, int(size.sum())))
    quota = quotas(share / share.sum(1, keepdim=True), size, keep)
    assert quota.sum(dim=1).tolist() == [keep] * 3
    assert ((quota >= 0) & (quota <= size)).all()


@pytest.mark.parametrize(
    ("share", "size", "keep", "expected"),
    [
        ([0.25] * 4, [9] * 4, 16, [4] * 4),
        ([1 / 18] * 18, [2] * 18, 36, [2] * 18),  # equal in spite of rounding
        ([0.4, 0.3, 0.3], [9] * 3, 5, [3, 1, 1]),  # what is short goes to the best crop
        ([0.5, 0.25, 0.25], [2, 9, 9], 8, [2, 3, 3]),  # what overflows to the others, by share times room
        ([0.6, 0.3, 0.1], [2, 2, 9], 10, [2, 2, 6]),
    ],
)
def test_quotas_by_hand(share: list[float], size: list[int], keep: int, expected: list[int]) -> None:
    assert quotas(torch.tensor([share]), torch.tensor(size), keep).tolist() == [expected]
    assert naive.quotas(share, size, keep) == expected


@pytest.mark.parametrize(("keep", "crops"), [(16, 64), (64, 16), (128, 8), (192, 5), (576, 2), (1, 288)])
def test_fewer_tokens_are_kept_of_more_crops(keep: int, crops: int) -> None:
    method = HoloV(PruneConfig(method="holov", keep=keep), sizes_of("llava-1.5-7b").geometry)
    assert method.crops(576, keep) == crops
    assert sorted(p for p in crops_of(576, crops).flatten().tolist() if p >= 0) == list(range(576))


def test_a_crop_of_equal_tokens_is_scored_by_attention() -> None:
    attention = normal(0, 2, 6).softmax(1)
    rating = holistic_scores(torch.ones(2, 6, 4), attention, crops_of(6, 3))
    torch.testing.assert_close(rating.flatten(1), attention)


@SOME
@given(seed=seeds, batch=batches, length=st.integers(1, 30), data=st.data())
def test_focus_scan_and_refine(seed: int, batch: int, length: int, data: st.DataObject) -> None:
    features, relevance = normal(seed, batch, length, 6), normal(seed + 1, batch, length)
    saliency = normal(seed + 2, batch, length).softmax(1)
    alpha, beta = data.draw(st.sampled_from([(3.0, 1.0), (1.0, 1.0), (2.0, 0.5)]))
    rho, kappa = data.draw(st.sampled_from([0.0, 0.3, 0.9])), data.draw(st.sampled_from([0.0, 1.0, 1.5, 9.0]))
    keep = data.draw(st.integers(1, length))
    gaps: list[float] = []
    samples = list(zip(plain(features), plain(saliency), plain(relevance), strict=True))
    ratings = [naive.priority(s, r, alpha, beta) for _, s, r in samples]
    expected = [
        naive.focus_and_scan(f, rating, keep, rho, kappa, gaps)
        for (f, _, _), rating in zip(samples, ratings, strict=True)
    ]
    assume(clear(gaps))
    rating = priority(saliency, relevance, alpha, beta)
    near(rating, ratings)
    chosen, into = focus_and_scan(features, rating, keep, rho, kappa)
    assert (chosen.tolist(), into.tolist()) == tuple(map(list, zip(*expected, strict=True)))
    tokens = refined(features, rating, chosen, into)
    near(tokens, [naive.refined(f, r, *e) for (f, _, _), r, e in zip(samples, ratings, expected, strict=True)])


def test_what_takes_nothing_up_stays_to_the_bit() -> None:
    """Focused patches do, and all where all are kept."""
    features, rating = normal(0, 2, 12, 6, dtype=torch.bfloat16), uniform(1, 2, 12)
    for keep, rho in ((12, 0.5), (5, 1.0)):
        chosen, into = focus_and_scan(features, rating, keep, rho, 1.0)
        assert torch.equal(
            refined(features, rating, chosen, into), features.gather(1, chosen[..., None].expand(-1, -1, 6))
        )
        assert sorted(set(into[0].tolist()) - {-1}) == sorted(chosen[0].tolist())


def test_equal_ratings_focus_on_one_patch() -> None:
    """Of CLS attention and relevance that say nothing, which the scan then completes."""
    rating = priority(torch.full((1, 9), 1 / 9), torch.full((1, 9), 0.2), 3.0, 1.0)
    chosen, _ = focus_and_scan(normal(0, 1, 9, 4), rating, 4, 0.9, 1.0)
    assert chosen[0].unique().numel() == 4
    assert torch.isfinite(rating).all()


# --- DART, SparseVLM -----------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, batch=batches, length=lengths, words=st.integers(0, 6), pivots=st.integers(1, 6), data=st.data())
def test_dart_keeps_what_is_least_similar(
    seed: int, batch: int, length: int, words: int, pivots: int, data: st.DataObject
) -> None:
    """Samples of different sizes: padding on the left, which is neither visual nor text."""
    total = length + words + 2
    hidden, norms = normal(seed, batch, total, 6), uniform(seed + 1, batch, total) + 1
    visual, text = torch.zeros(batch, total, dtype=torch.bool), torch.zeros(batch, total, dtype=torch.bool)
    budget = []
    for b in range(batch):
        shift = 2 - (b % 3)
        visual[b, shift : shift + max(1, length - b)] = True
        text[b, total - words :] = True
        text[b, total - words : total - words + b] = False
        budget.append(data.draw(st.integers(1, int(visual[b].sum()))))
    gaps: list[float] = []
    expected = [
        naive.least_similar(
            plain(hidden[b]), plain(norms[b]), visual[b].tolist(), text[b].tolist(), budget[b], pivots, gaps
        )
        for b in range(batch)
    ]
    assume(clear(gaps))
    kept = least_similar(hidden, norms, visual, text, torch.tensor(budget), pivots)
    assert kept.dtype == torch.bool
    assert [set(row.nonzero().flatten().tolist()) for row in kept] == expected
    for b in range(batch):
        one = slice(b, b + 1)
        alone = least_similar(hidden[one], norms[one], visual[one], text[one], torch.tensor(budget[one]), pivots)
        assert torch.equal(alone[0], kept[b])


@SOME
@given(
    seed=seeds, batch=batches, images=st.integers(1, 12), words=st.integers(1, 8), spare=st.integers(0, 3), dtype=dtypes
)
def test_raters(seed: int, batch: int, images: int, words: int, spare: int, dtype: torch.dtype) -> None:
    total = 3 + images + words
    entry = normal(seed, batch, total, 5, dtype=dtype)
    visual, text = torch.zeros(batch, total, dtype=torch.bool), torch.zeros(batch, total, dtype=torch.bool)
    for b in range(batch):
        visual[b, 2 : 2 + max(1, images - b)] = True
        text[b, 3 + images + min(b, words - 1) :] = True
    gaps: list[float] = []
    expected = [naive.raters(plain(entry[b]), visual[b].tolist(), text[b].tolist(), gaps) for b in range(batch)]
    assume(clear(gaps))
    tail = min(total, words + spare)
    actual = raters(entry, visual, text, tail)
    assert actual.shape == (batch, total)
    near(actual, expected)
    for b in range(batch):
        alone = raters(entry[b : b + 1], visual[b : b + 1], text[b : b + 1], tail)
        torch.testing.assert_close(alone[0], actual[b])


def test_equal_words_all_rate() -> None:
    entry = normal(0, 1, 7, 4)
    entry[0, 4:] = entry[0, 4]
    visual = torch.tensor([[False, True, True, True, False, False, False]])
    text = torch.tensor([[False, False, False, False, True, True, True]])
    near(raters(entry, visual, text, 3), [[0, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3]])


def test_a_prompt_without_words_has_no_raters() -> None:
    entry = normal(0, 2, 6, 4)
    visual = torch.tensor([[True] * 4 + [False] * 2] * 2)
    text = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    weights = raters(entry, visual, text, 2)
    assert torch.isfinite(weights).all()
    assert weights[0].sum() == 0
    near(weights[1:], [naive.raters(plain(entry[1]), visual[1].tolist(), text[1].tolist())])


def test_recycling_of_the_paper() -> None:
    assert recycling(576, 82) == (153, 16)
    assert recycling(82, 32) == (15, 2)
    assert recycling(32, 18) == (4, 1)


def test_recycling_leaves_what_is_asked_for() -> None:
    for before in range(1, 120):
        for after in range(1, before + 1):
            recycled, clusters = recycling(before, after)
            if after == before:
                assert (recycled, clusters) == (0, 0)
                continue
            kept = after - clusters
            dropped = before - kept
            assert kept >= 0
            assert 1 <= clusters <= recycled <= dropped
            # three tenths in whole numbers, and no cluster without a token
            assert recycled == max(3 * dropped // 10, clusters)
            assert clusters == 3 * dropped // 10 // 10 + 1 or kept == 0


# --- PruMerge+, CDPruner, DynamicViT -------------------------------------------------------------------------------


@SOME
@given(seed=seeds, batch=batches, length=lengths, data=st.data())
def test_a_quarter_is_most_similar_and_the_rest_is_evenly_spaced(
    seed: int, batch: int, length: int, data: st.DataObject
) -> None:
    attention = normal(seed, batch, length).softmax(1)
    count = data.draw(st.integers(1, length))
    for weights, row in zip(plain(attention), with_samples(attention, count).tolist(), strict=True):
        assert len(set(row)) == count
        order = naive.descending(weights)
        top = next((k for k in range(count) if row[k] != order[k]), count)
        # where a sample happens to follow the highest in their order, more than one quarter explains the row
        assert any(
            abs(quarter - count / 4) < 1 and row == naive.with_samples(weights, quarter, count)
            for quarter in range(top + 1)
        )


@SOME
@given(seed=seeds, batch=batches, length=lengths, dtype=dtypes)
def test_conditional_kernel(seed: int, batch: int, length: int, dtype: torch.dtype) -> None:
    """Min-max over each image alone, so that the images of a batch do not meet."""
    features = normal(seed, batch, length, 6, dtype=dtype)
    similarity = normal(seed + 1, batch, length) * 0.1 + torch.arange(batch)[:, None]
    expected = [naive.conditional_kernel(f, s) for f, s in zip(plain(features), plain(similarity), strict=True)]
    actual = conditional_kernel(features, similarity)
    assert actual.dtype == torch.float32
    near(actual, expected)
    for b in range(batch):
        torch.testing.assert_close(conditional_kernel(features[b : b + 1], similarity[b : b + 1])[0], actual[b])


def test_equal_relevance_leaves_diversity_alone() -> None:
    features = normal(0, 2, 9, 20)
    kernel = conditional_kernel(features, torch.full((2, 9), 0.2))
    near(kernel / kernel.amax(dim=(1, 2), keepdim=True), [naive.cosines(sample) for sample in plain(features)])
    chosen = greedy_map(kernel, 9)
    assert chosen.sort(dim=1).values.tolist() == [list(range(9))] * 2


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 40), data=st.data())
def test_cdpruner_chooses_by_the_conditional_determinant(
    seed: int, batch: int, length: int, data: st.DataObject
) -> None:
    features, similarity = normal(seed, batch, length, 48), normal(seed + 1, batch, length) * 0.1
    kernels = [naive.conditional_kernel(f, s) for f, s in zip(plain(features), plain(similarity), strict=True)]
    count = data.draw(st.integers(1, length))
    gaps: list[float] = []
    expected = [naive.greedy_schur(kernel, count, gaps=gaps) for kernel in kernels]
    assume(clear(gaps))
    assert greedy_map(conditional_kernel(features, similarity), count).tolist() == expected


def test_the_least_relevant_patch_comes_last() -> None:
    """Its row of the kernel is 1e-6 of the others': small, but no reason to choose a patch twice."""
    features, similarity = normal(0, 2, 30, 48), normal(1, 2, 30)
    chosen = greedy_map(conditional_kernel(features, similarity), 30)
    assert chosen[:, -1].tolist() == similarity.argmax(1).tolist()
    assert chosen.sort(dim=1).values.tolist() == [list(range(30))] * 2


def predicted(predictor: Predictor, tokens: list[list[float]], policy: list[float]) -> list[list[float]]:
    """DynamicViT's predictor from its own weights: half of each token stays local, half is the mean of the kept."""
    (before,) = (m for m in predictor.modules() if isinstance(m, torch.nn.LayerNorm))
    first, *later = (m for m in predictor.modules() if isinstance(m, torch.nn.Linear))
    hidden = []
    for token in tokens:
        token = naive.layer_norm(token, plain(before.weight), plain(before.bias), before.eps)
        hidden.append([naive.gelu(x) for x in naive.linear(token, plain(first.weight), plain(first.bias))])
    half = len(hidden[0]) // 2
    shared = [x / sum(policy) for x in naive.weighted_sum([h[half:] for h in hidden], policy)]
    out = []
    for h in hidden:
        x = [*h[:half], *shared]
        for number, layer in enumerate(later, start=1):
            x = naive.linear(x, plain(layer.weight), plain(layer.bias))
            x = [naive.gelu(v) for v in x] if number < len(later) else x
        top = max(x)
        total = top + torch.tensor([v - top for v in x], dtype=torch.float64).exp().sum().log().item()
        out.append([v - total for v in x])
    return out


@SOME
@given(seed=seeds, batch=batches, length=st.integers(2, 12), width=st.sampled_from([8, 12, 16]))
def test_predictor(seed: int, batch: int, length: int, width: int) -> None:
    predictor = Predictor(width)
    with torch.no_grad():
        for k, weight in enumerate(predictor.parameters()):
            weight.copy_(normal(seed + k, *weight.shape) * 0.6)
    tokens = normal(seed, batch, length, width)
    policy = (uniform(seed + 1, batch, length, 1) < 0.6).float()
    policy[:, 0] = 1
    pairs = zip(plain(tokens), plain(policy[..., 0]), strict=True)
    with torch.no_grad():
        actual = predictor(tokens, policy)
        assert actual.shape == (batch, length, 2)
        near(actual, [predicted(predictor, t, p) for t, p in pairs])
        torch.testing.assert_close(actual.exp().sum(-1), torch.ones(batch, length))


def test_the_predictor_has_the_papers_layers() -> None:
    linears = [m for m in Predictor(32).modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(32, 32), (32, 16), (16, 8), (8, 2)]


# --- schedules -----------------------------------------------------------------------------------------------------


@given(tokens=st.integers(1, 700), steps=st.integers(1, 30), data=st.data())
def test_uniform_ratio(tokens: int, steps: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    counts = uniform_ratio(tokens, keep, steps)
    assert len(counts) == steps
    assert counts[-1] == keep
    assert all(a >= b for a, b in itertools.pairwise([tokens, *counts]))
    for step, count in enumerate(counts, start=1):
        assert abs(count - tokens * (keep / tokens) ** (step / steps)) <= 0.5 + 1e-6


@given(tokens=st.integers(1, 700), steps=st.integers(1, 30), data=st.data())
def test_halving_never_removes_more_than_half(tokens: int, steps: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    counts = halving(tokens, keep, steps)
    least = tokens
    for _ in range(steps):
        least -= least // 2
    assert (counts is None) == (least > keep)
    if counts is None:
        return
    assert len(counts) == steps
    assert counts[-1] == keep
    assert all(b <= a <= 2 * b for a, b in itertools.pairwise([tokens, *counts]))
    even = [tokens - (tokens - keep) * step / steps for step in range(1, steps + 1)]
    if all(a < 2 * b - 1 for a, b in itertools.pairwise([tokens, *even])):
        assert all(abs(a - b) <= 1 for a, b in zip(counts, even, strict=True))


def test_tome_reaches_64_of_576_in_23_layers() -> None:
    counts = halving(576, 64, 23)
    removed = [a - b for a, b in itertools.pairwise([576, *counts])]
    assert set(removed) == {22, 23}


@pytest.mark.parametrize("layers", range(4, 61))
def test_quarters(layers: int) -> None:
    starts = quarters(layers)
    assert len(starts) == 3
    assert list(starts) == sorted(set(starts))
    for number, start in enumerate(starts, start=1):
        assert 0 < start < layers
        assert abs(start - number * layers / 4) < 1
    if layers % 4 == 0:
        assert list(starts) == [layers // 4, layers // 2, 3 * layers // 4]


@given(tokens=st.integers(1, 600), spans=st.lists(st.integers(1, 12), min_size=2, max_size=5), data=st.data())
def test_ratio_of_mean(tokens: int, spans: list[int], data: st.DataObject) -> None:
    mean = data.draw(st.integers(1, tokens))
    counts = ratio_of_mean(tokens, mean, spans)
    layers = sum(spans)
    if tokens * spans[0] + sum(spans[1:]) > mean * layers:
        assert counts is None
        return
    assert counts is not None
    assert len(counts) == len(spans) - 1
    assert all(a >= b >= 1 for a, b in itertools.pairwise([tokens, *counts]))

    def total(counts: list[int]) -> int:
        return sum(c * s for c, s in zip([tokens, *counts], spans, strict=True))

    assert total(counts) <= mean * layers
    if mean < tokens:
        assert total([c + 1 for c in counts]) > mean * layers
    # one ratio: each count is a power of it, up to whole tokens
    low, high = 0.0, 1.0
    for step, count in enumerate(counts, start=1):
        low = max(low, (max(0, count - 1) / tokens) ** (1 / step))
        high = min(high, ((count + 1) / tokens) ** (1 / step))
    assert low <= high


@pytest.mark.parametrize("side", [(1, 1), (1, 5), (4, 3), (6, 6)])
def test_local_similarity_is_the_mean_over_the_neighbours(side: tuple[int, int]) -> None:
    rows, columns = side
    patches = torch.randn(2, rows * columns, 5, generator=torch.Generator().manual_seed(0))
    found = local_similarity(patches, side)
    for sample, own in zip(plain(patches), plain(found), strict=True):
        for r in range(rows):
            for c in range(columns):
                near = [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
                near = [(i, j) for i, j in near if 0 <= i < rows and 0 <= j < columns]
                cosines = [naive.cosine(sample[r * columns + c], sample[i * columns + j]) for i, j in near]
                assert own[r * columns + c] == pytest.approx(sum(cosines) / max(len(cosines), 1), abs=1e-5)

"""The tensor cores of the pruning methods once more, slowly: Python floats, one sample at a time, loops over tokens.

Written from the papers and the methods' docstrings. Nothing is shared with the library, and nothing is vectorised, so
that the two cannot share a mistake. A function that decides between values may be given a list `gaps`: it learns by how
much each decision was won, relative to the values' size, so that a test can set aside data that float32 cannot settle.
Exact ties go to the lower index and leave no gap behind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Sequence[float]]
Gaps = list[float] | None


def _settle(values: Vector, winner: float, loser: float, gaps: Gaps) -> None:
    if gaps is not None and winner != loser and math.isfinite(winner) and math.isfinite(loser):
        gaps.append(abs(winner - loser) / max(abs(v) for v in values if math.isfinite(v)))


def argmax(values: Vector, gaps: Gaps = None) -> int:
    """The first index of the highest value."""
    return descending(values, gaps, 1)[0]


def descending(values: Vector, gaps: Gaps = None, count: int | None = None) -> list[int]:
    """Indices of the `count` highest values, the highest first; equal ones by index."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    count = len(order) if count is None else count
    for better, worse in itertools.pairwise(order[: count + 1]):
        _settle(values, values[better], values[worse], gaps)
    return order[:count]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / (norm(a) * norm(b))


def cosines(rows: Matrix) -> list[list[float]]:
    return [[cosine(a, b) for b in rows] for a in rows]


def softmax(logits: Vector) -> list[float]:
    """-inf is what may not be seen."""
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    total = math.fsum(powers)
    return [p / total for p in powers]


def mean(rows: Matrix) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def weighted_sum(rows: Matrix, weights: Vector) -> list[float]:
    return [dot(column, weights) for column in zip(*rows, strict=True)]


# --- choices -----------------------------------------------------------------------------------------------------


def others(chosen: Sequence[int], length: int) -> list[int]:
    return [i for i in range(length) if i not in chosen]


def ranks(chosen: Sequence[int], length: int) -> list[float]:
    out = [0.0] * length
    for place, index in enumerate(chosen):
        out[index] = float(len(chosen) - place)
    return out


def quantile(values: Vector, q: float) -> float:
    """Linear between the two nearest order statistics."""
    order = sorted(values)
    at = q * (len(order) - 1)
    low = math.floor(at)
    high = min(low + 1, len(order) - 1)
    return order[low] + (at - low) * (order[high] - order[low])


def outlier_limit(values: Vector) -> float:
    q1, q3 = quantile(values, 0.25), quantile(values, 0.75)
    return q3 + 1.5 * (q3 - q1)


def max_min(distance: Matrix, count: int, gaps: Gaps = None) -> list[int]:
    """DivPrune: farthest nearest neighbour first, then farthest from what is chosen."""
    length = len(distance)
    if length == 1:
        return [0]
    nearest = [min(distance[i][j] for j in range(length) if j != i) for i in range(length)]
    chosen = [argmax(nearest, gaps)]
    while len(chosen) < count:
        free = others(chosen, length)
        values = [min(distance[i][j] for j in chosen) for i in free]
        chosen.append(free[argmax(values, gaps)])
    return chosen


def farthest(distance: Matrix, given: Sequence[int], count: int, gaps: Gaps = None) -> list[int]:
    """FSR's scan: what is given, then each time what is farthest from its nearest neighbour among the chosen."""
    chosen = list(given)
    while len(chosen) < count:
        free = others(chosen, len(distance))
        values = [min(distance[i][j] for j in chosen) for i in free]
        chosen.append(free[argmax(values, gaps)])
    return chosen


def determinant(matrix: Matrix) -> float:
    """Gaussian elimination with the largest pivot of each column."""
    rows = [list(row) for row in matrix]
    product = 1.0
    for k in range(len(rows)):
        pivot = max(range(k, len(rows)), key=lambda i: abs(rows[i][k]))
        if rows[pivot][k] == 0:
            return 0.0
        if pivot != k:
            rows[k], rows[pivot] = rows[pivot], rows[k]
            product = -product
        product *= rows[k][k]
        for i in range(k + 1, len(rows)):
            factor = rows[i][k] / rows[k][k]
            for j in range(k, len(rows)):
                rows[i][j] -= factor * rows[k][j]
    return product


def greedy_determinant(kernel: Matrix, count: int, gaps: Gaps = None) -> list[int]:
    """Greedy MAP by brute force: the determinant of every candidate set."""
    chosen: list[int] = []
    while len(chosen) < count:
        free = others(chosen, len(kernel))
        sets = [[*chosen, i] for i in free]
        values = [determinant([[kernel[a][b] for b in s] for a in s]) for s in sets]
        chosen.append(free[argmax(values, gaps)])
    return chosen


def greedy_schur(kernel: Matrix, count: int, floor: float = 0.0, gaps: Gaps = None) -> list[int]:
    """The same by conditional variances: the Schur complement of what is chosen, updated in full.

    Stops early where no conditional variance is above `floor`.
    """
    rest = [list(row) for row in kernel]
    chosen: list[int] = []
    while len(chosen) < count:
        free = others(chosen, len(kernel))
        values = [rest[i][i] for i in free]
        best = free[argmax(values, None)]
        if rest[best][best] <= floor:
            break
        if gaps is not None and len(free) > 1:
            # rounding errors are in units of the kernel's diagonal, however small the variances have become
            gaps.append((rest[best][best] - max(rest[i][i] for i in free if i != best)) / max(map(max, kernel)))
        pivot = list(rest[best])
        for i in range(len(rest)):
            for j in range(len(rest)):
                rest[i][j] -= pivot[i] * pivot[j] / pivot[best]
        chosen.append(best)
    return chosen


def coverage(similarity: Matrix, weight: Vector, count: int, gaps: Gaps = None) -> list[int]:
    """SCOPE: weight times the gain of sum_j cover(j), where cover is 0 at first and never falls."""
    length = len(similarity)

    def total(members: Sequence[int]) -> float:
        return covered(similarity, members)

    chosen: list[int] = []
    while len(chosen) < count:
        free = others(chosen, length)
        values = [weight[i] * (total([*chosen, i]) - total(chosen)) for i in free]
        chosen.append(free[argmax(values, gaps)])
    return chosen


def covered(similarity: Matrix, members: Sequence[int]) -> float:
    """How well points (rows) cover the targets (columns): each as its most similar member does, never below 0."""
    return math.fsum(max([0.0, *(similarity[m][j] for m in members)]) for j in range(len(similarity[0])))


def cover_question_and_image(
    words: Matrix,
    tokens: Matrix,
    features: Matrix,
    count: int,
    alpha: float,
    temperatures: tuple[float, float],
    gaps: Gaps = None,
) -> list[int]:
    """MMTok, Algorithm 2: each time the token with which the objective of Eq. 2 is highest."""
    by_word = [softmax([cosine(word, token) / temperatures[0] for token in tokens]) for word in words]
    by_patch = [softmax([cosine(patch, other) / temperatures[1] for other in features]) for patch in features]

    def average(rows: Matrix, members: Sequence[int]) -> float:
        return math.fsum(max(row[m] for m in members) for row in rows) / len(rows) if rows else 0.0

    chosen: list[int] = []
    while len(chosen) < count:
        free = others(chosen, len(tokens))
        values = [average(by_word, [*chosen, i]) + alpha * average(by_patch, [*chosen, i]) for i in free]
        chosen.append(free[argmax(values, gaps)])
    return chosen


def preservation_set(
    similarity: Matrix, relevance: Vector, count: int, diversity: float, coverage: float, gaps: Gaps = None
) -> list[int]:
    """TOPS, Algorithm 1: the most relevant token, then the best sum of three criteria, each over its mean."""
    length = len(similarity)
    chosen = [argmax(relevance, gaps)]
    while len(chosen) < count:
        free = others(chosen, length)
        unlike = [1 - max(similarity[i][j] for j in chosen) for i in free]
        reach = [
            math.fsum(max(0.0, similarity[i][j] - max(similarity[j][k] for k in chosen)) for j in free) for i in free
        ]
        criteria = ((1.0, [relevance[i] for i in free]), (diversity, unlike), (coverage, reach))
        values = [0.0] * len(free)
        for weight, of_free in criteria:
            average = math.fsum(of_free) / len(of_free)
            for place, value in enumerate(of_free):
                values[place] += weight * value / average if average > 0 else 0.0
        chosen.append(free[argmax(values, gaps)])
    return chosen


def crops_of(length: int, crops: int) -> list[list[int]]:
    """Runs of consecutive patches, the longer ones first."""
    out, start = [], 0
    for place in range(crops):
        size = length // crops + (place < length % crops)
        out.append(list(range(start, start + size)))
        start += size
    return out


def holistic(features: Matrix, attention: Vector, crop: Sequence[int]) -> list[float]:
    """HoloV, Eq. 1-3: attention plus the variance of the similarities with the others of the crop, at its scale."""
    variance = []
    for i in crop:
        likeness = [cosine(features[i], features[j]) for j in crop if j != i]
        average = math.fsum(likeness) / max(1, len(likeness))
        variance.append(math.fsum((s - average) ** 2 for s in likeness) / max(1, len(likeness)))
    total = math.fsum(variance)
    scale = math.fsum(attention[i] for i in crop) / total if total > 0 else 0.0
    return [scale * v + attention[i] for v, i in zip(variance, crop, strict=True)]


def quotas(share: Vector, size: Sequence[int], keep: int, gaps: Gaps = None) -> list[int]:
    """HoloV: whole parts of the budget, at most a crop's size; what overflows by share times room; the rest in turn."""

    def whole(value: float) -> int:
        if gaps is not None and abs(value - round(value)) < 1e-3:
            gaps.append(0.0)
        return math.floor(value)

    wanted = [whole(s * keep) for s in share]
    quota = [min(w, m) for w, m in zip(wanted, size, strict=True)]
    over = sum(wanted) - sum(quota)
    if over:
        pull = [s * (m - q) for s, m, q in zip(share, size, quota, strict=True)]
        more = [whole(over * p / math.fsum(pull)) for p in pull]
        quota = [min(q + extra, m) for q, extra, m in zip(quota, more, size, strict=True)]
    for crop in descending(share, gaps):
        quota[crop] += min(keep - sum(quota), size[crop] - quota[crop])
    return quota


def best_of_crops(
    features: Matrix, attention: Vector, crops: int, keep: int, tau: float, gaps: Gaps = None
) -> set[int]:
    """HoloV's tokens."""
    all_crops = crops_of(len(features), crops)
    scores = [holistic(features, attention, crop) for crop in all_crops]
    worth = [(math.fsum(of_crop) / len(of_crop)) ** tau for of_crop in scores]
    quota = quotas([w / math.fsum(worth) for w in worth], [len(crop) for crop in all_crops], keep, gaps)
    chosen: set[int] = set()
    for crop, of_crop, count in zip(all_crops, scores, quota, strict=True):
        chosen |= {crop[k] for k in descending(of_crop, gaps, count)}
    return chosen


def nearest_better(scores: Vector, features: Matrix) -> list[float]:
    """IVTP+: how similar each is to the most similar one of a higher score."""
    return [
        max([0.0, *(cosine(features[i], other) for other, s in zip(features, scores, strict=True) if s > score)])
        for i, score in enumerate(scores)
    ]


def drop_duplicates(features: Matrix, count: int, step: int, gaps: Gaps = None) -> list[int]:
    """VisPruner: in rounds, the tokens at even places that are most like one at an odd place leave.

    As in the authors' code, those that stay do so in the order of their likeness, which decides the next round's split.
    """
    left = list(range(len(features)))
    while len(left) > count:
        first, second = left[0::2], left[1::2]
        if not second:
            return []
        likeness = [max(cosine(features[i], features[j]) for j in second) for i in first]
        order = descending(likeness, gaps)
        left = [first[k] for k in order[min(step, len(left) - count) :]] + second
    return left


def important_and_distinct(
    features: Matrix, attention: Vector, keep: int, important: int, step: int, gaps: Gaps = None
) -> list[int]:
    order = descending(attention)
    rest = order[important:]
    distinct = drop_duplicates([features[i] for i in rest], keep - important, step, gaps)
    return order[:important] + [rest[i] for i in distinct]


def anchors_and_registers(
    middle: Vector, deep: Vector, side: tuple[int, int], anchors: int, keep: int
) -> tuple[set[int], set[int]]:
    """HiPrune: anchors with their neighbours in the grid, and the registers that fill the rest."""
    rows, columns = side
    first: set[int] = set()
    for anchor in descending(middle)[:anchors]:
        row, column = divmod(anchor, columns)
        for r, c in ((row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < rows and 0 <= c < columns:
                first.add(r * columns + c)
    registers = [i for i in descending(deep) if i not in first]
    return first, set(registers[: max(0, keep - len(first))])


def least_similar(
    hidden: Matrix,
    norms: Vector,
    visual: Sequence[bool],
    text: Sequence[bool],
    budget: int,
    pivots: int,
    gaps: Gaps = None,
) -> set[int]:
    """DART: visual pivots stay; every pivot, in the order of the columns, takes its share of the tokens least like it.

    The pivots are the `pivots` visual and the `pivots` text columns with the largest norms.
    """
    images = [i for i, is_visual in enumerate(visual) if is_visual]
    words = [i for i, is_text in enumerate(text) if is_text]
    visual_pivots = [images[k] for k in descending([norms[i] for i in images], gaps)][: min(pivots, budget)]
    text_pivots = [words[k] for k in descending([norms[i] for i in words], gaps)][:pivots]
    choosers = sorted(visual_pivots) + sorted(text_pivots)
    kept = set(visual_pivots)
    share, more = divmod(budget - len(visual_pivots), len(choosers))
    for place, pivot in enumerate(choosers):
        free = [i for i in images if i not in kept]
        take = share + (1 if place < more else 0)
        order = descending([-cosine(hidden[i], hidden[pivot]) for i in free], gaps, take)
        kept |= {free[k] for k in order}
    return kept


def with_samples(attention: Vector, highest: int, count: int) -> list[int]:
    """PruMerge+: the `highest` most similar patches, then evenly spaced ones of the others, `count` in all."""
    chosen = descending(attention)[:highest]
    rest = others(chosen, len(attention))
    wanted = count - highest
    return chosen + [rest[k * len(rest) // wanted] for k in range(wanted)]


def raters(entry: Matrix, visual: Sequence[bool], text: Sequence[bool], gaps: Gaps = None) -> list[float]:
    """SparseVLM: text tokens whose softmax(V T^T), mean over the visual tokens, is above the average."""
    images = [i for i, is_visual in enumerate(visual) if is_visual]
    words = [i for i, is_text in enumerate(text) if is_text]
    shares = [softmax([dot(entry[i], entry[w]) for w in words]) for i in images]
    relevance = mean(shares)
    average = math.fsum(relevance) / len(relevance)
    if gaps is not None and len(words) > 1:
        gaps.extend(abs(r - average) / average for r in relevance)
    chosen = [w for w, r in zip(words, relevance, strict=True) if r > average]
    if not chosen:
        chosen = words
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(len(entry))]


# --- clusters ----------------------------------------------------------------------------------------------------


def density_peaks(tokens: Matrix, clusters: int, neighbours: int, gaps: Gaps = None) -> tuple[list[int], list[int]]:
    """Centres, the best first, and for each token the *token* that is the centre of its cluster.

    Of equally dense tokens the first counts as the denser one: two that are each other's nearest always tie when two
    neighbours count, and one of them must stand for both.
    """
    length = len(tokens)
    unit = math.sqrt(len(tokens[0]))
    distance = [[norm([x - y for x, y in zip(a, b, strict=True)]) / unit for b in tokens] for a in tokens]
    near = min(neighbours, length)
    density = [math.exp(-math.fsum(d * d for d in sorted(row)[:near]) / near) for row in distance]
    if gaps is not None:
        descending(density, gaps)
    farthest = max(map(max, distance))
    score = []
    for i in range(length):
        denser = [distance[i][j] for j in range(length) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * (min(denser) if denser else farthest))
    centres = descending(score, gaps, clusters)
    member = []
    for i in range(length):
        order = sorted(centres, key=lambda c: distance[i][c])
        member.append(i if i in centres else order[0])
        if len(order) > 1 and i not in centres:
            _settle(distance[i], distance[i][order[0]], distance[i][order[1]], gaps)
    return centres, member


# --- merges ------------------------------------------------------------------------------------------------------


def follow(sources: Sequence[int], patch: Sequence[int], into: Sequence[int]) -> list[int]:
    out = []
    for stands_for in sources:
        if stands_for < 0:
            out.append(-1)
            continue
        (column,) = [t for t, p in enumerate(patch) if p == stands_for]
        out.append(-1 if into[column] < 0 else patch[into[column]])
    return out


def sizes(sources: Sequence[int], patch: Sequence[int]) -> list[float]:
    return [1.0 if p < 0 else float(sum(s == p for s in sources)) for p in patch]


def cells(length: int, parts: int) -> list[range]:
    """Adaptive pooling's cells along one side."""
    return [range(i * length // parts, -((-(i + 1) * length) // parts)) for i in range(parts)]


def pool(patches: Matrix, side: tuple[int, int], grid: tuple[int, int]) -> tuple[list[list[float]], list[list[int]]]:
    """The mean of each cell and the patches that it covers, cells in raster order."""
    covered = [
        [r * side[1] + c for r in rows for c in columns]
        for rows in cells(side[0], grid[0])
        for columns in cells(side[1], grid[1])
    ]
    return [mean([patches[i] for i in cell]) for cell in covered], covered


def take_up_neighbours(
    patches: Matrix, keys: Matrix, attention: Vector, kept: Sequence[int], neighbours: int, gaps: Gaps = None
) -> tuple[list[list[float]], int, list[int]]:
    """PruMerge, on patches without CLS and keys of the full width.

    A kept patch looks for neighbours everywhere but at its own place, so that two kept ones may take up each other; all
    sums are of the patches as they came. Returns the K + 1 tokens, the patch where the extra one stands, and for every
    patch the one that it went into.
    """
    out = []
    for k in kept:
        token, everywhere_else = list(patches[k]), others([k], len(patches))
        likeness = [cosine(keys[k], keys[i]) for i in everywhere_else]
        for place in descending(likeness, gaps, neighbours):
            i = everywhere_else[place]
            token = [x + attention[i] * y for x, y in zip(token, patches[i], strict=True)]
        out.append(token)
    dropped = others(kept, len(patches))
    out.append(weighted_sum([patches[i] for i in dropped], [attention[i] for i in dropped]))
    place = dropped[argmax([attention[i] for i in dropped])]
    into = []
    for i in range(len(patches)):
        likest = kept[argmax([cosine(keys[i], keys[k]) for k in kept], gaps)]
        into.append(i if i in kept or i == place else likest)
    return out, place, into


def keep_and_fuse(tokens: Matrix, attention: Vector, count: int) -> tuple[list[int], list[int], list[float]]:
    """EViT."""
    kept = descending(attention)[:count]
    gone = others(kept, len(tokens))
    fused = weighted_sum([tokens[i] for i in gone], [attention[i] for i in gone]) if gone else [0.0] * len(tokens[0])
    return kept, gone, fused


def match(metric: Matrix, removed: int, gaps: Gaps = None, cls: int = 1) -> tuple[list[int], list[int]]:
    """ToMe: where every token goes, and the columns that stay in ToMe's order. The first `cls` tokens, 0 or 1, stay."""
    first, second = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))
    into = list(range(len(metric)))
    edges = []
    for i in first:
        if i < cls:
            continue
        likeness = [cosine(metric[i], metric[j]) for j in second]
        best = argmax(likeness, gaps)
        edges.append((likeness[best], i, second[best]))
    for place in descending([e[0] for e in edges], gaps, removed):
        into[edges[place][1]] = edges[place][2]
    return into, [i for i in first if into[i] == i] + second if removed else list(into)


def merge_redundant(metric: Matrix, keep: int, padding: Sequence[bool], gaps: Gaps = None) -> list[int]:
    """IVTP+: where every token goes, -1: nowhere, in rounds of which none halves what is left more than once."""
    into, there, hidden = list(range(len(metric))), others([], len(metric)), [i for i, p in enumerate(padding) if p]
    there = [i for i in there if i not in hidden]
    while len(there) + len(hidden) > keep:
        left = max(keep, -(-(len(there) + len(hidden)) // 2))
        while hidden and len(there) + len(hidden) > left:
            into[hidden.pop()] = -1
        first, second, edges = there[0::2], there[1::2], []
        for i in first if second else ():
            likeness = [cosine(metric[i], metric[j]) for j in second]
            best = argmax(likeness, gaps)
            edges.append((likeness[best], i, second[best]))
        gone = {}
        for place in descending([e[0] for e in edges], gaps, len(there) + len(hidden) - left):
            gone[edges[place][1]] = edges[place][2]
        into = [gone.get(target, target) for target in into]
        there = [i for i in there if i not in gone]
    return into


def merge_by_size(tokens: Matrix, size: Vector, into: Sequence[int]) -> dict[int, list[float]]:
    """The mean, weighted by size, of what went into each column that stays."""
    out = {}
    for column in sorted(set(into)):
        members = [i for i, target in enumerate(into) if target == column]
        total = math.fsum(size[i] for i in members)
        out[column] = weighted_sum([tokens[i] for i in members], [size[i] / total for i in members])
    return out


def merge_contextual(
    hidden: Matrix, metric: Matrix, rest: Sequence[int], count: int, gaps: Gaps = None
) -> tuple[list[int], list[int], list[list[float]], list[int]]:
    """VisionZip: targets at a uniform stride, the others, merged targets, and the target (its place) of each other."""
    stride = len(rest) // count
    targets = [rest[k * stride] for k in range(count)]
    loose = [i for i in rest if i not in targets]
    goes = [argmax([cosine(metric[i], metric[t]) for t in targets], gaps) for i in loose]
    merged = []
    for place, target in enumerate(targets):
        assigned = [hidden[i] for i, where in zip(loose, goes, strict=True) if where == place]
        added = mean(assigned) if assigned else [0.0] * len(hidden[target])
        merged.append([x + y for x, y in zip(hidden[target], added, strict=True)])
    return targets, loose, merged, goes


# --- attention and predictors --------------------------------------------------------------------------------------


def attention_map(
    query: Sequence[Matrix],
    key: Sequence[Matrix],
    scale: float,
    causal: bool,
    valid: Sequence[bool] | None = None,
    hidden_from_last: Sequence[bool] | None = None,
) -> list[list[list[float]]]:
    """One sample's attention, head by head; a query that sees nothing has zeros. Key heads serve groups of queries."""
    length, group = len(query[0]), len(query) // len(key)
    maps = []
    for head in range(len(query)):
        rows = []
        for i in range(length):
            logits = []
            for j in range(length):
                seen = (not causal or j <= i) and (valid is None or valid[j])
                if hidden_from_last is not None and i == length - 1 and hidden_from_last[j]:
                    seen = False
                logits.append(scale * dot(query[head][i], key[head // group][j]) if seen else -math.inf)
            rows.append(softmax(logits) if max(logits) > -math.inf else [0.0] * length)
        maps.append(rows)
    return maps


def head_mean(maps: Sequence[Matrix]) -> list[list[float]]:
    return [mean([m[i] for m in maps]) for i in range(len(maps[0]))]


def concatenate_heads(heads: Sequence[Matrix]) -> list[list[float]]:
    """(H, T, d) to (T, H d)."""
    return [[x for head in heads for x in head[t]] for t in range(len(heads[0]))]


def conditional_kernel(features: Matrix, similarity: Vector) -> list[list[float]]:
    """CDPruner: r S r with r the negated similarity, min-max over this image; as in the authors' code, 1e-6 lifts the
    numerator."""
    negated = [-s for s in similarity]
    low, high = min(negated), max(negated)
    r = [(x - low + 1e-6) / (high - low) for x in negated]
    return [[r[i] * cosine(a, b) * r[j] for j, b in enumerate(features)] for i, a in enumerate(features)]


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def linear(x: Vector, weight: Matrix, bias: Vector) -> list[float]:
    return [dot(row, x) + b for row, b in zip(weight, bias, strict=True)]


def layer_norm(x: Vector, weight: Vector, bias: Vector, eps: float) -> list[float]:
    centre = math.fsum(x) / len(x)
    spread = math.sqrt(math.fsum((v - centre) ** 2 for v in x) / len(x) + eps)
    return [w * (v - centre) / spread + b for v, w, b in zip(x, weight, bias, strict=True)]


def priority(saliency: Vector, relevance: Vector, alpha: float, beta: float) -> list[float]:
    """FSR, Eq. 3: both ratings from 0 to 1, to their powers, multiplied."""

    def from_zero_to_one(rating: Vector) -> list[float]:
        low, high = min(rating), max(rating)
        return [(x - low) / (high - low) if high > low else 0.0 for x in rating]

    pairs = zip(from_zero_to_one(relevance), from_zero_to_one(saliency), strict=True)
    return [r**alpha * s**beta for r, s in pairs]


def focus_and_scan(
    features: Matrix, rating: Vector, keep: int, rho: float, kappa: float, gaps: Gaps = None
) -> tuple[list[int], list[int]]:
    """FSR, Eq. 4, 5 and 8: the chosen patches, the focused first, and where every patch goes, -1: nowhere."""
    order, total = descending(rating), math.fsum(rating)
    focused = 1
    while focused < keep and math.fsum(rating[i] for i in order[:focused]) < rho * total:
        focused += 1
    if gaps is not None and total > 0:
        descending(rating, gaps, focused)
        gaps.extend(abs(math.fsum(rating[i] for i in order[:k]) / total - rho) for k in range(1, len(order)))
    likeness = cosines(features)
    chosen = farthest([[1 - c for c in row] for row in likeness], order[:focused], keep, gaps)
    scanned, into = chosen[focused:], [i if i in chosen else -1 for i in range(len(rating))]
    dropped = others(chosen, len(rating))
    if scanned:
        anchor = {i: scanned[argmax([likeness[i][j] for j in scanned], gaps)] for i in dropped}
        near = [likeness[i][anchor[i]] for i in dropped]
        for place in descending(near, gaps, min(int(kappa * len(scanned)), len(dropped))):
            into[dropped[place]] = anchor[dropped[place]]
    return chosen, into


def refined(features: Matrix, rating: Vector, chosen: Sequence[int], into: Sequence[int]) -> list[list[float]]:
    """FSR, Eq. 9, one token after the other: the running mean of each chosen patch, weighted by the ratings."""
    tokens, weights = [list(features[i]) for i in chosen], [rating[i] for i in chosen]
    for i, target in enumerate(into):
        if target in (-1, i) or not rating[i]:
            continue
        place = list(chosen).index(target)
        both = weights[place] + rating[i]
        pairs = zip(tokens[place], features[i], strict=True)
        tokens[place] = [(weights[place] * a + rating[i] * b) / both for a, b in pairs]
        weights[place] = both
    return tokens

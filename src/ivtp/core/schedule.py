"""How many tokens each group keeps (the paper prints no schedule; this one reproduces its published cost)."""

from __future__ import annotations


def uniform_ratio(tokens: int, keep: int, groups: int) -> list[int]:
    """Tokens after each of `groups` groups under one keep ratio rho = (keep / tokens) ** (1 / groups).

    576 to 64 in 12 groups: 480 399 333 277 231 192 160 133 111 92 77 64.
    """
    return [round(tokens * (keep / tokens) ** (g / groups)) for g in range(1, groups + 1)]


def linear(tokens: int, keep: int, steps: int) -> list[int]:
    """Tokens after each of `steps` steps that remove (nearly) the same number each."""
    return [round(tokens - (tokens - keep) * s / steps) for s in range(1, steps + 1)]


def groups(layers: int, size: int) -> list[range]:
    """Consecutive groups of `size` layers; the last may be shorter."""
    return [range(start, min(start + size, layers)) for start in range(0, layers, size)]


def halving(tokens: int, keep: int, steps: int) -> list[int] | None:
    """`linear` where no step may remove more than half of its tokens; None where `steps` are too few for that."""
    counts = [keep]
    for step in range(steps - 1, 0, -1):
        counts.append(min(round(tokens - (tokens - keep) * step / steps), 2 * counts[-1]))
    return None if 2 * counts[-1] < tokens else counts[::-1]


def quarters(layers: int) -> tuple[int, ...]:
    """Layers (0-based) that begin the second, third and last quarter of at least 4."""
    return tuple(round(layers * quarter / 4) for quarter in (1, 2, 3))


def ratio_of_mean(tokens: int, mean: int, spans: list[int]) -> list[int] | None:
    """Counts that fall by one ratio from span to span of layers, so that `mean` is their mean over the layers.

    The first of the `spans` has all `tokens`; returned are the counts of the others, whose mean is not above `mean`.
    None where a single token in all others is still too many.
    """
    if spans[0] * tokens + sum(spans[1:]) > mean * sum(spans):
        return None

    def counts(ratio: float) -> list[int]:
        return [max(1, round(tokens * ratio**step)) for step in range(1, len(spans))]

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        total = spans[0] * tokens + sum(n * c for n, c in zip(spans[1:], counts(middle), strict=True))
        low, high = (middle, high) if total <= mean * sum(spans) else (low, middle)
    return counts(low)

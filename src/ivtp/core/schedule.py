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

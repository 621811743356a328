"""Pictures of what a method kept; they read a `PruneTrace` and nothing else."""

from ivtp.visualize.page import Panel, draw, draw_comparison, stack
from ivtp.visualize.patches import Fate, as_seen, fates, paint

__all__ = ["Fate", "Panel", "as_seen", "draw", "draw_comparison", "fates", "paint", "stack"]

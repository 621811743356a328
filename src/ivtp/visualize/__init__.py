"""Pictures of what a method kept; they read a `PruneTrace` and nothing else."""

from ivtp.visualize.page import Panel, count_fates, draw, draw_comparison, draw_patches, said_of_crop, stack, swatches
from ivtp.visualize.patches import Fate, as_seen, fates, paint

__all__ = [
    "Fate",
    "Panel",
    "as_seen",
    "count_fates",
    "draw",
    "draw_comparison",
    "draw_patches",
    "fates",
    "paint",
    "said_of_crop",
    "stack",
    "swatches",
]

"""What a method does to a model, from sizes alone: where it cuts, and how many visual tokens every layer then sees."""

from __future__ import annotations

from dataclasses import dataclass

from ivtp.config import Geometry
from ivtp.trace import TokensPerLayer, Where


@dataclass(frozen=True)
class Cut:
    """One place where visual tokens leave.

    `layer` (0-based) is cut between attention and feed-forward, or, with `after=True`, behind the last encoder layer
    that reaches the projector. `keep` tokens of each image remain. `taps` are the layers whose queries, keys and
    values the method reads, the cut layer last. With `full_rows` every query row of the earlier taps is recomputed
    (rollout by products needs them all), otherwise one row of each tap.
    """

    where: Where
    layer: int
    keep: int
    taps: tuple[int, ...] = ()
    after: bool = False
    full_rows: bool = False


@dataclass(frozen=True)
class Plan:
    """All cuts of one method on one model, in the order of the forward pass; without cuts the untouched model."""

    cuts: tuple[Cut, ...] = ()
    guide_layers: int = 0
    """Decoder layers, from the first, that carry a pseudo CLS token behind the prompt."""

    def tokens_per_layer(self, geometry: Geometry) -> TokensPerLayer:
        """Visual tokens of one image that the attention and the MLP of each layer see."""
        current = geometry.num_patches
        counts: dict[str, list[int]] = {
            "vision_attention": [],
            "vision_mlp": [],
            "llm_attention": [],
            "llm_mlp": [],
        }
        for where, layers in (("vision", geometry.vision_layers), ("llm", geometry.text_layers)):
            inside = {c.layer: c.keep for c in self.cuts if c.where == where and not c.after}
            for layer in range(layers):
                counts[f"{where}_attention"].append(current)
                current = inside.get(layer, current)
                counts[f"{where}_mlp"].append(current)
            current = next((c.keep for c in self.cuts if c.where == where and c.after), current)
        return TokensPerLayer(**{name: tuple(values) for name, values in counts.items()})

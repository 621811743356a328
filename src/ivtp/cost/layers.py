"""Matrix products of single layers, in FLOPs: a multiply-accumulate is two."""

from __future__ import annotations

from itertools import pairwise

from ivtp.plan import Geometry, Rows


def patch_embedding(g: Geometry, patches: int) -> float:
    """The `patches` of one tile."""
    return 2.0 * patches * g.unit * 3 * g.patch_frames * g.patch_size**2 * g.vision_hidden


def vision_layer(g: Geometry, attention: int, mlp: int) -> float:
    """A layer of the vision tower, as `encoder_layer`."""
    return encoder_layer(g.vision_hidden, g.vision_mlp, attention, mlp, g.vision_mlp_matrices)


def encoder_layer(hidden: int, width: int, attention: int, mlp: int, matrices: int = 2) -> float:
    """A CLIP layer whose attention sees `attention` tokens and whose MLP of `width` sees `mlp`."""
    linear = 2.0 * attention * 4 * hidden**2
    return linear + attention_products(hidden, attention**2) + 2.0 * mlp * matrices * hidden * width


def attention_products(width: int, pairs: int) -> float:
    """Q K^T, and the weights times V, where so many `pairs` of tokens see each other, over `width` channels."""
    return 2.0 * 2 * pairs * width


def projector(g: Geometry) -> float:
    """Its linear layers, for one visual token."""
    between = [g.projector_width or g.text_hidden] * (g.projector_matrices - 1)
    read = g.vision_hidden if g.projector_averages else g.unit * g.vision_hidden
    merged = [g.merger_width] if g.merger_width else []
    widths = [read, *merged, *between, g.text_hidden]
    return 2.0 * sum(given * made for given, made in pairwise(widths))


def text_layer(g: Geometry, attention: int, mlp: int) -> float:
    """A decoder layer whose attention sees `attention` tokens and whose MLP sees `mlp`."""
    query, key_value = g.text_heads * g.text_head_dim, g.text_kv_heads * g.text_head_dim
    linear = 2.0 * attention * g.text_hidden * (2 * query + 2 * key_value)
    products = attention_products(query, attention**2)
    return linear + products + 2.0 * mlp * g.text_mlp_matrices * g.text_hidden * g.text_mlp


def past_keys(g: Geometry, queries: int, keys: int) -> float:
    """The products of a decoder layer's `queries` with `keys` that are cached, or of those weights with the values."""
    return 2.0 * queries * keys * g.text_heads * g.text_head_dim


def attention_rows(rows: Rows, length: int, text: int, heads: int, width: int) -> float:
    """Attention rows of a layer of `length` tokens and `width` channels in all heads, recomputed.

    Of one row the products with the keys; of more also their weighted sum.
    """
    if rows in ("none", "one"):
        return 2.0 * length * width if rows == "one" else 0.0
    return 2.0 * (length if rows == "all" else text) * length * (width + heads)


def query_key(g: Geometry, tokens: int) -> float:
    """Queries and keys of a layer of the vision tower."""
    return 2.0 * 2 * tokens * g.vision_hidden**2


def whole_layer(g: Geometry, patches: int) -> float:
    """A layer of the vision tower over the patches of one image and CLS."""
    return vision_layer(g, g.encoder_tokens(patches), g.encoder_tokens(patches))

"""Many question blocks behind one image prefix: the decoder's training forward.

A scene's image is the same for all of its questions, so one pass over the image tokens can serve all of them:
the prefix attends to itself (causally), each text block attends to the prefix and to itself, and every block
restarts its positions right after the image. The result equals running each question alone (a test compares).
The weights are those of a stock ``LlamaForCausalLM``; only the order of the computation differs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaModel

IGNORE = -100
_CHUNK = 128


@dataclass(frozen=True)
class TextBlocks:
    """The text of all blocks, ``n`` tokens; a scene's blocks stand side by side in one row of ``L`` slots."""

    ids: Tensor
    """(n,) token ids."""
    slots: Tensor
    """(n,) place of each token in the padded (B * L) layout."""
    owners: Tensor
    """(n,) number of the block that each token belongs to, counted over all scenes."""
    offsets: Tensor
    """(n,) place of each token within its block."""
    labels: Tensor
    """(n,) the next token where it is to be learned, else -100."""
    kinds: Tensor
    """(n,) number of the question kind that each token belongs to."""
    scenes: int
    blocks: int
    length: int

    def to(self, device: torch.device) -> TextBlocks:
        """The same blocks on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "Tensor"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack(blocks: list[list[tuple[list[int], list[int], int]]]) -> TextBlocks:
    """Packs ``blocks[scene][question] = (prompt ids, answer ids, kind)``; scenes may hold different numbers.

    The token before an answer token predicts it, so the last prompt token carries the first label.
    """
    length = max(sum(len(p) + len(a) - 1 for p, a, _ in scene) for scene in blocks)
    rows: dict[str, list[int]] = {name: [] for name in ("ids", "slots", "owners", "offsets", "labels", "kinds")}
    count = 0
    for s, scene in enumerate(blocks):
        slot = s * length
        for prompt, answer, kind in scene:
            text = prompt + answer[:-1]
            rows["ids"] += text
            rows["slots"] += range(slot, slot + len(text))
            rows["owners"] += [count] * len(text)
            rows["offsets"] += range(len(text))
            rows["labels"] += [IGNORE] * (len(prompt) - 1) + answer
            rows["kinds"] += [kind] * len(text)
            slot += len(text)
            count += 1
    tensors = {name: torch.tensor(row) for name, row in rows.items()}
    return TextBlocks(**tensors, scenes=len(blocks), blocks=count, length=length)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout of transformers' Llama; x: (..., H, d)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((right, left), dim=-1) * signed_sin


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * x32.to(x.dtype)


def _project(x: Tensor, norm: Tensor, qkv: Tensor, cos: Tensor, signed_sin: Tensor, heads: int, eps: float) -> Tensor:
    """Normalised, rotated queries, keys and values of all tokens: (3, n, H, d)."""
    projected = nn.functional.linear(_rms(x, norm, eps), qkv).view(x.shape[0], 3, heads, -1)
    qk, v = torch.split(projected.transpose(0, 1), [2, 1])
    return torch.cat((_rotate(qk, cos, signed_sin), v))


def _mix(x: Tensor, context: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    """Output projection with its residual, then the gated feed-forward with its residual."""
    x = x + nn.functional.linear(context, out)
    gate, up = nn.functional.linear(_rms(x, norm, eps), gate_up).chunk(2, dim=-1)
    return x + nn.functional.linear(nn.functional.silu(gate) * up, down)


def _attend_prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the image prefix within itself; (B, H, P, d).

    Query rows go in chunks that skip the keys after them: on a CPU in bfloat16, at this head count, that is faster
    than the fused kernel, whose backward pass is slow there.
    """
    if q.is_cuda:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    P = q.shape[2]
    mask = torch.full((_CHUNK, _CHUNK), float("-inf"), dtype=q.dtype).triu(1)
    q = q * q.shape[-1] ** -0.5
    out = []
    for start in range(0, P, _CHUNK):
        end = min(P, start + _CHUNK)
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)  # (B, H, c, end)
        scores[..., start:] += mask[: end - start, : end - start]
        out.append(scores.softmax(-1) @ v[:, :, :end])
    return torch.cat(out, dim=2)


def _block_mask(text: TextBlocks, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L): 0 where a token sees another of its own block, -inf elsewhere; padding sees padding."""
    owners = text.owners.new_full((text.scenes * text.length,), -1).index_copy(0, text.slots, text.owners)
    owners = owners.view(text.scenes, 1, text.length)
    seen = (owners.transpose(1, 2) == owners).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))[:, None]


def _attend_text(q: Tensor, kv: Tensor, prefix_kv: Tensor, mask: Tensor, longest: int) -> Tensor:
    """Attention of text rows (B, H, L, d) to the image prefix (2, B, H, P, d) and, under the mask, to their own.

    A chunk of query rows needs no keys that lie further back than the ``longest`` block.
    """
    q = q * q.shape[-1] ** -0.5
    (prefix_k, prefix_v), (k, v) = prefix_kv, kv
    L, P = q.shape[2], prefix_k.shape[2]
    out = []
    for start in range(0, L, _CHUNK):
        rows, near = slice(start, min(L, start + _CHUNK)), slice(max(0, start - longest), min(L, start + _CHUNK))
        chunk = q[:, :, rows]
        to_own = chunk @ k[:, :, near].transpose(-1, -2) + mask[:, :, rows, near]
        weights = torch.cat((chunk @ prefix_k.transpose(-1, -2), to_own), dim=-1).softmax(-1)
        on_prefix, on_own = torch.split(weights, [P, to_own.shape[-1]], dim=-1)
        out.append(on_prefix @ prefix_v + on_own @ v[:, :, near])
    return torch.cat(out, dim=2)


def forward_blocks(model: LlamaModel, prefix: Tensor, positions: Tensor, text: TextBlocks, text_start: int) -> Tensor:
    """Final hidden states of the packed text tokens, (n, C).

    ``prefix`` (B, P, C) are the embeddings before the first text token of a block (begin-of-sequence, role word,
    image), ``positions`` (B, P) their position ids; every block's first token stands at ``text_start``.
    """
    B, P, C = prefix.shape
    L = text.length
    config = model.config
    H, eps = config.num_attention_heads, config.rms_norm_eps
    n_prefix = B * P
    dtype = prefix.dtype  # weights are cast to it, so float32 master weights can train a bfloat16 computation
    x = torch.cat((prefix.reshape(n_prefix, C), model.embed_tokens(text.ids).to(dtype)))
    all_positions = torch.cat((positions.reshape(-1), text_start + text.offsets))
    cos, sin = model.rotary_emb(x, all_positions[None])  # (1, n, d)
    cos, sin = cos[0][:, None], sin[0][:, None]  # (n, 1, d)
    half = sin.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    mask, longest = _block_mask(text, dtype), int(text.offsets.max()) + 1
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv_weight = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)).to(dtype)
        qkv = _project(x, layer.input_layernorm.weight, qkv_weight, cos, sin, H, eps)
        of_prefix, of_text = torch.split(qkv, [n_prefix, len(text.slots)], dim=1)  # (3, n, H, d)
        of_prefix = of_prefix.reshape(3, B, P, H, -1).transpose(2, 3)  # (3, B, H, P, d)
        padded = qkv.new_zeros(3, B * L, *qkv.shape[2:]).index_copy(1, text.slots, of_text)
        of_text = padded.view(3, B, L, H, -1).transpose(2, 3)  # (3, B, H, L, d)
        from_prefix = _attend_prefix(*of_prefix).transpose(1, 2).reshape(n_prefix, C)
        from_text = _attend_text(of_text[0], of_text[1:], of_prefix[1:], mask, longest)
        from_text = from_text.transpose(1, 2).reshape(B * L, C)
        context = torch.cat((from_prefix, from_text[text.slots]))
        gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).to(dtype)
        out, down = attention.o_proj.weight.to(dtype), mlp.down_proj.weight.to(dtype)
        x = _mix(x, context, out, layer.post_attention_layernorm.weight, gate_up, down, eps)
    return _rms(x[n_prefix:], model.norm.weight, eps)

"""Torch's attention with fewer heads of the same width; needs torch.

`torch.nn.MultiheadAttention` computes with as many dimensions as come in, so that it cannot have
fewer heads of the same width: `NarrowAttention` takes its place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecast.compression.pruning.plan import PlanError

__all__ = ["NarrowAttention", "become", "resize_attention"]


class NarrowAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose heads together are narrower than what comes in.

    It is made of one in place, by `set_heads`. Parameters have the same names; of `embed_dim` rows
    there are ``num_heads * head_dim`` in the projections that lead in, and as many columns in
    ``out_proj.weight``. Arguments, masks and results are those of torch's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint of what attn_mask is: give that, too")
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        count, beside = q.shape[0], 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(count, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(count, -1, -1)], 1)
            beside += 1
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
            beside += 1
        q, k, v = (
            x.reshape(count, x.shape[1], self.num_heads, -1).transpose(1, 2) for x in (q, k, v)
        )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if attn_mask is not None and not causal:
            mask = _additive(attn_mask, q.dtype, beside)
            if mask.dim() == 3:
                mask = mask.reshape(count, self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype, beside)[:, None, None]
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = functional.dropout(weights, dropout)
            made = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            made = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        made = functional.linear(
            made.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias
        )
        if not batched:
            return made.squeeze(0), None if weights is None else weights.squeeze(0)
        return made if self.batch_first else made.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads side by side, in the layout that came in."""
        if self.in_proj_weight is not None and query is key is value:
            packed = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            return packed.chunk(3, -1)
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        three = zip((query, key, value), weights, biases, strict=True)
        return tuple(functional.linear(x, weight, bias) for x, weight, bias in three)


def _additive(mask: Tensor, dtype: torch.dtype, beside: int) -> Tensor:
    """A mask as what is added to scores; keys that are added to those that came are seen."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return functional.pad(mask.to(dtype), (0, beside)) if beside else mask.to(dtype)


def resize_attention(name: str, layer: nn.MultiheadAttention) -> None:
    """Tell torch's attention the sizes that its tensors have now, and let it compute with them.

    Raises:
        PlanError: no number of channels is the same for every head.
    """
    at: Any = layer
    width, inner = layer.out_proj.weight.shape
    if inner % layer.num_heads:
        raise PlanError(f"layer {name!r}: a width of {inner} is no {layer.num_heads} heads")
    at.embed_dim, at.head_dim = width, inner // layer.num_heads
    at.kdim = at.vdim = width
    packed = layer.in_proj_weight is not None
    if not packed:
        at.kdim, at.vdim = layer.k_proj_weight.shape[1], layer.v_proj_weight.shape[1]
    become(layer, NarrowAttention if width != inner else nn.MultiheadAttention)


def become(layer: nn.MultiheadAttention, kind: type[nn.MultiheadAttention]) -> None:
    """Let torch's attention compute as a kind of it does, in place; one of another forward stays.

    In place, since others may hold it. `TransformerEncoderLayer` takes its fast path, which
    computes with as many dimensions as come in, only where the three projections are of one size.
    """
    at: Any = layer
    if type(layer) in (nn.MultiheadAttention, NarrowAttention):
        at.__class__ = kind
        at._qkv_same_embed_dim = kind is nn.MultiheadAttention and layer.in_proj_weight is not None

"""Networks with attention: images read row by row, a language model, and adapters on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "LanguageModel",
    "LoraLinear",
    "Transformer",
    "language_model",
    "lora_language_model",
    "small_transformer",
]


class Transformer(nn.Module):
    """Encoder layers that read an image row by row; of width 128 and three, 0.6 million weights."""

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(28, width)
        self.position = nn.Parameter(torch.randn(28, width) * 0.02)
        self.ink = nn.Embedding(64, width)
        nn.init.normal_(self.ink.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        rows = x[:, 0]
        token = (rows.sum(2) * 2).long().clamp(0, 63)
        x = self.layers(self.enter(rows) + self.position + self.ink(token))
        return torch.as_tensor(self.head(x.mean(1)))


def small_transformer() -> nn.Module:
    """Two encoder layers of width 64."""
    return Transformer(width=64, layers=2)


# -- language -------------------------------------------------------------------------------------


class _Block(nn.Module):
    """Causal self-attention and a layer of four times the width, each added to what came in."""

    mask: Tensor

    def __init__(self, width: int, heads: int, steps: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.enter, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # kept with the weights, as many implementations do; what is ahead counts for nothing
        self.register_buffer("mask", torch.full((steps, steps), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, steps, width) to the same."""
        count, steps, width = x.shape
        parts = self.enter(self.norm1(x)).view(count, steps, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(2, 3) * (width // self.heads) ** -0.5
        weights = (scores + self.mask[:steps, :steps]).softmax(3)
        x = x + self.leave((weights @ value).transpose(1, 2).reshape(count, steps, width))
        y: Tensor = self.narrow(nn.functional.gelu(self.wide(self.norm2(x))))
        return x + y


class LanguageModel(nn.Module):
    """A decoder of the kind of GPT-2 (Radford et al. 2019).

    Args:
        vocabulary: number of tokens.
        steps: most tokens of a sequence.
        width: of an embedded token.
        layers: of attention.
        heads: of each; they divide `width`.
    """

    def __init__(self, vocabulary: int, steps: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(steps, width) * 0.02)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads, steps) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, steps, vocabulary) of int64 tokens (n, steps)."""
        x = self.tokens(tokens) + self.position[: tokens.shape[1]]
        return torch.as_tensor(self.head(self.norm(self.blocks(x))))


def language_model(
    vocabulary: int = 32, steps: int = 32, width: int = 64, layers: int = 2, heads: int = 4
) -> nn.Module:
    """`LanguageModel`, its causal mask a buffer; 106,272 parameters by default."""
    return LanguageModel(vocabulary, steps, width, layers, heads)


# -- adapters -------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """A linear layer that stays as it is, and a trained low-rank addition (Hu et al. 2022).

    Args:
        base: the layer. It is kept outside of the state, so that it does not travel.
        rank: of the addition.
        scale: of the addition; alpha / rank in the paper.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        _freeze(base)
        self.base, self.scale = base, scale
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, 5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return torch.as_tensor(self.base(x) + (x @ self.lora_a.T @ self.lora_b.T) * self.scale)


def _freeze(module: nn.Module) -> None:
    """Make parameters and buffers of a module constants that are no part of its state."""
    for part in module.modules():
        held = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in held:
            delattr(part, name)
            part.register_buffer(name, tensor.detach(), persistent=False)


def lora_language_model(
    vocabulary: int = 32,
    steps: int = 32,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    rank: int = 8,
    alpha: float = 16.0,
    base_seed: int = 0,
) -> nn.Module:
    """Adapters on the linear layers of a frozen `LanguageModel`, and a trained head.

    Only adapters and head are in the state, so only they travel, are pruned and released as
    weights; the base is a constant of the graph. Everybody draws it from `base_seed` alone: a
    stand-in for a model that everybody has already. By default 18,464 parameters on a base of
    104,192.

    Args:
        vocabulary, steps, width, layers, heads: see `LanguageModel`.
        rank: of the adapters.
        alpha: the addition is scaled by alpha / rank.
        base_seed: of the base.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base_seed)
        model = LanguageModel(vocabulary, steps, width, layers, heads)
    head = nn.Linear(width, vocabulary)
    _freeze(model)
    for block in model.blocks:
        for name in ("enter", "leave", "wide", "narrow"):
            setattr(block, name, LoraLinear(getattr(block, name), rank, alpha / rank))
    model.head = head
    return model

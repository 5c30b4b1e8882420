"""A torch module of attention for `prunecast release create --module support.attentive:make`."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Attentive", "make", "post_norm", "weights"]

STEPS, WIDTH, CLASSES = 6, 16, 4


class Attentive(nn.Module):
    """Four layers of torch's encoder, each of four heads, over six steps of four values."""

    def __init__(self, *, norm_first: bool = True, layers: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(4, WIDTH)
        self.layers = nn.Sequential(*(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first
            )
            for _ in range(layers)
        ))  # fmt: skip
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, 4) of inputs (n, 6, 4)."""
        return torch.as_tensor(self.head(self.norm(self.layers(self.enter(x))).mean(1)))


def make() -> Attentive:
    """Weights of version 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return Attentive()


def post_norm() -> Attentive:
    """The same with norms behind additions, which zeros in a layer do not leave as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return Attentive(norm_first=False)


def weights(number: int) -> dict[str, torch.Tensor]:
    """Version `number`: heads 0 and 2, and layers 1 and 2, count for far less than the others."""
    state, generator = make().state_dict(), torch.Generator().manual_seed(12)
    for name, tensor in state.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if name.endswith("self_attn.out_proj.weight"):
            tensor[:, :4] *= 1e-3
            tensor[:, 8:12] *= 1e-3
        if name.endswith("self_attn.in_proj_weight"):
            tensor.view(3, 4, 4, WIDTH)[:, ::2] *= 1e-3
        if layer in (1, 2) and name.endswith(("out_proj.weight", "linear2.weight")):
            tensor *= 0.1
        for _ in range(number):
            if tensor.dim() > 1:
                tensor += 0.003 * torch.randn(tensor.shape, generator=generator)
    return state

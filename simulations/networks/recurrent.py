"""Recurrent networks: images read row by row, and language models over tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Lstm", "LstmLanguageModel", "lstm_language_model", "small_lstm"]


class Lstm(nn.Module):
    """LSTM layers of width 128 that read an image row by row; of two, 0.2 million parameters."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.LSTM(28, 128, layers, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        return torch.as_tensor(self.head(self.layers(x[:, 0])[0].mean(1)))


def small_lstm() -> nn.Module:
    """One LSTM layer of width 128."""
    return Lstm(layers=1)


class LstmLanguageModel(nn.Module):
    """Embedded tokens, LSTM layers, and the logits of every token that may come next.

    Args:
        vocabulary: number of tokens.
        embedding: width of an embedded token.
        width: of the LSTM's state.
        layers: of LSTM.
    """

    def __init__(self, vocabulary: int, embedding: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.layers = nn.LSTM(embedding, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, steps, vocabulary) of int64 tokens (n, steps)."""
        return torch.as_tensor(self.head(self.layers(self.tokens(tokens))[0]))


def lstm_language_model(
    vocabulary: int = 32, embedding: int = 16, width: int = 96, layers: int = 1
) -> nn.Module:
    """`LstmLanguageModel`; 47,392 parameters by default.

    With vocabulary 80 or so, embedding 8, width 256 and two layers it is the network of McMahan
    et al. 2017, section 3, for Shakespeare by role.
    """
    return LstmLanguageModel(vocabulary, embedding, width, layers)

"""A model: an MLP over the embeddings of the last two tokens."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import models
from models.model import Model, Output


@dataclass(frozen=True)
class Settings:
    vocab_size: int
    block_size: int
    n_embd: int
    dropout: float = 0.0


class MLP(Model):
    settings_type = Settings

    def __init__(self, settings):
        super().__init__(settings)
        V, C = settings.vocab_size, settings.n_embd
        self.embedding, self.hidden, self.head = nn.Embedding(V, C), nn.Linear(2 * C, C), nn.Linear(C, V)
        self.register_buffer("scale", torch.full((), 0.5), persistent=False)

    def forward(self, ids, targets=None, *, cache=None, last_only=False):
        x = torch.cat([self.embedding(ids), F.pad(self.embedding(ids), (0, 0, 1, -1))], dim=-1)  # (B, T, 2C)
        x = F.dropout(self.scale * self.hidden(x).tanh(), self.settings.dropout, self.training)
        logits = self.head(x[:, -1:] if last_only else x)
        return Output(logits, None if targets is None else F.cross_entropy(logits.mT, targets), {})

    def activation_bytes(self, batch_size, *, bytes_per_value, device_type=None):
        return batch_size * self.settings.block_size * (12 * self.settings.vocab_size + 16 * self.settings.n_embd)


models.register("mlp", MLP, defaults=models.MODELS["bigram"].defaults | {"n_embd": 16})

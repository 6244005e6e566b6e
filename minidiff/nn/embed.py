"""Embeddings of numbers: how the network is told the time, and a vector such as a pooled text embedding.

    emb(tau) = [cos(tau·f_0) … cos(tau·f_k), sin(tau·f_0) … sin(tau·f_k)],   f_i = 10000^(−i/k)

tau is time in DDPM's units, 0 … 999 with fractions allowed (Vaswani et al. 2017 §3.5; Ho et al. 2020 appendix B).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


def sinusoidal(tau: Float[Tensor, " b"], dim: int) -> Float[Tensor, "b dim"]:
    """Returns cosines then sines of `tau` at `dim / 2` frequencies from 1 to 1/10000, in float32."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, device=tau.device, dtype=torch.float32))
    angle = tau.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Time, and a condition vector if there is one, as one embedding that every ResBlock receives."""

    def __init__(self, channels: int, dim: int, vector_dim: int | None) -> None:
        super().__init__()
        self.channels = channels  # of the sinusoidal embedding
        self.mlp = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.vector = None if vector_dim is None else nn.Linear(vector_dim, dim)

    def forward(self, tau: Float[Tensor, " b"], vector: Float[Tensor, "b v"] | None) -> Float[Tensor, "b d"]:
        emb = self.mlp(sinusoidal(tau, self.channels).to(self.mlp[0].weight.dtype))
        return emb if self.vector is None else emb + self.vector(vector)

"""Embeddings of numbers: how the network is told the time, the place, and a vector such as a pooled text embedding.

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


def grid_embedding(height: int, width: int, channels: int, device: torch.device) -> Float[Tensor, "c h w"]:
    """Returns sines and cosines of y, then of x, in −1 … 1 across the picture whatever its size; unit variance.

    Convolutions know a place only from the padding near the border. With this they know it at once, and so learn what
    "in the top left" means in a fraction of the updates (2-D form of Vaswani et al. 2017, §3.5).
    """
    frequency = math.pi / 2 * 2 ** torch.linspace(0, 3, channels // 4, device=device)  # half a period to four periods

    def wave(n: int) -> Float[Tensor, "half n"]:
        angle = frequency[:, None] * ((2 * torch.arange(n, device=device) + 1) / n - 1)
        return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()])

    y, x = wave(height)[:, :, None], wave(width)[:, None, :]
    return torch.cat([y.expand(-1, -1, width), x.expand(-1, height, -1)])


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

"""Embeddings of numbers: how the network is told the time, the place, and a vector such as a pooled text embedding.

    emb(tau) = [cos(tau·f_0) … cos(tau·f_k), sin(tau·f_0) … sin(tau·f_k)],   f_i = 10000^(−i/(k − shift))

tau is time in DDPM's units, 0 … 999 with fractions allowed (Vaswani et al. 2017 §3.5; Ho et al. 2020 appendix B).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def sinusoidal(
    tau: Float[Tensor, " b"], dim: int, cos_first: bool = True, freq_shift: float = 0.0
) -> Float[Tensor, "b dim"]:
    """Returns cosines and sines of `tau` at `dim // 2` frequencies from 1 down to 1/10000, in float32.

    DDPM puts the sines first and has `freq_shift` 1, Stable Diffusion neither; an odd `dim` ends in a zero.
    """
    half = dim // 2
    # In diffusers' order of operations: near tau = 999, another rounding of a frequency shows in the fifth digit.
    exponent = -math.log(10_000) * torch.arange(half, device=tau.device, dtype=torch.float32) / (half - freq_shift)
    angle = tau.float()[:, None] * exponent.exp()
    waves = [angle.cos(), angle.sin()] if cos_first else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(waves, dim=1), (0, dim % 2))


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
    """Time, and a condition vector if there is one, as one embedding that every ResBlock receives.

    The vector passes one linear layer, or two like the time (`vector_layers`).
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        vector_dim: int | None,
        vector_layers: int = 1,
        cos_first: bool = True,
        freq_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.channels, self.cos_first, self.freq_shift = channels, cos_first, freq_shift  # of the sinusoidal embedding
        self.mlp = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))
        if vector_dim is None:
            self.vector = None
        elif vector_layers == 1:
            self.vector = nn.Linear(vector_dim, dim)
        else:
            self.vector = nn.Sequential(nn.Linear(vector_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, tau: Float[Tensor, " b"], vector: Float[Tensor, "b v"] | None) -> Float[Tensor, "b d"]:
        waves = sinusoidal(tau, self.channels, self.cos_first, self.freq_shift)
        emb = self.mlp(waves.to(self.mlp[0].weight.dtype))
        return emb if self.vector is None else emb + self.vector(vector)

"""Discrete noise schedules: the tables that foreign checkpoints were trained with.

DDPM (Ho et al. 2020) adds noise in N steps, of variance beta_0 … beta_{N-1}; what is left of the data's variance
after step k is alpha-bar, alphas_cumprod[k] = (1 - beta_0)…(1 - beta_k). Libraries compute both in float32, and so
does this room, operation by operation: a network remembers the levels it was trained on, to the last bit.
`process.Table` makes a process of such a table.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def linear(n: int, start: float, end: float) -> Float[Tensor, " n"]:
    """Returns betas in equal steps (DDPM, Ho et al. 2020)."""
    return torch.linspace(start, end, n, dtype=torch.float32)


def scaled_linear(n: int, start: float, end: float) -> Float[Tensor, " n"]:
    """Returns betas whose square roots take equal steps (Latent and Stable Diffusion, Rombach et al. 2022)."""
    return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2


def squaredcos_cap_v2(n: int, start: float, end: float) -> Float[Tensor, " n"]:
    """Returns the betas of a squared cosine, at most 0.999 (Nichol & Dhariwal 2021, eq. 17), without start and end."""

    def level(k: int) -> float:
        return math.cos((k / n + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - level(k + 1) / level(k), 0.999) for k in range(n)], dtype=torch.float32)


NAMED = {f.__name__: f for f in (linear, scaled_linear, squaredcos_cap_v2)}


def betas(schedule: str | Sequence[float], n: int, start: float, end: float) -> Float[Tensor, " n"]:
    """Returns the betas of a named schedule, or those that are given (a checkpoint's `trained_betas`)."""
    if isinstance(schedule, str):
        return NAMED[schedule](n, start, end)
    return torch.tensor(schedule, dtype=torch.float32)


def zero_terminal_snr(betas: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Returns betas that end in pure noise: sqrt(alpha-bar) shifted to end at 0 and scaled to begin as it did.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = alphas_cumprod(betas).sqrt()
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def alphas_cumprod(betas: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Returns alpha-bar after each step: what is left of the data's variance."""
    return torch.cumprod(1 - betas, dim=0)

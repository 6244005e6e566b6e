"""Objectives: what the network is asked for. Every target is two numbers (a, b) that depend on time only,

    y = a·x0 + b·eps      eps (0, 1)   x0 (1, 0)   v (-sigma, alpha)   flow velocity (-1, 1)   EDM (below)

Together with xt = alpha·x0 + sigma·eps these are two equations for two unknowns, so an answer y gives back
(x0_hat, eps_hat), and the determinant

    det = alpha·b - sigma·a

says how well. For eps, det = alpha: the noisier, the worse. For x0, det = -sigma: the cleaner, the worse.
For v (with a variance preserving process) and for the flow velocity (with the flow process) det = 1
everywhere, which is why they exist.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Coefficient = Float[Tensor, "..."] | float


class Objective:
    """The interface of an objective: its pair, and the factor on what the network sees."""

    def pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        """Returns (a, b) of the target y = a·x0 + b·eps."""
        raise NotImplementedError

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Coefficient:
        """Returns the factor by which xt is multiplied on its way into the network (Karras' c_in)."""
        return 1.0


@dataclass(frozen=True)
class Eps(Objective):
    """The noise (DDPM, Ho et al. 2020, eq. 14)."""

    def pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 0.0, 1.0


@dataclass(frozen=True)
class X0(Objective):
    """The data.

    With `shrink`, the network sees alpha·xt: for data of unit variance the linear least-squares estimate of x0. Where
    nothing is left of the data it then sees no noise either, and has only the condition to go by.
    """

    shrink: bool = False

    def pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return 1.0, 0.0

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Coefficient:
        return alpha if self.shrink else 1.0


@dataclass(frozen=True)
class V(Objective):
    """v = alpha·eps - sigma·x0 (Salimans & Ho 2022)."""

    def pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return -sigma, alpha


@dataclass(frozen=True)
class FlowVelocity(Objective):
    """eps - x0: the direction from data to noise, dxt/dt of the flow process (Liu et al. 2023)."""

    def pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        return -1.0, 1.0


@dataclass(frozen=True)
class Edm(Objective):
    """(x0 - c_skip·x)/c_out, x = xt/alpha: what is missing, at unit variance (Karras et al. 2022, Table 1).

    Written as (a, b), the divisions by sigma cancel. With sigma_data = 1 and a variance preserving process
    it is -v.
    """

    sigma_data: float = 0.5  # standard deviation of the data

    def pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
        scale = self.input_scale(alpha, sigma)
        return sigma / self.sigma_data * scale, -alpha * self.sigma_data * scale

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Coefficient:
        return torch.rsqrt(sigma**2 + (alpha * self.sigma_data) ** 2)


def determinant(objective: Objective, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns alpha·b - sigma·a; where it is zero, y says nothing that xt has not said already."""
    a, b = objective.pair(alpha, sigma)
    return alpha * b - sigma * a


def target(objective: Objective, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns y = a·x0 + b·eps. `alpha` and `sigma` broadcast against `x0`."""
    a, b = objective.pair(alpha, sigma)
    return a * x0 + b * eps


def solve(objective: Objective, xt: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (x0_hat, eps_hat) from the network's answer `y`: the inverse of `target`, given `xt`."""
    a, b = objective.pair(alpha, sigma)
    det = determinant(objective, alpha, sigma)
    return (b * xt - sigma * y) / det, (alpha * y - a * xt) / det


@dataclass(frozen=True)
class Uniform:
    """Every time counts the same, in the objective's terms. For `Edm` this is Karras' lambda = 1/c_out²."""

    def __call__(self, alpha: Tensor, sigma: Tensor, det: Tensor) -> Tensor:
        return torch.ones_like(alpha)


@dataclass(frozen=True)
class MinSNR:
    """min(snr, gamma) on the error of x0_hat (Hang et al. 2023), whatever the objective.

    An error of y is an error of x0_hat times det/sigma, so y gets min(snr, gamma)·sigma²/det². The sigma² is
    multiplied in, so that nothing is divided by zero where the snr is infinite.
    """

    gamma: float = 5.0

    def __call__(self, alpha: Tensor, sigma: Tensor, det: Tensor) -> Tensor:
        return torch.minimum(alpha**2, self.gamma * sigma**2) / det**2


@dataclass(frozen=True)
class VError:
    """1 + snr on the error of x0_hat, at most `limit`: the error of v, whatever the objective (Salimans & Ho 2022, §4).

    With objective x0 the network answers with a picture, which is simple, and is still judged at every noise level
    (Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise").
    """

    limit: float = 10.0

    def __call__(self, alpha: Tensor, sigma: Tensor, det: Tensor) -> Tensor:
        return torch.minimum(alpha**2 + sigma**2, self.limit * sigma**2) / det**2

"""Toy data: distributions in the plane to look at, and a Gaussian mixture whose denoiser is known exactly.

If x0 comes from component k, N(mean_k, std_k²), then xt = alpha·x0 + sigma·eps is N(alpha·mean_k, variance_k)
with variance_k = alpha²·std_k² + sigma², and xt pulls both guesses the same way:

    E[x0 | xt, k]  = mean_k + alpha·std_k²·r_k        r_k = (xt - alpha·mean_k)/variance_k
    E[eps | xt, k] = sigma·r_k

The best denoiser is their average under p(k | xt). It tests samplers and guidance without any training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.cond import Cond
from minidiff.objective import Objective, target
from minidiff.process import Process


def swiss_roll(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """Returns `n` points on a slightly noisy spiral of radius 0.5 to 1.7."""
    angle = (1.5 + 3 * torch.rand(n, generator=generator)) * math.pi
    curve = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 8
    return curve + 0.03 * torch.randn(n, 2, generator=generator)


def moons(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """Returns `n` points on two interlocking half circles, slightly noisy, centred on the origin."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos() - 0.5, 0.5 - angle.cos())
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    return torch.stack([x, y], dim=1) + 0.05 * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """Returns `n` points spread evenly over the eight dark squares of a 4 × 4 board on [-2, 2]²."""
    column = torch.randint(4, (n,), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    return torch.stack([column, row], dim=1) - 2 + torch.rand(n, 2, generator=generator)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Round Gaussians in `d` dimensions; the weights need not sum to 1."""

    means: Float[Tensor, "k d"]
    stds: Float[Tensor, " k"]
    weights: Float[Tensor, " k"]

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Returns `n` points."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        eps = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * eps

    def only(self, components: list[int]) -> "GaussianMixture":
        """Returns the mixture of some of the components."""
        return GaussianMixture(self.means[components], self.stds[components], self.weights[components])

    def log_prob(self, xt: Float[Tensor, "b d"], alpha: Tensor | float, sigma: Tensor | float) -> Float[Tensor, " b"]:
        """Returns the log density of noised data, xt = alpha·x0 + sigma·eps; at (1, 0) that of the data."""
        return self._joint(xt, torch.as_tensor(alpha), torch.as_tensor(sigma)).logsumexp(1)

    def denoiser(self, process: Process) -> Callable:
        """Returns the exact `denoise(xt, t, cond=None) -> (x0_hat, eps_hat)`, `t` a number, 0-dim or (b,).

        The port `cond.vector`, (b, k), multiplies the weights row by row: zeros and ones choose components.
        """

        def denoise(xt: Float[Tensor, "b d"], t: Tensor | float, cond: Cond | None = None) -> tuple[Tensor, Tensor]:
            t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)
            alpha, sigma = process.alpha(t).to(xt), process.sigma(t).to(xt)
            joint = self._joint(xt, alpha, sigma)
            if cond is not None:
                joint = joint + cond.vector.log()
            share = joint.softmax(1)[..., None]  # p(k | xt), (b, k, 1)
            pull = (xt[:, None] - alpha[..., None] * self.means) / self._variances(alpha, sigma)[..., None]
            x0_hat = (share * (self.means + alpha[..., None] * self.stds[:, None] ** 2 * pull)).sum(1)
            return x0_hat, sigma * (share * pull).sum(1)

        return denoise

    def _variances(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha**2 * self.stds**2 + sigma**2

    def _joint(self, xt: Float[Tensor, "b d"], alpha: Tensor, sigma: Tensor) -> Float[Tensor, "b k"]:
        """Returns log p(xt, k)."""
        variances = self._variances(alpha, sigma).expand(len(xt), -1)
        squared = (xt[:, None] - alpha[..., None] * self.means).square().sum(2)
        log_weights = torch.log(self.weights / self.weights.sum())
        return log_weights - squared / (2 * variances) - xt.shape[1] / 2 * torch.log(2 * math.pi * variances)


class ExactNet(nn.Module):
    """The network that training would end with, had it no limits: `net(x, tau, cond)` answers exactly for a mixture.

    Put into a `Denoiser` with the same process and objective, it separates faults of the code from those of training.
    """

    def __init__(self, mixture: GaussianMixture, process: Process, objective: Objective) -> None:
        super().__init__()
        self.process = process
        self.objective = objective
        self.denoise = mixture.denoiser(process)

    def forward(self, x: Float[Tensor, "b d"], tau: Float[Tensor, " b"], cond: Cond | None) -> Float[Tensor, "b d"]:
        t = self.process.t_of_tau(tau)
        alpha, sigma = self.process.alpha(t).to(x)[:, None], self.process.sigma(t).to(x)[:, None]
        x0, eps = self.denoise(x / self.objective.input_scale(alpha, sigma), t, cond)
        return target(self.objective, x0, eps, alpha, sigma)

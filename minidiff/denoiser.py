"""The denoiser: a network, a process and an objective, and what only the three together can say.

    y = net(c_in·xt, tau, cond)                                     the network, in its own units
    (x0_hat, eps_hat) = solve [alpha sigma; a b] from (xt, y)       sampling: what every sampler sees
    loss = weight·mean (y - (a·x0 + b·eps))²                        training

Time is broadcast once, at this door: `t` comes in as a number or one per image and leaves as (b, 1, 1, 1).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.cond import Cond
from minidiff.errors import InputError
from minidiff.objective import Objective, determinant, solve, target
from minidiff.process import Process

SMALLEST_DET = 5e-4  # an error of y reaches x0_hat and eps_hat divided by the determinant


class Denoiser(nn.Module):
    """Makes `net(x, tau, cond) -> y` into `(xt, t, cond) -> (x0_hat, eps_hat)`, for any (b, ...) data.

    Raises `InputError` (MD-OBJECTIVE-001) if the objective cannot be solved at the process' noisiest time.
    """

    def __init__(self, net: nn.Module, process: Process, objective: Objective, weighting: Callable) -> None:
        super().__init__()
        self.net = net
        self.process = process
        self.objective = objective
        self.weighting = weighting  # (alpha, sigma, det) -> weight on the squared error of y
        _check_solvable(process, objective)

    def forward(
        self, xt: Float[Tensor, "b ..."], t: Tensor | float, cond: Cond | None
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """Returns (x0_hat, eps_hat) of `xt` at `t` in (0, t_max]: a number, 0-dim, or one per row."""
        alpha, sigma, tau = self._at(t, xt)
        y = self._answer(xt, alpha, sigma, tau, cond)
        return solve(self.objective, xt, y, alpha, sigma)

    def loss(
        self,
        x0: Float[Tensor, "b ..."],
        cond: Cond | None,
        t: Tensor | float,
        eps: Float[Tensor, "b ..."],
        shown: Float[Tensor, "b ..."] | None = None,
    ) -> Float[Tensor, " b"]:
        """Returns each row's weighted mean squared error of y, in the dtype of `x0` even under autocast.

        `shown` is what the noise is added to, if not `x0` itself; the answer that leads to `x0` is asked for even so.
        """
        alpha, sigma, tau = self._at(t, x0)
        xt = alpha * (x0 if shown is None else shown) + sigma * eps
        y = self._answer(xt, alpha, sigma, tau, cond)
        if shown is not None:
            eps = (xt - alpha * x0) / sigma  # all of xt that x0 does not explain
        error = (y - target(self.objective, x0, eps, alpha, sigma)) ** 2
        weight = self.weighting(alpha, sigma, determinant(self.objective, alpha, sigma))
        return (weight * error).flatten(1).mean(1)

    def x0_weight(self, t: float) -> float:
        """Returns what the loss at `t` gives a squared error of x0_hat, which is an error of y times sigma/det."""
        alpha, sigma = (f(torch.tensor(t, dtype=torch.float64)) for f in (self.process.alpha, self.process.sigma))
        det = determinant(self.objective, alpha, sigma)
        return (self.weighting(alpha, sigma, det) * (det / sigma) ** 2).item()

    def _at(self, t: Tensor | float, xt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns alpha and sigma as (b, 1, ...) in the dtype of `xt`, and tau as (b,)."""
        # Times stay where they are until alpha and sigma are known: Apple's GPUs have no float64.
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(xt))
        column = t.reshape(-1, *[1] * (xt.ndim - 1))
        alpha, sigma = self.process.alpha(column), self.process.sigma(column)
        # bfloat16 cannot tell tau = 997 from 999, so tau is float32 at least.
        tau = self.process.tau(t).to(torch.promote_types(xt.dtype, torch.float32))
        return (
            alpha.to(xt, non_blocking=True),
            sigma.to(xt, non_blocking=True),
            tau.to(xt.device, non_blocking=True),
        )

    def _answer(self, xt: Tensor, alpha: Tensor, sigma: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        y = self.net(self.objective.input_scale(alpha, sigma) * xt, tau, cond)
        return y.to(xt.dtype)  # half precision under autocast; what follows is not to be rounded too


def _check_solvable(process: Process, objective: Objective) -> None:
    t = torch.tensor(process.t_max, dtype=torch.float64)
    det = determinant(objective, process.alpha(t), process.sigma(t)).item()
    if abs(det) < SMALLEST_DET:
        raise InputError(
            "MD-OBJECTIVE-001",
            f"The objective {type(objective).__name__} does not go with the process "
            f"{type(process).__name__}: at its noisiest time, t = {process.t_max}, the determinant "
            f"alpha·b - sigma·a is {det:.2g}, so the network's answer does not determine the image (where no "
            "signal is left, knowing eps tells nothing about x0). Choose objective=v, x0 or "
            "flow, or a process that keeps some signal.",
        )

"""Samplers: from noise to data with nothing but `denoise(x, t) -> (x0_hat, eps_hat)`.

Every sampler is one function named after its paper, and a generator of states: it yields what it sees at each
time before it moves on, and last the result. So n steps are n + 1 states, `list(sampler(...))[-1].xt` is the
image, and the whole list is a film.

    sampler(denoise, x, times, process, randn_like)

`x` is noise of standard deviation process.start_std(times[0]); `times` is a float64 grid on the CPU that falls
to 0, the data, or to whatever noise the result may keep (`minidiff.grids`); `process` gives alpha and sigma;
`randn_like(x)` gives fresh noise, and only stochastic samplers ask for it. A step goes from t to s < t. Karras'
sigma is our sigma/alpha, and his x our x/alpha.

    ddpm, ddim(eta)                            Ho et al. 2020, Song et al. 2021a
    euler, euler_ancestral(eta), heun          Karras et al. 2022
    dpmpp_2m, dpmpp_2m_sde, unipc              Lu et al. 2022, Zhao et al. 2023: steps in lambda = log(alpha/sigma)
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.grids import SIGMA_MIN, karras, log_snr, uniform
from minidiff.process import Process


class State(NamedTuple):
    """What a sampler sees at time `t`: the noisy image and the denoiser's split of it into data and noise."""

    t: Float[Tensor, ""]
    xt: Float[Tensor, "b ..."]
    x0_hat: Float[Tensor, "b ..."]
    eps_hat: Float[Tensor, "b ..."]


def ddpm(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Process,
    randn_like: Callable,
) -> Iterator[State]:
    """Draws from q(x_s | x_t, x0_hat) (Ho et al. 2020, eq. 7; for any process Kingma et al. 2021)."""
    alpha, sigma = process.alpha, process.sigma
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        forward = alpha(t) / alpha(s)  # DDPM's sqrt(1 - beta), over the step from s to t
        beta = sigma(t) ** 2 - forward**2 * sigma(s) ** 2
        mean = alpha(s) * beta / sigma(t) ** 2 * x0 + forward * sigma(s) ** 2 / sigma(t) ** 2 * x
        beta_tilde = beta * sigma(s) ** 2 / sigma(t) ** 2
        x = mean + beta_tilde.sqrt() * randn_like(x) if s > 0 else mean
    yield State(times[-1], x, x, eps)


def ddim(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Process,
    randn_like: Callable,
    *,
    eta: float = 0.0,
) -> Iterator[State]:
    """Keeps x0_hat, takes less eps_hat (Song et al. 2021a, eq. 12); `eta` swaps in fresh noise (1: DDPM)."""
    alpha, sigma = process.alpha, process.sigma
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        # Karras' sigma of s over that of t, multiplied out: finite even where alpha(t) = 0.
        ratio = alpha(t) * sigma(s) / (alpha(s) * sigma(t))
        fresh = eta * sigma(s) * (1 - ratio**2).sqrt()  # eq. 16, for any process
        x = alpha(s) * x0 + (sigma(s) ** 2 - fresh**2).clamp(min=0).sqrt() * eps
        if fresh > 0:
            x = x + fresh * randn_like(x)
    yield State(times[-1], x, x, eps)


def euler(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Process,
    randn_like: Callable,
) -> Iterator[State]:
    """Euler's method on dx/dsigma = eps_hat, in Karras' x and sigma (Karras et al. 2022, eq. 1)."""
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        # x + (sigma_s - sigma_t)·eps, with x = x0 + sigma_t·eps put in: finite even where alpha(t) = 0.
        x = process.alpha(s) * (x0 + process.karras_sigma(s) * eps)
    yield State(times[-1], x, x, eps)


def euler_ancestral(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Process,
    randn_like: Callable,
    *,
    eta: float = 1.0,
) -> Iterator[State]:
    """An Euler step to less noise than wanted, then noise added (k-diffusion's `sample_euler_ancestral`)."""
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        sigma_t, sigma_s = process.karras_sigma(t), process.karras_sigma(s)
        up = torch.minimum(sigma_s, eta * sigma_s * (1 - (sigma_s / sigma_t) ** 2).sqrt())
        down = (sigma_s**2 - up**2).clamp(min=0).sqrt()
        x = process.alpha(s) * (x0 + down * eps)
        if up > 0:
            x = x + process.alpha(s) * up * randn_like(x)
    yield State(times[-1], x, x, eps)


def heun(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Process,
    randn_like: Callable,
) -> Iterator[State]:
    """An Euler step, redone with the mean of the slopes at both ends (Karras et al. 2022, algorithm 1)."""
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        sigma_t, sigma_s = process.karras_sigma(t), process.karras_sigma(s)
        x = process.alpha(s) * (x0 + sigma_s * eps)
        # The last step stays Euler's, as in the paper, and so does a first one where alpha(t) = 0.
        if sigma_s > 0 and sigma_t.isfinite():
            slope_change = denoise(x, s)[1] - eps
            x = x + process.alpha(s) * (sigma_s - sigma_t) / 2 * slope_change
    yield State(times[-1], x, x, eps)


def dpmpp_2m(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Process,
    randn_like: Callable,
) -> Iterator[State]:
    """DPM-Solver++(2M): x0_hat extrapolated along lambda = log(alpha/sigma) (Lu et al. 2022, alg. 2).

    If the result keeps some noise, a last step of fewer than 15 is of first order, as in the authors' code.
    """
    last = None
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        x, last = _exponential_step(process, x, t, s, _ahead(process, x0, last, t, s, times)), State(t, x, x0, eps)
    yield State(times[-1], x, x, eps)


def dpmpp_2m_sde(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Process,
    randn_like: Callable,
) -> Iterator[State]:
    """SDE-DPM-Solver++(2M), midpoint: the same, while fresh noise replaces old (Lu et al. 2022, app. on SDEs)."""
    last = None
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        ahead, last = _ahead(process, x0, last, t, s, times), State(t, x, x0, eps)
        h = _lambda(process, s) - _lambda(process, t)
        x = process.sigma(s) / process.sigma(t) * torch.exp(-h) * x - process.alpha(s) * torch.expm1(-2 * h) * ahead
        fresh = process.sigma(s) * (-torch.expm1(-2 * h)).sqrt()
        if fresh > 0:
            x = x + fresh * randn_like(x)
    yield State(times[-1], x, x, eps)


def unipc(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Process,
    randn_like: Callable,
) -> Iterator[State]:
    """UniPC-2, B(h) = e^h - 1 (Zhao et al. 2023, alg. 5 to 8): DPM-Solver++(2M) predicts where a step ends, and x0_hat
    as seen there corrects the step before the next one is taken. The last step is of first order.
    """
    last = older = None  # what was seen at the last two times, x corrected
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        if last is not None:
            x = _exponential_step(process, last.xt, last.t, t, _between(process, older, last, t, x0))
        ahead = x0 if s == times[-1] else _ahead(process, x0, last, t, s, times)
        older, last = last, State(t, x, x0, eps)
        x = _exponential_step(process, x, t, s, ahead)
    yield State(times[-1], x, x, eps)


# What the exponential integrators share. In lambda = log(alpha/sigma), x/sigma is the integral of e^lambda·x0_hat: a
# step is exact while x0_hat stands still, and its order is that of the guess at how x0_hat moves meanwhile.


def _lambda(process: Process, t: Tensor) -> Tensor:
    return process.log_snr(t) / 2


def _exponential_step(process: Process, x: Tensor, t: Tensor, s: Tensor, x0: Tensor) -> Tensor:
    """Goes from t to s under a constant x0_hat."""
    h = _lambda(process, s) - _lambda(process, t)
    return process.sigma(s) / process.sigma(t) * x - process.alpha(s) * torch.expm1(-h) * x0


def _ahead(process: Process, x0: Tensor, last: State | None, t: Tensor, s: Tensor, times: Tensor) -> Tensor:
    """Returns x0_hat half-way to s, on the line through its last two values."""
    h = _lambda(process, s) - _lambda(process, t)
    # A step to the data is infinitely wide in lambda, where only first order is defined: x0_hat itself.
    if last is None or h.isinf() or (s == times[-1] and len(times) <= 15):
        return x0
    return x0 + h / (2 * (_lambda(process, t) - _lambda(process, last.t))) * (x0 - last.x0_hat)


def _between(process: Process, older: State | None, last: State, t: Tensor, x0: Tensor) -> Tensor:
    """Returns the mean of x0_hat from last.t to t under the weight e^lambda, on the parabola through all three values.

    With r the share of the step in lambda, the means of r and r² are Zhao et al.'s b_1 and b_2 (eq. 12).
    """
    if older is None:
        return (last.x0_hat + x0) / 2
    h = _lambda(process, t) - _lambda(process, last.t)
    r_older = (_lambda(process, older.t) - _lambda(process, last.t)) / h
    slope, slope_before = x0 - last.x0_hat, (older.x0_hat - last.x0_hat) / r_older
    bend = (slope - slope_before) / (1 - r_older)
    mean_r = -1 / torch.expm1(-h) - 1 / h
    mean_r2 = -1 / torch.expm1(-h) - 2 * mean_r / h
    return last.x0_hat + mean_r * (slope - bend) + mean_r2 * bend


# Runs saved before the grids had a room of their own name them here.
__all__ = ["SIGMA_MIN", "State", "ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "euler", "euler_ancestral", "heun"]
__all__ += ["karras", "log_snr", "unipc", "uniform"]

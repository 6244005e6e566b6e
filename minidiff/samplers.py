"""Samplers: from noise to data with nothing but `denoise(x, t) -> (x0_hat, eps_hat)`.

Every sampler is one function named after its paper, and a generator of states: it yields what it sees at each
time before it moves on, and last the result. So n steps are n + 1 states, `list(sampler(...))[-1].xt` is the
image, and the whole list is a film.

    sampler(denoise, x, times, process, randn_like)

`x` is noise of standard deviation sigma(times[0]); `times` is a float64 grid on the CPU that falls to exactly
0 (`uniform`, `log_snr`, `karras` below); `process` gives alpha and sigma; `randn_like(x)` gives fresh noise,
and only stochastic samplers ask for it. A step goes from t to s < t. Karras' sigma is our sigma/alpha, and
his x our x/alpha.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

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
        x = process.alpha(s) * (x0 + _karras_sigma(process, s) * eps)
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
        sigma_t, sigma_s = _karras_sigma(process, t), _karras_sigma(process, s)
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
        sigma_t, sigma_s = _karras_sigma(process, t), _karras_sigma(process, s)
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
    """DPM-Solver++(2M): x0_hat extrapolated along lambda = log(alpha/sigma) (Lu et al. 2022, alg. 2)."""
    last_x0, last_h = None, None
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        yield State(t, x, x0, eps)
        h = (process.log_snr(s) - process.log_snr(t)) / 2
        # The last step is infinitely wide in lambda, where only first order is defined: x0_hat itself.
        ahead = x0 if last_x0 is None or h.isinf() else x0 + h / (2 * last_h) * (x0 - last_x0)
        x = process.sigma(s) / process.sigma(t) * x - process.alpha(s) * torch.expm1(-h) * ahead
        last_x0, last_h = x0, h
    yield State(times[-1], x, x, eps)


def _karras_sigma(process: Process, t: Tensor) -> Tensor:
    return process.sigma(t) / process.alpha(t)


# Grids: n + 1 times for n steps. ----------------------------------------------------------------------

SIGMA_MIN = 0.005  # Karras' sigma before the last step: less than one of 256 grey levels in [-1, 1]
SIGMA_MAX = 1000.0  # stands for infinity where a process ends in pure noise


def uniform(process: Process, n: int) -> Float[Tensor, " times"]:
    """Returns `n` equal steps in t, from t_max to 0 (DDIM's and rectified flow's)."""
    return torch.linspace(process.t_max, 0, n + 1, dtype=torch.float64)


def log_snr(process: Process, n: int) -> Float[Tensor, " times"]:
    """Returns `n - 1` equal steps in log(snr) down to `SIGMA_MIN`, and one to 0 (Lu et al. 2022)."""
    start, end = torch.log(_sigma_range(process))
    return _times(process, torch.linspace(start, end, n, dtype=torch.float64).exp())


def karras(process: Process, n: int, rho: float = 7.0) -> Float[Tensor, " times"]:
    """Returns `n - 1` equal steps in sigma**(1/rho) down to `SIGMA_MIN`, one to 0 (Karras et al., eq. 5)."""
    start, end = _sigma_range(process) ** (1 / rho)
    return _times(process, torch.linspace(start, end, n, dtype=torch.float64) ** rho)


def _sigma_range(process: Process) -> Float[Tensor, "2"]:
    sigma_max = _karras_sigma(process, torch.tensor(process.t_max, dtype=torch.float64)).clamp(max=SIGMA_MAX)
    return torch.stack([sigma_max, torch.tensor(SIGMA_MIN, dtype=torch.float64)])


def _times(process: Process, karras_sigmas: Float[Tensor, " n"]) -> Float[Tensor, " times"]:
    """Returns the times of these noise levels, with the ends put in exactly: t_max and 0."""
    inner = process.t_of_log_snr(-2 * torch.log(karras_sigmas))[1:]
    return torch.cat([inner.new_tensor([process.t_max]), inner, inner.new_tensor([0.0])])

"""The forward process: how data becomes noise. A process is two functions of time,

    xt = alpha(t)·x0 + sigma(t)·eps,    t in [0, 1],    t = 0: data (alpha 1, sigma 0),    t = 1: noise.

Our alpha² is DDPM's alpha-bar (`alphas_cumprod`), and Karras' sigma is our sigma/alpha. The signal-to-noise
ratio is snr = alpha²/sigma².

    Linear, ScaledLinear, Cosine, Sigmoid    variance preserving, alpha² + sigma² = 1
    Flow                                     a straight line from data to noise
    EDM                                      variance exploding, alpha = 1
    Table                                    the N discrete levels of a foreign checkpoint
    ZeroTerminalSNR                          makes a variance preserving process end in pure noise

`t` may have any shape. Samplers need it in float64: in their last steps 1 - alpha is tiny.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff import schedule
from minidiff.errors import InputError, did_you_mean

SMALLEST_ALPHA = 1e-3  # of the data, below which a table's entries are not sampled or trained from


class Process:
    """The interface of a process, and what follows from `alpha` and `sigma` alone."""

    t_max = 1.0  # where training and sampling begin; below 1 where alpha(1) = 0 makes eps impossible to undo
    t_min = 0.0  # the cleanest time that training sees

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns how much of the data is left at time `t`."""
        raise NotImplementedError

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns the standard deviation of the noise at time `t`."""
        raise NotImplementedError

    def tau(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns the embedding time that networks receive, in DDPM's units: 0 … 999, fractions allowed."""
        return 999 * t

    def t_of_tau(self, tau: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns the times (float64) at which `tau` is reached."""
        return tau.double() / 999

    def start_std(self, t: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns the standard deviation of the noise that sampling starts from at time `t`."""
        return self.sigma(t)

    def draw(self, u: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns training times in (0, t_max] from uniform `u` in [0, 1)."""
        return self.t_max * (1 - u)  # u can be exactly 0, but at t = 0 there is nothing to learn

    def log_snr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns log(alpha²/sigma²): +inf at t = 0, and it only falls."""
        return 2 * torch.log(self.alpha(t) / self.sigma(t))

    def karras_sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns sigma/alpha, the noise level in units of the data (Karras et al. 2022)."""
        return self.sigma(t) / self.alpha(t)

    def t_of_log_snr(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns the times (float64) in [0, t_max] at which `log_snr` is reached, by bisection."""
        target = log_snr.double()
        low, high = torch.zeros_like(target), torch.full_like(target, self.t_max)
        for _ in range(64):
            middle = (low + high) / 2
            too_clean = self.log_snr(middle) > target
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        return high


@dataclass(frozen=True)
class Linear(Process):
    """DDPM (Ho et al. 2020) in continuous time: alpha² = exp(-∫beta) (Song et al. 2021b, app. C)."""

    beta_start: float = 1e-4  # noise of the first and the last of 1000 steps
    beta_end: float = 0.02

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sqrt(-torch.expm1(-self._integral(t)))  # keeps the digits that 1 - alpha² loses at t = 0

    def _integral(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return 1000 * (self.beta_start * t + (self.beta_end - self.beta_start) * t**2 / 2)


@dataclass(frozen=True)
class ScaledLinear(Linear):
    """Latent and Stable Diffusion (Rombach et al. 2022): the square root of beta rises linearly."""

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def _integral(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        start, rise = math.sqrt(self.beta_start), math.sqrt(self.beta_end) - math.sqrt(self.beta_start)
        return 1000 * (start**2 * t + start * rise * t**2 + rise**2 * t**3 / 3)


@dataclass(frozen=True)
class Cosine(Process):
    """alpha is a quarter of a cosine, so noise comes slowly at both ends (Nichol & Dhariwal 2021, eq. 17).

    `shift` multiplies alpha/sigma: below 1 there is more noise at every time, so that more of the training goes to what
    text decides, layout and form (Hoogeboom et al. 2023, "simple diffusion", eq. 6, shifts so for larger pictures).
    `middle` gives the times around 1/2 a density of 1/(1 - middle) in training, and those at the ends 1/(1 + middle).
    """

    s: float = 0.008  # keeps the first steps from being too small
    shift: float = 1.0
    middle: float = 0.0  # from 0 to below 1
    t_max = 0.999

    def draw(self, u: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        even = 1 - u
        return self.t_max * (even + self.middle * torch.sin(2 * math.pi * even) / (2 * math.pi))

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        data, noise = self._unshifted(t)
        return self.shift * data / torch.hypot(self.shift * data, noise)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        data, noise = self._unshifted(t)
        return noise / torch.hypot(self.shift * data, noise)

    def _unshifted(self, t: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        angle, start = ((time + self.s) / (1 + self.s) * (math.pi / 2) for time in (t, torch.zeros_like(t)))
        # From cos²a - cos²b = sin(b - a)·sin(b + a), which keeps the digits that 1 - alpha² loses near t = 0.
        noise = torch.sqrt(torch.sin(angle - start) * torch.sin(angle + start))
        return torch.cos(angle) / torch.cos(start), noise / torch.cos(start)


@dataclass(frozen=True)
class Sigmoid(Process):
    """alpha² falls along a sigmoid from `start` to `end`, scaled to go from 1 to 0 (Jabri et al. 2022)."""

    start: float = -3.0
    end: float = 3.0
    t_max = 0.999

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        low, now, high = self._values(t)
        return torch.sqrt((high - now) / (high - low))

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        low, now, high = self._values(t)
        return torch.sqrt((now - low) / (high - low))

    def _values(self, t: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], ...]:
        at = (torch.zeros_like(t), t, torch.ones_like(t))
        return tuple(torch.sigmoid(self.start + (self.end - self.start) * time) for time in at)


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow (Liu et al. 2023; Lipman et al. 2023): xt = (1 - t)·x0 + t·eps."""

    t_max = 0.999

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return 1 - t

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return t


@dataclass(frozen=True)
class LogitNormalFlow(Flow):
    """Rectified flow trained mostly mid-way: t = sigmoid(mean + std·normal) (Esser et al. 2024)."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, u: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(1 - u)).clamp(max=self.t_max)


@dataclass(frozen=True)
class EDM(Process):
    """alpha = 1, sigma = sigma_max·t**rho; training draws a log-normal sigma (Karras et al. 2022)."""

    sigma_max: float = 80.0
    rho: float = 7.0
    p_mean: float = -1.2  # mean and standard deviation of log sigma in training
    p_std: float = 1.2

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.ones_like(t)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.sigma_max * t**self.rho

    def draw(self, u: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        sigma = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(1 - u))
        return ((sigma / self.sigma_max) ** (1 / self.rho)).clamp(max=self.t_max)


@dataclass(frozen=True)
class Table(Process):
    """N discrete noise levels, alpha² = alphas_cumprod, as Stable Diffusion and most foreign checkpoints have them.

    Entry k, the library's timestep k, lies at t = (k + 1)/N, and t = 0 is the data: so tau(t) = N·t - 1. Between
    entries Karras' sigma is interpolated linearly in t, as the library's Euler sampler does it, or logarithmically
    (`log_linear`), as k-diffusion does it; before entry 0 it falls linearly to 0, where the network's time stays 0.

    Raises `InputError` (MD-PROCESS-002) for an unknown schedule or betas that are none.
    """

    betas: str | Sequence[float] = "linear"  # linear | scaled_linear | squaredcos_cap_v2, or the numbers themselves
    beta_start: float = 1e-4
    beta_end: float = 0.02
    n: int = 1000  # levels (num_train_timesteps); given betas are counted
    zero_terminal_snr: bool = False  # rescaled to end in pure noise (Lin et al. 2023, alg. 1)
    floor: float = 0.0  # the least alphas_cumprod: some samplers of the library put 2**-24 where it is 0
    log_linear: bool = False
    whole_tau: bool = False  # networks hear the nearest entry's time, as with the library's multistep samplers
    unit_start: bool = True  # sampling starts from noise of deviation 1, as if alpha·x0 were in it; else from sigma

    def __post_init__(self) -> None:
        if isinstance(self.betas, str):
            if self.betas not in schedule.NAMED:
                known = list(schedule.NAMED)
                raise _bad_table(f"there is no schedule '{self.betas}'.{did_you_mean(self.betas, known)}")
        else:
            object.__setattr__(self, "betas", tuple(self.betas))  # JSON has only lists, and they cannot be compared
            object.__setattr__(self, "n", len(self.betas))
        levels = self.alphas_cumprod
        if len(levels) < 2 or not (levels[0] < 1 and levels[-1] >= 0 and (levels.diff() < 0).all()):
            raise _bad_table("these betas do not add noise in every step: each must be above 0 and at most 1")

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, " n"]:
        """The table itself (float32): what is left of the data's variance at each entry."""
        betas = schedule.betas(self.betas, self.n, self.beta_start, self.beta_end)
        betas = schedule.zero_terminal_snr(betas) if self.zero_terminal_snr else betas
        return schedule.alphas_cumprod(betas).clamp(min=self.floor)

    @property
    def t_max(self) -> float:
        """1 if the table is meant to end in pure noise; else the noisiest entry with so much data left that eps tells
        x0 from it. squaredcos_cap_v2 has one entry beyond.
        """
        enough = self.n if self.zero_terminal_snr else (self.alphas_cumprod > SMALLEST_ALPHA**2).sum().item()
        return enough / self.n

    @property
    def t_min(self) -> float:
        return 1 / self.n

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.rsqrt(1 + self._karras(t) ** 2).to(t.dtype)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.rsqrt(1 + self._karras(t) ** -2).to(t.dtype)  # right for 0 and for infinity, unlike sigma·alpha

    def tau(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        tau = (self.n * t - 1).clamp(min=0)
        return tau.round() if self.whole_tau else tau

    def t_of_tau(self, tau: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return (tau.double() + 1) / self.n

    def start_std(self, t: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return torch.ones_like(t) if self.unit_start else self.sigma(t)

    def draw(self, u: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        entries = round(self.t_max * self.n)  # and nothing between them: what the checkpoint was trained on
        return (entries - torch.floor(u * entries)) / self.n

    @cached_property
    def _sigmas(self) -> Float[Tensor, " entries"]:
        """Karras' sigma of the data and of every entry, float64."""
        bar = self.alphas_cumprod.double()
        return torch.cat([bar.new_zeros(1), torch.sqrt((1 - bar) / bar)])

    def _karras(self, t: Tensor) -> Tensor:
        at = torch.round(self.n * t.double(), decimals=9)  # an entry is an entry, whatever (k + 1)/N·N rounds to
        above = at.ceil().clamp(1, self.n)
        low, high = self._sigmas.to(t.device)[torch.stack([above - 1, above]).long()]
        share = at - (above - 1)  # in (0, 1], so that no weight 0 meets an infinite sigma
        linear = (1 - share) * low + share * high
        return torch.where(low > 0, low * (high / low) ** share, linear) if self.log_linear else linear


def _bad_table(why: str) -> InputError:
    return InputError(
        "MD-PROCESS-002",
        f"The table of noise levels cannot be made: {why}. betas names one of "
        f"{', '.join(schedule.NAMED)}, from beta_start to beta_end, or lists the betas of a checkpoint.",
    )


@dataclass(frozen=True)
class ZeroTerminalSNR(Process):
    """A variance preserving process, alpha shifted and scaled to end at exactly 0 (Lin et al. 2023, alg. 1).

    At t = 1 nothing of the data is left, so eps cannot be the objective; `Denoiser` refuses it.
    """

    process: Process

    def __post_init__(self) -> None:
        half = torch.tensor(0.5, dtype=torch.float64)
        if abs(self.process.alpha(half) ** 2 + self.process.sigma(half) ** 2 - 1) > 1e-6:
            name = type(self.process).__name__
            raise InputError(
                "MD-PROCESS-001",
                f"ZeroTerminalSNR cannot wrap {name}: it rescales alpha and takes sigma from "
                f"alpha² + sigma² = 1, which {name} does not keep. Wrap Linear, ScaledLinear, Cosine or "
                "Sigmoid. Flow and EDM need none: the first ends in noise, the second drowns the data in it.",
            )

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        last = self.process.alpha(torch.ones_like(t))
        return (self.process.alpha(t) - last) / (1 - last)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        alpha = self.alpha(t)
        return torch.sqrt((1 - alpha) * (1 + alpha))

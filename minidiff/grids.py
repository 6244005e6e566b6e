"""Time grids: where a sampler stops on its way from noise to data.

    grid(process, n) -> n + 1 times (float64, on the CPU) for n steps, falling from the noisiest to the result's

`uniform`, `log_snr`, `karras` and `centred` work for every process and end at 0, the data. `leading`, `linspace` and
`trailing` are the spacings in use for a `Table` (Lin et al. 2023, table 2), which choose among its entries 0 … N - 1.
They differ in their ends, and so do the samplers' habits:

    spare      DPM-Solver and UniPC divide the table into n steps between entries and leave out the last entry; the
               others choose n entries
    whole      linspace meets entries (DDIM, DPM-Solver) or fractions between them (Euler, Heun)
    end        the entry of the result: -1 is the data, 0 the cleanest entry (the library's set_alpha_to_one=false or
               final_sigmas_type=sigma_min)
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.errors import InputError
from minidiff.process import Process, Table

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
    """Returns `n - 1` equal steps in sigma**(1/rho) down to `SIGMA_MIN`, one to 0 (Karras et al., eq. 5).

    For a `Table` they end at its cleanest entry instead, as the library's `use_karras_sigmas`.
    """
    start, end = _sigma_range(process) ** (1 / rho)
    return _times(process, torch.linspace(start, end, n, dtype=torch.float64) ** rho)


def centred(process: Process, n: int, width: float = 2.0, sigma_min: float = 0.03) -> Float[Tensor, " times"]:
    """Returns `n - 1` steps down to Karras' sigma `sigma_min`, short around 1 and longer towards the ends, one to 0:
    log(sigma) = width·sinh(u) with equal steps in u.

    Where noise and picture are about equally strong it is decided what the picture shows, and x0_hat changes most;
    where there is nearly nothing but one of them, long steps lose little. Lengths change gradually, because multistep
    solvers extrapolate from the last step over the next. Cf. Sabour et al. 2024, "Align Your Steps", who fit such
    grids to models.
    """
    start, end = _sigma_range(process)
    start, end = torch.asinh(torch.log(torch.stack([start, end.clamp(min=sigma_min)])) / width)
    return _times(process, (width * torch.linspace(start, end, n, dtype=torch.float64).sinh()).exp())


def leading(
    process: Process, n: int, *, offset: int = 0, spare: bool = False, end: int = -1
) -> Float[Tensor, " times"]:
    """Returns entries in equal whole steps, up from `offset`; the noisiest entries are not visited."""
    _check(process, n + spare)
    step = process.n // (n + spare)
    return _entries(process, torch.arange(n + spare).flip(0)[:n] * step + offset, end)


def linspace(
    process: Process, n: int, *, whole: bool = True, spare: bool = False, end: int = -1
) -> Float[Tensor, " times"]:
    """Returns entries in equal steps from the noisiest to the cleanest, rounded if `whole`."""
    _check(process, n + spare)
    # Not torch.linspace, whose last bit differs from NumPy's and decides which way a half is rounded.
    entries = (torch.arange(n + spare).double() * ((process.n - 1) / max(n + spare - 1, 1))).flip(0)[:n]
    return _entries(process, entries.round() if whole else entries, end)


def trailing(process: Process, n: int, *, end: int = -1) -> Float[Tensor, " times"]:
    """Returns entries in equal steps down from the noisiest, rounded: made for zero terminal SNR (Lin et al. 2023)."""
    _check(process, n)
    return _entries(process, (process.n - torch.arange(n).double() * (process.n / n)).round() - 1, end)


def _entries(process: Table, entries: Tensor, end: int) -> Float[Tensor, " times"]:
    return process.t_of_tau(torch.cat([entries.double(), entries.new_tensor([end]).double()]))


def _check(process: Process, n: int) -> None:
    if not isinstance(process, Table):
        raise InputError(
            "MD-SAMPLE-005",
            f"The spacings leading, linspace and trailing choose among the entries of a table of noise levels, and the "
            f"process {type(process).__name__} has none. Take grid=log_snr, karras or uniform, or train with "
            "process=table.",
        )
    if n > process.n:
        raise InputError(
            "MD-SAMPLE-004",
            f"The spacing would stop at {n} of {process.n} noise levels: a table cannot be divided into more steps "
            "than it has entries. Take fewer steps, or a grid that is not bound to entries (log_snr, karras, uniform).",
        )


def _sigma_range(process: Process) -> Float[Tensor, "2"]:
    ends = process.karras_sigma(torch.tensor([process.t_max, process.t_min], dtype=torch.float64))
    return ends.clamp(SIGMA_MIN, SIGMA_MAX)


def _times(process: Process, karras_sigmas: Float[Tensor, " n"]) -> Float[Tensor, " times"]:
    """Returns the times of these noise levels, with the ends put in exactly: t_max and 0."""
    inner = process.t_of_log_snr(-2 * torch.log(karras_sigmas))[1:]
    return torch.cat([inner.new_tensor([process.t_max]), inner, inner.new_tensor([0.0])])

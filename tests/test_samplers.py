"""Samplers on exact denoisers: independent integration, Gaussian closed forms, and one sampler against another."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch

from minidiff import grids, samplers
from minidiff.denoiser import Denoiser
from minidiff.objective import X0, Edm, Eps, FlowVelocity, Uniform, V
from minidiff.process import EDM, Cosine, Flow, Linear, ScaledLinear, Sigmoid, Table, ZeroTerminalSNR
from minidiff.samplers import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral, heun, unipc
from minidiff.toy import ExactNet, GaussianMixture

WITH_SIGNAL = [Linear(), ScaledLinear(), Cosine(), Sigmoid(), Flow(), EDM()]
PROCESSES = [*WITH_SIGNAL, ZeroTerminalSNR(ScaledLinear())]
ODE_SAMPLERS = [ddim, euler, heun, dpmpp_2m, unipc]
SAMPLERS = [*ODE_SAMPLERS, ddpm, euler_ancestral, dpmpp_2m_sde]

unchecked = pytest.mark.usefixtures("without_shape_checks")
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
every_process_with_signal = pytest.mark.parametrize("process", WITH_SIGNAL, ids=lambda p: type(p).__name__)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.__name__)
every_grid = pytest.mark.parametrize(
    "grid", [samplers.uniform, samplers.log_snr, samplers.karras, grids.centred], ids=lambda g: g.__name__
)

MIXTURE = GaussianMixture(
    torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.2, -1.0]], dtype=torch.float64),
    torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64),
    torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64),
)
GAUSSIAN = GaussianMixture(*(torch.tensor(x, dtype=torch.float64) for x in ([[0.4, -0.2]], [0.3], [1.0])))


def start(process, n=4, dtype=torch.float64):
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (process.sigma(torch.tensor(process.t_max, dtype=torch.float64)) * noise).to(dtype)


def noises(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def no_noise(x):
    raise AssertionError("a deterministic sampler asked for noise")


@cache
def stops(grid, process, n):
    """Returns the grid's times, found once for all samplers."""
    return grid(process, n)


def last(states):
    return list(states)[-1].xt


@cache
def reference(process):
    """Integrates dx/dsigma = eps_hat, Karras' ODE, by Runge-Kutta 4 in log sigma, from t_max to SIGMA_MIN.

    In Karras' x and sigma the ODE is the same for every process, so only the ends depend on it.
    """
    denoise = MIXTURE.denoiser(EDM(sigma_max=1e4, rho=1.0))

    def slope(x, log_sigma):
        sigma = log_sigma.exp()
        return sigma * denoise(x, sigma / 1e4)[1]

    first, end = samplers.log_snr(process, 2)[:2]
    log_sigmas = torch.linspace(-process.log_snr(first) / 2, -process.log_snr(end) / 2, 201, dtype=torch.float64)
    x, h = start(process) / process.alpha(first), log_sigmas[1] - log_sigmas[0]
    for log_sigma in log_sigmas[:-1]:
        k1 = slope(x, log_sigma)
        k2 = slope(x + h / 2 * k1, log_sigma + h / 2)
        k3 = slope(x + h / 2 * k2, log_sigma + h / 2)
        k4 = slope(x + h * k3, log_sigma + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return process.alpha(end) * x


def error(sampler, process, times):
    """Returns the distance to the reference before the last step, at SIGMA_MIN."""
    states = list(sampler(MIXTURE.denoiser(process), start(process), times, process, no_noise))
    return (states[-2].xt - reference(process)).abs().max().item()


# What every sampler promises.


@every_process
@every_sampler
def test_a_sampler_yields_what_it_sees_and_ends_at_the_data(process, sampler):
    times, denoise = stops(samplers.log_snr, process, 7), MIXTURE.denoiser(process)
    states = list(sampler(denoise, start(process), times, process, noises()))
    assert [s.t.item() for s in states] == times.tolist()
    assert torch.equal(states[0].xt, start(process))
    for state in states[:-1]:
        x0_hat, eps_hat = denoise(state.xt, state.t)
        assert torch.equal(state.x0_hat, x0_hat) and torch.equal(state.eps_hat, eps_hat)
    assert torch.equal(states[-1].xt, states[-1].x0_hat)
    torch.testing.assert_close(states[-1].xt, states[-2].x0_hat)  # the last step takes all remaining noise away


@every_sampler
def test_one_step_is_the_first_guess(sampler):
    process = Cosine()
    x = start(process)
    guess = MIXTURE.denoiser(process)(x, process.t_max)[0]
    torch.testing.assert_close(
        last(sampler(MIXTURE.denoiser(process), x, stops(samplers.log_snr, process, 1), process, no_noise)), guess
    )


@unchecked
@every_process
@every_sampler
def test_the_objective_does_not_change_the_image(process, sampler):
    times = stops(samplers.karras, process, 5)
    exact = last(sampler(MIXTURE.denoiser(process), start(process), times, process, noises()))
    for objective in [Eps(), X0(), V(), FlowVelocity(), Edm()]:
        if isinstance(objective, Eps) and isinstance(process, ZeroTerminalSNR):
            continue  # refused by Denoiser
        denoiser = Denoiser(ExactNet(MIXTURE, process, objective), process, objective, Uniform())
        denoise = lambda x, t, denoiser=denoiser: denoiser(x, t, None)  # noqa: E731
        image = last(sampler(denoise, start(process), times, process, noises()))
        torch.testing.assert_close(image, exact, rtol=0, atol=1e-6)


@every_process
@every_sampler
@every_grid
def test_float32_stays_finite_float32_from_the_noisiest_time(process, sampler, grid):
    objective = V()
    denoiser = Denoiser(ExactNet(MIXTURE, process, objective), process, objective, Uniform())
    for n in (1, 3):
        x = start(process, dtype=torch.float32)
        for state in sampler(lambda x, t: denoiser(x, t, None), x, stops(grid, process, n), process, noises()):
            assert state.xt.dtype == state.x0_hat.dtype == torch.float32
            assert state.xt.isfinite().all() and state.x0_hat.isfinite().all() and state.eps_hat.isfinite().all()


# The ODE.


@unchecked
@every_process_with_signal
@pytest.mark.parametrize("sampler, order, tolerance", [(ddim, 1, 0.04), (heun, 2, 2e-3), (dpmpp_2m, 2, 2e-3)])
def test_every_process_reaches_the_same_image_at_the_samplers_order(process, sampler, order, tolerance):
    errors = [error(sampler, process, stops(samplers.log_snr, process, n + 1)) for n in (30, 60, 120)]
    assert errors[-1] < tolerance
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.12)


@unchecked
@every_process_with_signal
def test_the_corrector_lifts_unipc_to_third_order(process):
    errors = [error(unipc, process, stops(samplers.log_snr, process, n + 1)) for n in (120, 240, 480)]
    assert errors[-1] < 4e-6
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(3.1, abs=0.2)
    few = [error(sampler, process, stops(samplers.log_snr, process, 31)) for sampler in (dpmpp_2m, unipc)]
    assert few[1] < 0.6 * few[0]


@unchecked
@pytest.mark.parametrize("sampler, order", [(ddim, 1), (heun, 2), (dpmpp_2m, 2), (unipc, 3)])
def test_the_order_holds_for_steps_of_unequal_width(sampler, order):
    # a multistep method must know how wide its last step was: here widths alternate between 1 and 2
    errors = []
    for n in (30, 60, 120):
        even = samplers.log_snr(Flow(), 3 * n + 1)
        kept = torch.arange(len(even)) % 3 != 2
        kept[-1] = True
        errors.append(error(sampler, Flow(), even[kept]))
    for coarse, fine in pairwise(errors):
        # unipc's third order shows late: its errors still fall faster here
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15 if order < 3 else 0.5)


@unchecked
@every_process
@pytest.mark.parametrize("sampler, tolerance", [(ddim, 0.07), (heun, 0.005), (dpmpp_2m, 0.002), (unipc, 0.002)])
def test_gaussian_data_flow_along_straight_quantiles(process, sampler, tolerance):
    # For N(mean, s²) the ODE keeps (xt - alpha·mean)/sqrt(alpha²·s² + sigma²), also from pure noise (alpha = 0).
    def quantile(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (x - alpha * GAUSSIAN.means) / (alpha**2 * GAUSSIAN.stds**2 + sigma**2).sqrt()

    times, x = stops(samplers.log_snr, process, 100), start(process)
    image = last(sampler(GAUSSIAN.denoiser(process), x, times, process, no_noise))
    torch.testing.assert_close(quantile(image, times[-1]), quantile(x, times[0]), rtol=0, atol=tolerance)


def test_rectified_flow_and_karras_and_ddim_take_the_same_steps():
    times, x, denoise = samplers.uniform(Flow(), 20), start(Flow()), MIXTURE.denoiser(Flow())
    by_ddim = [s.xt for s in ddim(denoise, x, times, Flow(), no_noise)]
    by_karras = [s.xt for s in euler(denoise, x, times, Flow(), no_noise)]
    by_flow = [x]
    for t, s in pairwise(times):  # Euler on dx/dt = velocity
        x0, eps = denoise(by_flow[-1], t)
        by_flow.append(by_flow[-1] + (s - t) * (eps - x0))
    torch.testing.assert_close(by_flow, by_ddim)
    torch.testing.assert_close(by_karras, by_ddim)


@every_process_with_signal
def test_euler_is_karras_euler_in_karras_coordinates(process):
    times, denoise = stops(samplers.karras, process, 20), MIXTURE.denoiser(process)
    x = start(process) / process.alpha(times[0])
    for t, s in pairwise(times):
        sigma_t, sigma_s = process.sigma(t) / process.alpha(t), process.sigma(s) / process.alpha(s)
        slope = (x - denoise(process.alpha(t) * x, t)[0]) / sigma_t
        x = x + (sigma_s - sigma_t) * slope
    torch.testing.assert_close(last(euler(denoise, start(process), times, process, no_noise)), x)


@every_process
def test_the_first_step_of_dpmpp_2m_is_ddim(process):
    times, denoise = stops(samplers.log_snr, process, 10), MIXTURE.denoiser(process)
    ours, ddims = (list(s(denoise, start(process), times, process, no_noise)) for s in (dpmpp_2m, ddim))
    torch.testing.assert_close(ours[1].xt, ddims[1].xt)


@pytest.mark.parametrize("sampler, calls", [(ddim, 9), (euler, 9), (heun, 17), (dpmpp_2m, 9), (unipc, 9)])
def test_what_a_sampler_costs(sampler, calls):
    count = 0

    def denoise(x, t):
        nonlocal count
        count += 1
        return MIXTURE.denoiser(EDM())(x, t)

    last(sampler(denoise, start(EDM()), samplers.karras(EDM(), 9), EDM(), no_noise))
    assert count == calls


# Fresh noise.


@every_process
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_eta_is_euler_ancestral(process, eta):
    times, denoise, x = samplers.uniform(process, 12), MIXTURE.denoiser(process), start(process)
    torch.testing.assert_close(
        last(ddim(denoise, x, times, process, noises(), eta=eta)),
        last(euler_ancestral(denoise, x, times, process, noises(), eta=eta)),
    )


@every_process
def test_ddim_with_eta_one_is_ddpm(process):
    times, denoise, x = samplers.uniform(process, 12), MIXTURE.denoiser(process), start(process)
    torch.testing.assert_close(
        last(ddim(denoise, x, times, process, noises(), eta=1.0)), last(ddpm(denoise, x, times, process, noises()))
    )


@every_process
@pytest.mark.parametrize(
    "sampler",
    [ddpm, lambda *args: ddim(*args, eta=1.0), euler_ancestral, dpmpp_2m_sde],
    ids=["ddpm", "ddim_1", "euler_ancestral", "dpmpp_2m_sde"],
)
def test_a_step_is_bayes_rule(process, sampler):
    # q(x_s | x_t, x0) ∝ q(x_t | x_s)·q(x_s | x0), two Gaussians in x_s: their precisions add
    t, s = torch.tensor([0.8, 0.5], dtype=torch.float64)
    x, x0 = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    eps = (x - process.alpha(t) * x0) / process.sigma(t)
    shrink = process.alpha(t) / process.alpha(s)
    added = process.sigma(t) ** 2 - shrink**2 * process.sigma(s) ** 2
    precision = shrink**2 / added + 1 / process.sigma(s) ** 2
    mean = (shrink * x / added + process.alpha(s) * x0 / process.sigma(s) ** 2) / precision

    def step(noise):
        states = sampler(lambda x, t: (x0, eps), x, torch.stack([t, s, 0 * s]), process, lambda x: noise)
        return list(states)[1].xt

    torch.testing.assert_close(step(torch.zeros_like(x)), mean)
    torch.testing.assert_close(step(torch.ones_like(x)) - mean, precision.rsqrt().expand_as(x))


@unchecked
def test_ddpm_is_equation_7_of_ddpm():
    process, x = Linear(), start(Linear())
    t, s = torch.tensor([500 / 999, 499 / 999], dtype=torch.float64)
    bar_t, bar_s = process.alpha(t) ** 2, process.alpha(s) ** 2
    beta = 1 - bar_t / bar_s
    x0 = MIXTURE.denoiser(process)(x, t)[0]
    mean = bar_s.sqrt() * beta / (1 - bar_t) * x0 + (1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t) * x
    noise = torch.ones_like(x)
    states = list(ddpm(MIXTURE.denoiser(process), x, torch.stack([t, s, 0 * s]), process, lambda x: noise))
    torch.testing.assert_close(states[1].xt, mean + ((1 - bar_s) / (1 - bar_t) * beta).sqrt() * noise)


def variance_of_images(sampler, process, n):
    """Returns the exact variance of a sampler's images when the data are N(0, 0.3²).

    The exact denoiser is linear, so the image is a sum over the start and the n - 1 fresh noises. Row i of the batch
    gets 1 for its own noise and 0 for all others, and answers with that noise's share.
    """
    data = GaussianMixture(torch.zeros(1, 1).double(), torch.tensor([0.3]).double(), torch.ones(1).double())
    times = stops(samplers.log_snr, process, n)
    rows = iter(torch.eye(n, dtype=torch.float64)[1:, :, None])
    first = (process.alpha(times[0]) ** 2 * 0.3**2 + process.sigma(times[0]) ** 2).sqrt()
    x = first * torch.eye(n, dtype=torch.float64)[0, :, None]
    return (last(sampler(data.denoiser(process), x, times, process, lambda x: next(rows))) ** 2).sum().item()


@unchecked
@every_process
@pytest.mark.parametrize("sampler", [ddpm, lambda *args: ddim(*args, eta=0.5)], ids=["ddpm", "ddim_half"])
def test_stochastic_samplers_give_images_of_the_right_variance(process, sampler):
    errors = [0.3**2 - variance_of_images(sampler, process, n) for n in (60, 120)]
    assert 0 < errors[1] < 0.11 * 0.3**2
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.15)  # first order


@unchecked
@every_process
def test_dpmpp_2m_sde_gives_the_right_variance_at_second_order(process):
    errors = [variance_of_images(dpmpp_2m_sde, process, n) - 0.3**2 for n in (60, 120)]
    assert 0 < errors[1] < 0.004 * 0.3**2
    assert errors[0] / errors[1] == pytest.approx(4.4, abs=0.4)


@every_process
def test_the_first_steps_of_dpmpp_2m_sde_and_unipc_are_ddpm_and_ddim(process):
    times, denoise, x = stops(samplers.log_snr, process, 10), MIXTURE.denoiser(process), start(process)
    for ours, first in [(dpmpp_2m_sde, ddpm), (unipc, ddim)]:
        states = [list(sampler(denoise, x, times, process, noises())) for sampler in (ours, first)]
        torch.testing.assert_close(states[0][1].xt, states[1][1].xt)


# Tables of discrete levels.


@unchecked
@every_sampler
@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero_snr"])
@pytest.mark.parametrize("grid", [grids.trailing, grids.karras], ids=lambda g: g.__name__)
def test_on_a_table_the_objective_does_not_change_the_image(sampler, zero_snr, grid):
    process = Table("scaled_linear", 0.00085, 0.012, zero_terminal_snr=zero_snr)
    times = grid(process, 5)
    x = process.start_std(times[0]) * torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = last(sampler(MIXTURE.denoiser(process), x, times, process, noises()))
    for objective in [X0(), V(), FlowVelocity(), Edm()] + [Eps()] * (not zero_snr):  # Denoiser refuses eps at zero SNR
        denoiser = Denoiser(ExactNet(MIXTURE, process, objective), process, objective, Uniform())
        denoise = lambda x, t, denoiser=denoiser: denoiser(x, t, None)  # noqa: E731
        image = last(sampler(denoise, x, times, process, noises()))
        torch.testing.assert_close(image, exact, rtol=0, atol=1e-6)


# Grids.


@every_process
@every_grid
@pytest.mark.parametrize("n", [1, 2, 25])
def test_grids_fall_from_t_max_to_exactly_zero(process, grid, n):
    times = grid(process, n)
    assert times.shape == (n + 1,) and times.dtype == torch.float64
    assert times[0] == process.t_max and times[-1] == 0
    assert (times.diff() < 0).all()


@every_process_with_signal
def test_log_snr_takes_equal_steps_down_to_sigma_min(process):
    inner = process.log_snr(samplers.log_snr(process, 20)[:-1])
    torch.testing.assert_close(inner.diff(), inner.diff()[0].expand(19), rtol=1e-6, atol=0)
    assert math.exp(-inner[-1] / 2) == pytest.approx(samplers.SIGMA_MIN)


@every_process_with_signal
def test_karras_is_equation_5(process):
    n, rho = 10, 5.0
    times = samplers.karras(process, n, rho)[:-1]
    sigmas = process.sigma(times) / process.alpha(times)
    high, low = sigmas[0] ** (1 / rho), samplers.SIGMA_MIN ** (1 / rho)
    expected = [(high + i / (n - 1) * (low - high)) ** rho for i in range(n)]
    torch.testing.assert_close(sigmas, torch.stack(expected), rtol=1e-6, atol=0)


@every_process_with_signal
def test_centred_takes_short_steps_where_noise_and_data_are_equally_strong(process):
    half_snr = process.log_snr(grids.centred(process, 12, width=1.5, sigma_min=0.02)[:-1]) / 2
    u = torch.asinh(half_snr / 1.5)
    torch.testing.assert_close(u.diff(), u.diff()[0].expand(11), rtol=1e-6, atol=0)
    assert math.exp(-half_snr[-1]) == pytest.approx(0.02)
    nearest = int((half_snr[1:] + half_snr[:-1]).abs().argmin())
    assert int(half_snr.diff().argmin()) == nearest


@unchecked
@pytest.mark.parametrize("sampler", [dpmpp_2m, unipc, ddim], ids=lambda s: s.__name__)
@pytest.mark.parametrize("process", [Linear(), Cosine(), Flow(), EDM()], ids=lambda p: type(p).__name__)
def test_centred_steps_lose_less_than_as_many_steps_of_log_snr_and_karras(process, sampler):
    """In the mixture, as in pictures, x0_hat turns to one mode where noise and data are equally strong."""
    denoise, x = MIXTURE.denoiser(process), start(process, 256)
    exact = last(dpmpp_2m(denoise, x, stops(samplers.log_snr, process, 400), process, no_noise))

    def error(grid):
        return (last(sampler(denoise, x, stops(grid, process, 12), process, no_noise)) - exact).abs().mean()

    assert error(grids.centred) < 0.7 * min(error(samplers.log_snr), error(samplers.karras))


def test_uniform_takes_equal_steps():
    assert samplers.uniform(Linear(), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]

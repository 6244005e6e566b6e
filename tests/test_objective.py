"""Objectives and weightings against their papers' closed forms."""

import math

import pytest
import torch

from minidiff.objective import X0, Edm, Eps, FlowVelocity, MinSNR, Uniform, V, VError, determinant, solve, target
from minidiff.process import EDM, Cosine, Flow, Linear, ScaledLinear, Sigmoid, ZeroTerminalSNR

PROCESSES = [Linear(), ScaledLinear(), Cosine(), Sigmoid(), Flow(), EDM(), ZeroTerminalSNR(ScaledLinear())]
OBJECTIVES = [Eps(), X0(), X0(shrink=True), V(), FlowVelocity(), Edm()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)


def levels(process, n=9):
    """Returns alpha and sigma, (n, 1), from the last step of a sampler (Karras' sigma 0.005) to t_max."""
    low = process.t_of_log_snr(torch.tensor(-2 * math.log(0.005))).item()
    t = torch.linspace(low, process.t_max, n, dtype=torch.float64)[:, None]
    return process.alpha(t), process.sigma(t)


def pairs(n=9, d=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, n, d, generator=generator, dtype=torch.float64)


@every_process
@every_objective
def test_solve_inverts_target(process, objective):
    alpha, sigma = levels(process)
    if isinstance(process, ZeroTerminalSNR) and isinstance(objective, Eps):
        alpha, sigma = alpha[:-1], sigma[:-1]  # at t = 1 there is no solution
    x0, eps = pairs(len(alpha))
    y = target(objective, x0, eps, alpha, sigma)
    x0_hat, eps_hat = solve(objective, alpha * x0 + sigma * eps, y, alpha, sigma)
    torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-9)


@every_process
@every_objective
def test_any_answer_is_consistent_with_xt(process, objective):
    alpha, sigma = levels(process, n=8)
    alpha, sigma = alpha[:-1], sigma[:-1]
    xt, y = pairs(len(alpha))
    x0_hat, eps_hat = solve(objective, xt, y, alpha, sigma)
    torch.testing.assert_close(alpha * x0_hat + sigma * eps_hat, xt, rtol=0, atol=1e-9)
    torch.testing.assert_close(target(objective, x0_hat, eps_hat, alpha, sigma), y, rtol=0, atol=1e-9)


def test_solving_eps_is_ddpms_formula_for_x0():
    # Ho et al. 2020, eq. 15: x0 = (xt - sqrt(1 - alpha_bar)·eps)/sqrt(alpha_bar)
    alpha, sigma = levels(Linear())
    xt, eps_hat = pairs()
    alpha_bar = alpha**2
    x0_hat, same_eps = solve(Eps(), xt, eps_hat, alpha, sigma)
    torch.testing.assert_close(x0_hat, (xt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt())
    torch.testing.assert_close(same_eps, eps_hat)


def test_determinants_tell_where_an_objective_is_well_posed():
    alpha, sigma = levels(Cosine())
    torch.testing.assert_close(determinant(Eps(), alpha, sigma), alpha)  # gone where all is noise
    torch.testing.assert_close(determinant(X0(), alpha, sigma), -sigma)  # gone where all is data
    torch.testing.assert_close(determinant(V(), alpha, sigma), torch.ones_like(alpha))
    alpha, sigma = levels(Flow())
    torch.testing.assert_close(determinant(FlowVelocity(), alpha, sigma), torch.ones_like(alpha))
    alpha, sigma = levels(EDM())
    assert (determinant(Edm(), alpha, sigma).abs() >= 1).all()


def test_the_flow_objective_is_the_velocity_of_the_flow_process():
    x0, eps = pairs(1)
    t, s = torch.tensor([0.3, 0.8], dtype=torch.float64)
    xt, xs = (Flow().alpha(time) * x0 + Flow().sigma(time) * eps for time in (t, s))
    torch.testing.assert_close((xs - xt) / (s - t), target(FlowVelocity(), x0, eps, Flow().alpha(t), Flow().sigma(t)))


def test_v_is_the_velocity_along_the_angle():
    # Salimans & Ho 2022: with alpha = cos(phi), sigma = sin(phi), v = dx/dphi
    x0, eps = pairs(1)
    phi, h = torch.tensor(0.7, dtype=torch.float64), 1e-5
    before, after = (angle.cos() * x0 + angle.sin() * eps for angle in (phi - h, phi + h))
    torch.testing.assert_close((after - before) / (2 * h), target(V(), x0, eps, phi.cos(), phi.sin()))


def test_edm_is_karras_table_1():
    sigma_data = 0.7
    alpha, sigma = levels(EDM())
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    x0, eps = pairs()
    x, edm = x0 + sigma * eps, Edm(sigma_data)
    torch.testing.assert_close(target(edm, x0, eps, alpha, sigma), (x0 - c_skip * x) / c_out)
    torch.testing.assert_close(edm.input_scale(alpha, sigma), c_in)
    f = torch.randn_like(x)
    torch.testing.assert_close(solve(edm, x, f, alpha, sigma)[0], c_skip * x + c_out * f)
    # weight 1 on f is Karras' lambda = 1/c_out² on the denoised image
    torch.testing.assert_close(determinant(edm, alpha, sigma).abs() / sigma, 1 / c_out)


@every_process
def test_edm_input_and_target_have_unit_variance_for_any_process(process):
    alpha, sigma = levels(process)
    edm = Edm(sigma_data=0.3)
    a, b = edm.pair(alpha, sigma)
    torch.testing.assert_close((a * 0.3) ** 2 + b**2, torch.ones_like(alpha))
    variance = (alpha * 0.3) ** 2 + sigma**2
    torch.testing.assert_close(edm.input_scale(alpha, sigma) ** 2 * variance, torch.ones_like(alpha))


def test_edm_with_unit_data_is_minus_v():
    alpha, sigma = levels(Cosine())
    x0, eps = pairs()
    torch.testing.assert_close(target(Edm(sigma_data=1.0), x0, eps, alpha, sigma), -target(V(), x0, eps, alpha, sigma))


@pytest.mark.parametrize(
    "objective, closed_form",
    [
        (Eps(), lambda snr, gamma: torch.minimum(snr, gamma) / snr),
        (X0(), lambda snr, gamma: torch.minimum(snr, gamma)),
        (V(), lambda snr, gamma: torch.minimum(snr, gamma) / (snr + 1)),
    ],
    ids=["eps", "x0", "v"],
)
def test_min_snr_is_the_papers_closed_form(objective, closed_form):
    alpha, sigma = levels(Cosine(), n=101)
    weight = MinSNR(gamma=5.0)(alpha, sigma, determinant(objective, alpha, sigma))
    snr = alpha**2 / sigma**2
    assert snr.min() < 5 < snr.max()
    torch.testing.assert_close(weight, closed_form(snr, torch.tensor(5.0, dtype=torch.float64)))


@pytest.mark.parametrize("objective", [X0(), V(), FlowVelocity(), Edm()], ids=lambda o: type(o).__name__)
def test_min_snr_gives_no_weight_to_pure_noise(objective):
    alpha, sigma = torch.zeros(1), torch.ones(1)
    assert MinSNR()(alpha, sigma, determinant(objective, alpha, sigma)).item() == 0


@pytest.mark.parametrize("objective", [Eps(), V(), FlowVelocity(), Edm()], ids=lambda o: type(o).__name__)
def test_min_snr_is_finite_without_noise(objective):
    alpha, sigma = torch.ones(1), torch.zeros(1)
    assert math.isfinite(MinSNR()(alpha, sigma, determinant(objective, alpha, sigma)).item())


@every_objective
def test_min_snr_weighs_the_same_error_of_x0_the_same_for_every_objective(objective):
    alpha, sigma = levels(Sigmoid())
    xt, y = pairs()
    mistake = torch.randn_like(y)
    moved = solve(objective, xt, y + mistake, alpha, sigma)[0] - solve(objective, xt, y, alpha, sigma)[0]
    weight = MinSNR(gamma=3.0)(alpha, sigma, determinant(objective, alpha, sigma))
    snr = alpha**2 / sigma**2
    torch.testing.assert_close(weight * mistake**2, snr.clamp(max=3.0) * moved**2, rtol=1e-6, atol=1e-12)


def test_uniform_is_one_per_row():
    alpha, sigma = levels(Linear())
    assert torch.equal(Uniform()(alpha, sigma, alpha), torch.ones_like(alpha))


@every_objective
def test_v_error_is_the_error_of_v_whatever_the_network_answers(objective):
    alpha, sigma = levels(Cosine())
    x0, eps = pairs()
    y = target(objective, x0, eps, alpha, sigma)
    answer = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = VError(limit=math.inf)(alpha, sigma, determinant(objective, alpha, sigma))
    x0_hat, eps_hat = solve(objective, alpha * x0 + sigma * eps, answer, alpha, sigma)
    v_hat, v = (target(V(), *both, alpha, sigma) for both in ((x0_hat, eps_hat), (x0, eps)))
    torch.testing.assert_close(weight * (answer - y) ** 2, (v_hat - v) ** 2, rtol=1e-6, atol=1e-9)


def test_v_error_is_bounded_in_terms_of_x0():
    alpha, sigma = levels(Cosine())
    weight = VError(limit=10.0)(alpha, sigma, determinant(X0(), alpha, sigma))
    torch.testing.assert_close(weight, (1 + alpha**2 / sigma**2).clamp(max=10.0))

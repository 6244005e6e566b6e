"""Processes: exact ends, closed forms against numerical integrals and diffusers, and the inverse of log-SNR."""

import math

import pytest
import torch

from minidiff.errors import InputError
from minidiff.process import (
    EDM,
    Cosine,
    Flow,
    Linear,
    LogitNormalFlow,
    ScaledLinear,
    Sigmoid,
    ZeroTerminalSNR,
)

PRESERVING = [
    Linear(),
    ScaledLinear(),
    Cosine(),
    Cosine(shift=0.5),
    Cosine(shift=0.5, middle=0.5),
    Sigmoid(),
    ZeroTerminalSNR(ScaledLinear()),
    ZeroTerminalSNR(Cosine()),
]
PROCESSES = [*PRESERVING, Flow(), LogitNormalFlow(), EDM()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=str)


def times(low=0.0, high=1.0, n=1001):
    return torch.linspace(low, high, n, dtype=torch.float64)


@every_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_zero_is_exactly_the_data(process, dtype):
    zero = torch.zeros((), dtype=dtype)
    assert process.alpha(zero) == 1 and process.sigma(zero) == 0
    assert process.alpha(zero).dtype == process.sigma(zero).dtype == dtype


@every_process
def test_the_snr_only_falls(process):
    log_snr = process.log_snr(times(high=process.t_max))
    assert log_snr[0] == math.inf
    assert (log_snr.diff() < 0).all()


@pytest.mark.parametrize("process", PRESERVING, ids=str)
def test_variance_is_preserved(process):
    t = times()
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


def test_a_shift_of_the_cosine_moves_its_log_snr_and_keeps_its_ends():
    t = times(low=0.001, high=0.999)
    moved = Cosine(shift=0.25).log_snr(t) - Cosine().log_snr(t)
    torch.testing.assert_close(moved, torch.full_like(t, 2 * math.log(0.25)))
    assert Cosine(shift=0.25).alpha(torch.zeros(())).item() == 1


@pytest.mark.parametrize("process", [Linear(), ScaledLinear(), Cosine()], ids=str)
def test_little_noise_keeps_its_digits_in_float32(process):
    # sqrt(1 - alpha²) in float32 would be off by several percent here
    t = torch.tensor([1e-6, 1e-5, 1e-4, 1e-3])
    exact = process.sigma(t.double())
    torch.testing.assert_close(process.sigma(t).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "process, beta_root",
    [
        (Linear(), lambda s: (1000 * (1e-4 + (0.02 - 1e-4) * s)).sqrt()),
        (ScaledLinear(), lambda s: 1000**0.5 * (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * s)),
    ],
    ids=["linear", "scaled_linear"],
)
def test_alpha_is_the_integral_of_beta(process, beta_root):
    s = times(n=100_001)
    integral = torch.cumulative_trapezoid(beta_root(s) ** 2, s)
    torch.testing.assert_close(process.alpha(s[1:]), torch.exp(-integral / 2), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "process, beta_schedule, betas",
    [
        (Linear(), "linear", (1e-4, 0.02)),
        (ScaledLinear(), "scaled_linear", (0.00085, 0.012)),
        (Cosine(), "squaredcos_cap_v2", (1e-4, 0.02)),
    ],
    ids=["linear", "scaled_linear", "cosine"],
)
@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero_snr"])
def test_a_thousand_discrete_steps_of_diffusers_lie_on_our_curve(process, beta_schedule, betas, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=beta_schedule,
        beta_start=betas[0],
        beta_end=betas[1],
        rescale_betas_zero_snr=zero_snr,
    )
    process = ZeroTerminalSNR(process) if zero_snr else process
    t = times(high=1.0)[1:]  # after k + 1 of 1000 steps
    torch.testing.assert_close(process.alpha(t), scheduler.alphas_cumprod.double().sqrt(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("inner", [Linear(), ScaledLinear(), Cosine(), Sigmoid()], ids=str)
def test_zero_terminal_snr_ends_in_pure_noise_and_leaves_the_data_alone(inner):
    process, one = ZeroTerminalSNR(inner), torch.ones((), dtype=torch.float64)
    assert process.t_max == 1.0
    assert process.alpha(one) == 0 and process.sigma(one) == 1
    # the shift is by the last alpha, so no alpha may move by more than that
    assert (process.alpha(times()) - inner.alpha(times())).abs().max() <= inner.alpha(one) + 1e-12


@pytest.mark.parametrize("inner", [Flow(), EDM()], ids=str)
def test_zero_terminal_snr_refuses_what_does_not_preserve_variance(inner):
    with pytest.raises(InputError, match=f"cannot wrap {type(inner).__name__}") as error:
        ZeroTerminalSNR(inner)
    assert error.value.code == "MD-PROCESS-001"


@every_process
def test_t_of_log_snr_inverts_log_snr(process):
    t = times(1e-3, process.t_max)
    torch.testing.assert_close(process.t_of_log_snr(process.log_snr(t)), t, rtol=1e-9, atol=1e-12)


def test_noisier_than_the_process_gets_is_its_noisiest_time():
    log_snr = torch.tensor([-1e3, math.inf])
    assert Cosine().t_of_log_snr(log_snr).tolist() == pytest.approx([0.999, 0.0], abs=1e-15)


def test_edm_rebuilds_karras_noise_levels_from_equal_steps_in_t():
    # Karras et al. 2022, eq. 5 with sigma_min = 0
    sigma = EDM(sigma_max=80.0, rho=7.0).sigma(times(n=9))
    expected = [(i / 8 * 80 ** (1 / 7)) ** 7 for i in range(9)]
    assert sigma.tolist() == pytest.approx(expected)


@every_process
def test_draws_are_training_times_even_at_the_ends_of_u(process):
    u = torch.tensor([0.0, 1e-7, 0.5, 1 - 2**-24])
    t = process.draw(u)
    assert ((t > 0) & (t <= process.t_max)).all()


def test_most_processes_draw_evenly():
    u = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = Cosine().draw(u)
    quarters = torch.histc(t, bins=4, min=0, max=0.999) / len(t)
    torch.testing.assert_close(quarters, torch.full_like(quarters, 0.25), rtol=0, atol=0.02)


@pytest.mark.parametrize("middle", [0.0, 0.5, 0.9])
def test_cosine_draws_the_middle_times_as_densely_as_it_says(middle):
    u = times(n=100_001)[:-1] + 0.5e-5
    t = Cosine(middle=middle).draw(u) / Cosine.t_max
    assert (t.diff() < 0).all() and t.min() > 0 and t.max() < 1
    density = torch.histc(t, bins=1001, min=0, max=1) * 1001 / len(t)
    torch.testing.assert_close(density[500].item(), 1 / (1 - middle), rtol=0.02, atol=0)
    torch.testing.assert_close(density[[0, -1]], torch.full((2,), 1 / (1 + middle)).double(), rtol=0.02, atol=0)


def test_edm_draws_log_normal_noise():
    process = EDM(p_mean=-0.4, p_std=1.0)
    u = times(n=20_001)[:-1] + 0.5 / 20_000
    log_sigma = torch.log(process.sigma(process.draw(u)))
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=1e-3)
    assert log_sigma.std().item() == pytest.approx(1.0, abs=1e-2)


def test_logit_normal_flow_draws_logit_normal_times():
    process = LogitNormalFlow(mean=0.5, std=0.8)
    u = times(n=20_001)[:-1] + 0.5 / 20_000
    logit = torch.logit(process.draw(u))
    assert logit.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert logit.std().item() == pytest.approx(0.8, abs=1e-2)
    # and there is no other difference from Flow
    assert torch.equal(process.alpha(u), Flow().alpha(u)) and torch.equal(process.sigma(u), Flow().sigma(u))


def test_tau_is_in_ddpms_units():
    assert Linear().tau(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 499.5, 999.0]

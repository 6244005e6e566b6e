"""The denoiser: what the network sees, what comes back, and the loss, against exact networks and closed forms."""

import pytest
import torch
from torch import nn

from minidiff.cond import Cond
from minidiff.denoiser import Denoiser
from minidiff.errors import InputError
from minidiff.objective import X0, Edm, Eps, FlowVelocity, MinSNR, Uniform, V, target
from minidiff.process import EDM, Cosine, Flow, Linear, ScaledLinear, Sigmoid, ZeroTerminalSNR
from minidiff.toy import ExactNet, GaussianMixture

PROCESSES = [Linear(), ScaledLinear(), Cosine(), Sigmoid(), Flow(), EDM(), ZeroTerminalSNR(ScaledLinear())]
OBJECTIVES = [Eps(), X0(), V(), FlowVelocity(), Edm()]
PAIRS = [
    pytest.param(p, o, id=f"{type(p).__name__}-{type(o).__name__}")
    for p in PROCESSES
    for o in OBJECTIVES
    if not (isinstance(p, ZeroTerminalSNR) and isinstance(o, Eps))
]


class Recorder(nn.Module):
    """A network that answers with a fixed function of its input and remembers what it was called with."""

    def __init__(self, answer=torch.zeros_like):
        super().__init__()
        self.answer = answer

    def forward(self, x, tau, cond):
        self.x, self.tau, self.cond = x, tau, cond
        return self.answer(x)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture():
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.2, -1.0]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.3, 0.2, 0.5]).double(), torch.tensor([1.0, 2.0, 1.0]).double())


@pytest.mark.parametrize("process, objective", PAIRS)
def test_an_exact_net_makes_an_exact_denoiser(process, objective):
    denoiser = Denoiser(ExactNet(mixture(), process, objective), process, objective, Uniform())
    xt, t = normal(6, 2, dtype=torch.float64), torch.linspace(0.2, process.t_max, 6, dtype=torch.float64)
    for answer, exact in zip(denoiser(xt, t, None), mixture().denoiser(process)(xt, t), strict=True):
        torch.testing.assert_close(answer, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shown", [None, [0.1, 0.4]], ids=["x0_is_shown", "another_is_shown"])
@pytest.mark.parametrize("process, objective", PAIRS)
def test_knowing_the_answer_costs_nothing(process, objective, shown):
    # if all data is one point, an exact net knows x0, wherever xt comes from, and makes no error
    point = GaussianMixture(torch.tensor([[0.3, -0.7]]).double(), torch.zeros(1).double(), torch.ones(1).double())
    denoiser = Denoiser(ExactNet(point, process, objective), process, objective, MinSNR())
    x0, t = point.means.expand(6, 2), torch.linspace(0.3, process.t_max, 6, dtype=torch.float64)
    shown = shown and torch.tensor(shown).double().expand(6, 2)
    loss = denoiser.loss(x0, None, t, normal(6, 2, dtype=torch.float64), shown)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-9)


@pytest.mark.parametrize("process, objective", PAIRS)
def test_who_is_shown_another_picture_is_judged_by_the_error_of_x0_hat(process, objective):
    denoiser = Denoiser(Recorder(torch.sin), process, objective, MinSNR(gamma=2.0))
    x0, shown, eps = (normal(6, 2, seed=i, dtype=torch.float64) for i in range(3))
    t = torch.linspace(0.3, 0.9, 6, dtype=torch.float64)
    alpha, sigma = (f(t[:, None]) for f in (process.alpha, process.sigma))
    x0_hat, _ = denoiser(alpha * shown + sigma * eps, t, None)
    error = torch.minimum((alpha / sigma) ** 2, torch.tensor(2.0)) * (x0_hat - x0) ** 2
    torch.testing.assert_close(denoiser.loss(x0, None, t, eps, shown), error.mean(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("process, objective", PAIRS)
def test_x0_weight_is_what_the_loss_gives_an_error_of_x0_hat(process, objective):
    denoiser, t = Denoiser(Recorder(torch.sin), process, objective, Uniform()), 0.4
    x0, eps = (normal(1, 2, seed=i, dtype=torch.float64) for i in range(2))
    alpha, sigma = (f(torch.tensor(t).double()) for f in (process.alpha, process.sigma))
    x0_hat, _ = denoiser(alpha * x0 + sigma * eps, t, None)
    error = (x0_hat - x0).square().mean().item()
    assert denoiser.loss(x0, None, t, eps).item() == pytest.approx(denoiser.x0_weight(t) * error)


def test_the_loss_of_the_best_net_is_what_cannot_be_known():
    # x0 ~ N(0, s²): Var[eps | xt] = alpha²·s²/(alpha²·s² + sigma²)
    s, n, process = 0.5, 100_000, Cosine()
    data = GaussianMixture(torch.zeros(1, 1), torch.tensor([s]), torch.ones(1))
    denoiser = Denoiser(ExactNet(data, process, Eps()), process, Eps(), Uniform())
    for t in (0.2, 0.5, 0.8):
        loss = denoiser.loss(s * normal(n, 1, seed=1), None, t, normal(n, 1, seed=2)).mean().item()
        alpha, sigma = process.alpha(torch.tensor(t)).item(), process.sigma(torch.tensor(t)).item()
        assert loss == pytest.approx((alpha * s) ** 2 / ((alpha * s) ** 2 + sigma**2), rel=0.02)


@pytest.mark.parametrize("weighting", [Uniform(), MinSNR(gamma=2.0)], ids=["uniform", "min_snr"])
def test_the_loss_is_each_rows_weighted_mean_square(weighting):
    process, objective = Cosine(), V()
    x0, eps = normal(4, 3, 4, 4, seed=1), normal(4, 3, 4, 4, seed=2)
    t = torch.tensor([0.1, 0.4, 0.6, 0.95], dtype=torch.float64)
    loss = Denoiser(Recorder(), process, objective, weighting).loss(x0, None, t, eps)
    assert loss.shape == (4,)
    for row in range(4):
        alpha, sigma = process.alpha(t[row]), process.sigma(t[row])
        y = target(objective, x0[row], eps[row], alpha, sigma)
        expected = weighting(alpha, sigma, torch.ones_like(alpha)) * (y**2).mean()
        assert loss[row].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.tensor([0.3, 0.3, 0.3]).double()], ids=type)
def test_time_may_be_a_number_or_one_per_row(t):
    denoiser = Denoiser(Recorder(torch.sin), Flow(), X0(), Uniform())
    xt = normal(3, 1, 2, 2)
    x0_hat, eps_hat = denoiser(xt, t, None)
    torch.testing.assert_close(x0_hat, xt.sin())
    torch.testing.assert_close(eps_hat, (xt - 0.7 * xt.sin()) / 0.3)
    assert denoiser.net.tau.shape == (3,)


def test_shrink_shows_the_network_alpha_xt_and_nothing_where_no_data_is_left():
    process, xt = ZeroTerminalSNR(Cosine()), normal(3, 1, 2, 2)
    denoiser = Denoiser(Recorder(lambda x: x), process, X0(shrink=True), Uniform())
    t = torch.tensor([0.1, 0.6, 1.0], dtype=torch.float64)
    x0_hat, eps_hat = denoiser(xt, t, None)
    alpha, sigma = (f(t).float().reshape(3, 1, 1, 1) for f in (process.alpha, process.sigma))
    torch.testing.assert_close(x0_hat, alpha * xt)
    torch.testing.assert_close(alpha * x0_hat + sigma * eps_hat, xt)
    assert not x0_hat[2].any()


def test_each_row_has_its_own_time_even_where_batch_and_width_are_the_same():
    denoiser = Denoiser(Recorder(torch.tanh), Cosine(), Edm(), Uniform())
    xt, t = normal(4, 4, 4, 4), torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    together = denoiser(xt, t, None)
    for row in range(4):
        alone = denoiser(xt[row : row + 1], t[row].item(), None)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[row], b[0])


def test_a_wrong_number_of_times_is_refused():
    denoiser = Denoiser(Recorder(), Cosine(), V(), Uniform())
    with pytest.raises(RuntimeError):
        denoiser(normal(4, 3, 2, 2), torch.tensor([0.1, 0.2, 0.3]), None)


def test_the_network_sees_scaled_input_tau_and_the_condition():
    net, cond = Recorder(), Cond(vector=normal(2, 5))
    xt = normal(2, 3, 4, 4)
    Denoiser(net, EDM(), Edm(sigma_data=0.5), Uniform())(xt, torch.tensor([0.25, 1.0]).double(), cond)
    sigma = 80 * torch.tensor([0.25, 1.0]).double() ** 7
    torch.testing.assert_close(net.x, xt / (sigma**2 + 0.25).sqrt().float()[:, None, None, None])
    assert net.tau.tolist() == [249.75, 999.0] and net.tau.dtype == torch.float32
    assert net.cond is cond


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_half_precision_answer_is_taken_back_to_full_precision(objective):
    denoiser = Denoiser(Recorder(lambda x: x.bfloat16()), Cosine(), objective, Uniform())
    xt = normal(2, 3, 4, 4)
    x0_hat, eps_hat = denoiser(xt, 0.9, None)
    assert x0_hat.dtype == eps_hat.dtype == denoiser.loss(xt, None, 0.9, xt).dtype == torch.float32
    t = torch.tensor(0.9)
    torch.testing.assert_close(Cosine().alpha(t) * x0_hat + Cosine().sigma(t) * eps_hat, xt, rtol=0, atol=1e-5)


def test_autocast_reaches_the_network_and_not_the_loss():
    class Convolution(nn.Conv2d):
        def forward(self, x, tau, cond):
            self.answer = super().forward(x)
            return self.answer

    denoiser = Denoiser(Convolution(3, 3, 1), Cosine(), V(), MinSNR())
    with torch.autocast("cpu", torch.bfloat16):
        loss = denoiser.loss(normal(2, 3, 4, 4), None, torch.tensor([0.2, 0.8]).double(), normal(2, 3, 4, 4))
    assert denoiser.net.answer.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert denoiser.net.weight.grad.isfinite().all()


@pytest.mark.parametrize("inner", [Linear(), ScaledLinear(), Cosine()], ids=lambda p: type(p).__name__)
def test_eps_without_any_signal_is_refused_in_words(inner):
    with pytest.raises(InputError, match="Eps does not go with the process ZeroTerminalSNR") as error:
        Denoiser(Recorder(), ZeroTerminalSNR(inner), Eps(), Uniform())
    assert error.value.code == "MD-OBJECTIVE-001"


def test_the_denoiser_adds_nothing_to_the_networks_weights():
    denoiser = Denoiser(nn.Linear(2, 2), Cosine(), V(), Uniform())
    assert set(denoiser.state_dict()) == {"net.weight", "net.bias"}

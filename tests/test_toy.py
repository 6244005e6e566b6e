"""The exact denoiser is exact: against the score, against sampling, and with conditions; and the plane figures."""

import pytest
import torch

from minidiff.cond import Cond
from minidiff.objective import Edm
from minidiff.process import EDM, Cosine, Flow, Linear
from minidiff.toy import ExactNet, GaussianMixture, checkerboard, moons, swiss_roll

PROCESSES = [Linear(), Cosine(), Flow(), EDM()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def mixture(d=2):
    means = torch.linspace(-1.5, 1.5, 3 * d, dtype=torch.float64).reshape(3, d).sin()
    return GaussianMixture(means, torch.tensor([0.3, 0.2, 0.5]).double(), torch.tensor([1.0, 2.0, 1.0]).double())


def generator():
    return torch.Generator().manual_seed(0)


def points(n=8, d=2):
    return torch.randn(n, d, generator=generator(), dtype=torch.float64)


@every_process
@pytest.mark.parametrize("d", [1, 2, 7])
def test_eps_hat_is_the_score_and_x0_hat_the_rest(process, d):
    # eps_hat = -sigma·grad log p(xt) (Vincent 2011), and Tweedie's formula for x0_hat
    t = torch.tensor(0.6, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    xt = points(d=d).requires_grad_()
    (score,) = torch.autograd.grad(mixture(d).log_prob(xt, alpha, sigma).sum(), xt)
    x0_hat, eps_hat = mixture(d).denoiser(process)(xt, t)
    torch.testing.assert_close(eps_hat, -sigma * score)
    torch.testing.assert_close(x0_hat, (xt + sigma**2 * score) / alpha)


def test_the_denoiser_is_the_mean_of_what_could_have_been():
    x0 = mixture().sample(400_000, generator())
    xt, t, process = points(1), torch.tensor(0.5).double(), Cosine()
    alpha, sigma = process.alpha(t), process.sigma(t)
    share = torch.softmax(-(((xt - alpha * x0) / sigma) ** 2).sum(1) / 2, dim=0)
    x0_hat = mixture().denoiser(process)(xt, t)[0]
    torch.testing.assert_close(share @ x0, x0_hat[0], rtol=0, atol=0.01)


def test_log_prob_is_a_density():
    axis = torch.linspace(-6, 6, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for alpha, sigma in [(1.0, 0.0), (0.6, 0.8)]:
        mass = mixture().log_prob(grid, alpha, sigma).exp().sum() * (axis[1] - axis[0]) ** 2
        assert mass.item() == pytest.approx(1, abs=1e-6)


def test_samples_have_the_mixtures_moments():
    x0, share = mixture().sample(200_000, generator()), torch.tensor([0.25, 0.5, 0.25]).double()
    mean = share @ mixture().means
    variance = share @ (mixture().stds[:, None] ** 2 + mixture().means ** 2) - mean**2
    torch.testing.assert_close(x0.mean(0), mean, rtol=0, atol=0.01)
    torch.testing.assert_close(x0.var(0), variance, rtol=0, atol=0.01)


def test_a_condition_picks_components_row_by_row():
    xt, t = points(3), torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    vector = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64)
    together = mixture().denoiser(Cosine())(xt, t, Cond(vector=vector))
    for row, components in enumerate([[0, 1, 2], [1], [0, 2]]):
        alone = mixture().only(components).denoiser(Cosine())(xt[row : row + 1], t[row].item())
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[row], b[0])


def test_the_denoiser_is_finite_from_no_noise_to_nothing_but_noise():
    for t in (0.0, 1.0):
        for answer in mixture().denoiser(EDM())(points(), t):
            assert answer.isfinite().all()
    torch.testing.assert_close(mixture().denoiser(EDM())(points(), 0.0)[0], points())


def test_the_exact_net_undoes_the_scaling_of_its_input():
    process, objective, t = EDM(), Edm(sigma_data=0.5), torch.full((8,), 0.5, dtype=torch.float64)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    x0_hat, eps_hat = mixture().denoiser(process)(points(), t)
    y = ExactNet(mixture(), process, objective)(objective.input_scale(alpha, sigma) * points(), process.tau(t), None)
    a, b = objective.pair(alpha, sigma)
    torch.testing.assert_close(y, a * x0_hat + b * eps_hat)


@pytest.mark.parametrize("figure", [swiss_roll, moons, checkerboard], ids=lambda f: f.__name__)
def test_figures_are_centred_of_unit_size_and_repeatable(figure):
    x = figure(20_000, generator())
    assert x.shape == (20_000, 2) and x.dtype == torch.float32
    assert torch.equal(x, figure(20_000, generator()))
    assert x.mean(0).abs().max() < 0.3
    assert 0.4 < x.std() < 1.3


def test_the_checkerboard_leaves_light_squares_empty():
    x = checkerboard(20_000, generator())
    assert x.min() >= -2 and x.max() <= 2
    square = (x + 2).floor().long()
    assert (square.sum(1) % 2 == 0).all()
    assert len(square.unique(dim=0)) == 8


def test_the_moons_are_two_and_do_not_touch():
    x = moons(20_000, generator())
    upper = ((x - torch.tensor([-0.5, -0.25])).norm(dim=1) - 1).abs()  # distance to either circle
    lower = ((x - torch.tensor([0.5, 0.25])).norm(dim=1) - 1).abs()
    assert torch.minimum(upper, lower).max() < 0.3
    assert 0.45 < (upper < lower).float().mean() < 0.55


def test_the_swiss_roll_is_a_spiral():
    x = swiss_roll(20_000, generator())
    radius = x.norm(dim=1)
    turns = 8 * radius - torch.atan2(x[:, 1], x[:, 0])  # a whole number of turns on the curve
    off = (turns / (2 * torch.pi) - (turns / (2 * torch.pi)).round()).abs()
    assert off.quantile(0.9) < 0.1
    assert radius.min() > 0.4 and radius.max() < 1.9

"""Guidance: its identities, what it costs, and that every edit leaves alpha·x0_hat + sigma·eps_hat = xt."""

import pytest
import torch

from minidiff import samplers
from minidiff.cond import Cond
from minidiff.denoiser import Denoiser
from minidiff.guidance import clamped, conditional, dynamic_threshold, edit_x0, guided, inpainted, interval
from minidiff.objective import X0, Edm, Eps, FlowVelocity, Uniform, V, solve
from minidiff.process import EDM, Cosine, Flow, Linear
from minidiff.toy import ExactNet, GaussianMixture

MIXTURE = GaussianMixture(
    torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.2, -1.0]], dtype=torch.float64),
    torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64),
    torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64),
)
T = torch.tensor(0.6, dtype=torch.float64)
NULL = Cond(vector=torch.ones(1, 3, dtype=torch.float64))
every_process = pytest.mark.parametrize("process", [Linear(), Cosine(), Flow(), EDM()], ids=lambda p: type(p).__name__)


def conds():
    """Returns a condition per row of `points()`: each asks for one component or two."""
    return Cond(vector=torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=torch.float64))


def points():
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Counted:
    """A denoiser that remembers the size and the conditions of every call."""

    def __init__(self, denoise):
        self.denoise, self.calls = denoise, []

    def __call__(self, xt, t, cond):
        self.calls.append(cond)
        return self.denoise(xt, t, cond)


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def assert_consistent(process, xt, t, answer):
    x0_hat, eps_hat = answer
    torch.testing.assert_close(process.alpha(t) * x0_hat + process.sigma(t) * eps_hat, xt)


# The convention: uncond + w·(cond - uncond).


@pytest.mark.parametrize("null", [NULL, NULL.repeat(4)], ids=["one_null", "null_per_row"])
def test_guidance_goes_from_unconditional_through_conditional(null):
    denoise = MIXTURE.denoiser(Cosine())
    uncond, cond = denoise(points(), T, NULL.repeat(4)), denoise(points(), T, conds())
    for w in (-1.0, 0.0, 0.5, 1.0, 4.0):
        answer = guided(denoise, Cosine(), conds(), null, w)(points(), T)
        assert_same(answer, [u + w * (c - u) for u, c in zip(uncond, cond, strict=True)])


@pytest.mark.parametrize(
    "w, seen", [(0.0, [NULL.repeat(4)]), (1.0, [conds()]), (3.0, [Cond.cat([NULL.repeat(4), conds()])])]
)
def test_guidance_costs_one_forward_and_only_what_it_needs(w, seen):
    counted = Counted(MIXTURE.denoiser(Cosine()))
    guided(counted, Cosine(), conds(), NULL, w)(points(), T)
    assert [c.vector.tolist() for c in counted.calls] == [c.vector.tolist() for c in seen]


def test_a_negative_prompt_belongs_to_its_row():
    denoise, negative = MIXTURE.denoiser(Cosine()), Cond(vector=conds().vector.roll(1, 0))
    together = guided(denoise, Cosine(), conds(), negative, 2.5)(points(), T)
    for row in range(4):
        rows = slice(row, row + 1)
        alone = guided(denoise, Cosine(), conds()[rows], negative[rows], 2.5)(points()[rows], T)
        assert_same([x[rows] for x in together], alone)


@every_process
@pytest.mark.parametrize("objective", [Eps(), X0(), V(), FlowVelocity(), Edm()], ids=lambda o: type(o).__name__)
def test_it_does_not_matter_whether_y_x0_or_eps_is_guided(process, objective):
    xt, t, w = points(), torch.full((4,), 0.6, dtype=torch.float64), 3.0
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    net = ExactNet(MIXTURE, process, objective)
    x = objective.input_scale(alpha, sigma) * xt
    y_null, y_cond = (net(x, process.tau(t), cond) for cond in (NULL.repeat(4), conds()))
    by_y = solve(objective, xt, y_null + w * (y_cond - y_null), alpha, sigma)

    denoiser = Denoiser(net, process, objective, Uniform())
    by_both = guided(denoiser, process, conds(), NULL, w)(xt, T)
    (x0_null, _), (x0_cond, _) = denoiser(xt, T, NULL.repeat(4)), denoiser(xt, T, conds())
    by_x0 = edit_x0(lambda xt, t: (x0_null, None), process, lambda x0: x0 + w * (x0_cond - x0))(xt, T)
    assert_same(by_both, by_y, rtol=0, atol=1e-8)
    assert_same(by_x0, by_y, rtol=0, atol=1e-8)


def test_more_guidance_brings_samples_to_the_condition():
    # asking for component 0 among all three, the share of images near it grows with w
    process, n = Cosine(), 200
    cond = Cond(vector=torch.tensor([[1, 0.3, 0.3]], dtype=torch.float64)).repeat(n)
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times, shares = samplers.log_snr(process, 15), []
    for w in (0.0, 1.0, 3.0):
        denoise = guided(MIXTURE.denoiser(process), process, cond, NULL, w)
        image = list(samplers.ddim(denoise, x, times, process, torch.randn_like))[-1].xt
        nearest = torch.cdist(image, MIXTURE.means).argmin(1)
        shares.append((nearest == 0).double().mean().item())
    assert shares[0] == pytest.approx(0.25, abs=0.1) and shares[1] == pytest.approx(1 / 1.9, abs=0.1)
    assert shares[2] > shares[1] + 0.1


# Rescaled (Lin et al. 2023, §3.4).


def images(seed):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stub(process):
    """Returns a denoiser of pictures whose two answers, by `cond.vector` 0 and 1, differ much."""

    def denoise(xt, t, cond):
        x0 = xt.sin() + 2 * cond.vector.reshape(-1, 1, 1, 1) * xt.cos()
        return x0, (xt - process.alpha(t) * x0) / process.sigma(t)

    return denoise


PICTURE_COND, PICTURE_NULL = (Cond(vector=torch.full((n, 1), float(n > 1)).double()) for n in (4, 1))


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_takes_the_standard_deviation_back_towards_the_conditional(rescale):
    process, xt, w = Cosine(), images(0), 5.0
    plain = guided(stub(process), process, PICTURE_COND, PICTURE_NULL, w)(xt, T)
    answer = guided(stub(process), process, PICTURE_COND, PICTURE_NULL, w, rescale)(xt, T)
    wanted = stub(process)(xt, T, PICTURE_COND)[0].flatten(1).std(1)
    before, after = plain[0].flatten(1).std(1), answer[0].flatten(1).std(1)
    assert (before > 1.5 * wanted).all()
    torch.testing.assert_close(after, rescale * wanted + (1 - rescale) * before)
    torch.testing.assert_close(answer[0] / plain[0], (after / before).reshape(-1, 1, 1, 1).expand_as(xt))
    assert_consistent(process, xt, T, answer)


# Denoisers from denoisers.


def test_interval_guides_only_inside():
    counted = Counted(MIXTURE.denoiser(Cosine()))
    strong = guided(counted, Cosine(), conds(), NULL, 3.0)
    denoise = interval(strong, conditional(counted, conds()), 0.25, 0.75)
    for t in (0.1, 0.25, 0.5, 0.75, 0.9):
        denoise(points(), torch.tensor(t, dtype=torch.float64))
    assert [len(c) for c in counted.calls] == [4, 8, 8, 8, 4]


@every_process
def test_an_edit_of_x0_leaves_xt_where_it_is(process):
    denoise = edit_x0(conditional(MIXTURE.denoiser(process), conds()), process, lambda x0: 0.5 * x0 + 0.1)
    answer = denoise(points(), T)
    torch.testing.assert_close(answer[0], 0.5 * MIXTURE.denoiser(process)(points(), T, conds())[0] + 0.1)
    assert_consistent(process, points(), T, answer)


def test_an_edit_that_changes_nothing_changes_nothing():
    denoise = conditional(MIXTURE.denoiser(Flow()), conds())
    assert_same(edit_x0(denoise, Flow(), lambda x0: x0)(points(), T), denoise(points(), T))


def test_known_pixels_come_out_exactly():
    # because the times end at exactly 0, what is known is known to the last bit
    process, known = Cosine(), torch.tensor([0.123456789, 0.0], dtype=torch.float64)
    mask = torch.tensor([True, False])
    denoise = conditional(MIXTURE.denoiser(process), conds())
    painted = inpainted(denoise, process, known, mask)
    for sampler in (samplers.ddim, samplers.heun, samplers.dpmpp_2m, samplers.ddpm):
        states = sampler(painted, points(), samplers.log_snr(process, 10), process, torch.randn_like)
        image = list(states)[-1].xt
        assert torch.equal(image[:, 0], known[0].expand(4))
        assert (image[:, 1] != 0).all()


def test_clamped_stays_in_range():
    answer = clamped(conditional(MIXTURE.denoiser(Linear()), conds()), Linear(), -0.2, 0.3)(points(), T)
    assert answer[0].min() >= -0.2 and answer[0].max() <= 0.3
    assert_consistent(Linear(), points(), T, answer)


def test_dynamic_threshold_is_per_image_and_never_amplifies():
    process, xt = Cosine(), images(0)
    scale = torch.tensor([0.1, 1.0, 4.0, 10.0]).double().reshape(4, 1, 1, 1)
    denoise = lambda xt, t: (scale * xt, xt)  # noqa: E731
    answer = dynamic_threshold(denoise, process, 0.9)(xt, T)
    for row in range(4):
        x0 = scale[row] * xt[row]
        limit = max(1.0, x0.abs().flatten().sort().values[172].item())  # the 173rd of 192 is the 90th percentile
        torch.testing.assert_close(answer[0][row], x0.clamp(-limit, limit) / limit)
    torch.testing.assert_close(answer[0][0], 0.1 * xt[0])  # within [-1, 1] already: untouched
    assert answer[0].abs().max() == 1
    assert_consistent(process, xt, T, answer)


# Dropping the condition in training: the other half of guidance.


def test_conditions_are_dropped_per_row():
    keep = torch.tensor([True, False, True, False])
    dropped = conds().where(keep, NULL)
    assert dropped.vector.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 1], [1, 1, 1]]
    both = MIXTURE.denoiser(Cosine())(points(), T, dropped)
    kept, null = (MIXTURE.denoiser(Cosine())(points(), T, c) for c in (conds(), NULL.repeat(4)))
    assert_same(both, [torch.where(keep[:, None], k, n) for k, n in zip(kept, null, strict=True)])


def test_dropping_writes_into_neither_condition():
    cond, null = conds(), Cond(vector=torch.ones(1, 3, dtype=torch.float64))
    cond.where(torch.zeros(4, dtype=torch.bool), null).vector.fill_(7)
    assert torch.equal(cond.vector, conds().vector) and torch.equal(null.vector, NULL.vector)

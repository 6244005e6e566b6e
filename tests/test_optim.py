"""Muon makes its updates orthogonal, leaves vectors to AdamW, and survives a checkpoint bit by bit. Learning rates
rise and fall.
"""

import copy

import pytest
import torch
from torch import nn

from minidiff.config.ranges import CHOICES
from minidiff.optim import DECAYS, MATRIX_LR, cosine, learning_rate, linear, make_adamw, make_muon, orthogonal
from minidiff.state import flatten_optimizer, unflatten_optimizer

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 16, 5), nn.LayerNorm(5))


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (model(x)[:, 0] - x.mean((1, 2, 3))).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 4, 20), (3, 20, 4)])
def test_orthogonal_keeps_the_directions_and_evens_their_lengths(shape, bf16, monkeypatch):
    monkeypatch.setattr("minidiff.optim.multiplies_bf16", lambda device: bf16)
    generator = torch.Generator().manual_seed(1)
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    s = torch.linspace(5, 0.5, s.shape[1]).expand_as(s)
    out = orthogonal((u * s[:, None]) @ vh)
    inside = u.mT @ out @ vh.mT  # diagonal if U and V are what they were
    assert (inside.diagonal(dim1=1, dim2=2) - 1).abs().max() < 0.2
    assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 0.05


def test_first_update_of_a_kernel_has_equal_singular_values():
    model = small_model()
    optimizer = make_muon(model, **OPTIONS | {"weight_decay": 0.0})
    before = model[3].weight.detach().clone()
    descend(model, optimizer, seed=0)
    lengths = torch.linalg.svdvals((model[3].weight.detach() - before) / (MATRIX_LR * OPTIONS["lr"]))
    gradient = torch.linalg.svdvals(model[3].weight.grad)
    told = int((gradient > 0.01 * gradient.norm()).sum())  # a direction without gradient moves by rounding alone
    assert told == 4 and lengths[0] < 1.3 and lengths[told - 1] > 0.5


def test_the_first_beta_is_the_momentum_of_matrices():
    """Without momentum an update forgets the gradients before; with it, it does not."""
    moved = {}
    for beta in (0.0, 0.9):
        for first in (0, 1):
            model = small_model()
            optimizer = make_muon(model, **OPTIONS | {"betas": (beta, 0.99)})
            descend(model, optimizer, seed=first)
            model.load_state_dict(small_model().state_dict())
            descend(model, optimizer, seed=2)
            moved[beta, first] = model[0].weight - small_model()[0].weight
    assert torch.equal(moved[0.0, 0], moved[0.0, 1])
    assert not torch.allclose(moved[0.9, 0], moved[0.9, 1], rtol=0.01)


def test_vectors_move_as_under_adamw():
    one = small_model()
    two = copy.deepcopy(one)
    muon, adamw = make_muon(one, **OPTIONS), make_adamw(two, **OPTIONS)
    descend(one, muon, seed=0)
    descend(two, adamw, seed=0)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q) == (p.ndim == 1), name


def test_tables_of_embeddings_are_left_to_adamw():
    model = nn.ModuleDict({"token_embedding": nn.Embedding(7, 4), "proj": nn.Linear(4, 4)})
    groups = make_muon(model, **OPTIONS).param_groups
    matrices = {id(p) for group in groups if group["matrices"] for p in group["params"]}
    assert matrices == {id(model["proj"].weight)}


def test_muon_goes_on_bitwise_after_a_checkpoint():
    model = small_model()
    optimizer = make_muon(model, **OPTIONS)
    for seed in range(3):
        descend(model, optimizer, seed)
    tensors, groups = flatten_optimizer(optimizer, model)
    tensors = {name: x.clone() for name, x in tensors.items()}
    again = copy.deepcopy(model)
    other = make_muon(again, **OPTIONS)
    other.load_state_dict(unflatten_optimizer(other, again, tensors, groups))
    descend(model, optimizer, seed=9)
    descend(again, other, seed=9)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("decay", "after_a_third"), [(cosine, 1.5), (linear, 4 / 3)])
def test_learning_rate_warms_up_and_falls_to_zero(decay, after_a_third):
    rates = [learning_rate(k, steps=100, lr=2.0, warmup=10, decay=decay) for k in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[40] == pytest.approx(after_a_third)
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert all(b < a for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(0, steps=10, lr=1.0, warmup=0, decay=decay) == 1.0


def test_every_decay_that_a_configuration_may_name_exists():
    assert set(CHOICES["optim.decay"]) == DECAYS.keys()

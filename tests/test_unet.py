import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minidiff.cond import Cond
from minidiff.errors import InputError
from minidiff.nn.attention import CrossAttention, Gated, SelfAttention
from minidiff.nn.embed import grid_embedding, sinusoidal
from minidiff.nn.unet import UNet


def tiny(**changes) -> UNet:
    torch.manual_seed(0)
    numbers = {"in_channels": 3, "out_channels": 3, "channels": [16, 32], "layers": 1, "attend": [False, True]}
    net = UNet(**(numbers | {"heads": 2, "groups": 4, "token_dim": 8, "vector_dim": 6} | changes))
    for p in net.parameters():  # zero-initialised layers would hide what flows through them
        torch.nn.init.normal_(p, std=0.1)
    return net


def condition(b: int = 2, length: int = 5) -> Cond:
    return Cond(
        tokens=torch.randn(b, length, 8), mask=torch.ones(b, length, dtype=torch.bool), vector=torch.randn(b, 6)
    )


X, TAU = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0])


def test_a_fresh_network_answers_zero():
    torch.manual_seed(0)
    net = UNet(in_channels=3, out_channels=3, channels=[16], layers=1, attend=[True], heads=2, groups=4, token_dim=8)
    assert torch.equal(net(X, TAU, Cond(tokens=torch.randn(2, 5, 8))), torch.zeros_like(X))


def test_every_port_and_the_time_reach_the_output():
    net, cond = tiny(), condition()
    y = net(X, TAU, cond)
    assert y.shape == X.shape
    for other in (
        net(X, TAU + 1.5, cond),  # fractions of tau count
        net(X, TAU, Cond(tokens=cond.tokens + 1, mask=cond.mask, vector=cond.vector)),
        net(X, TAU, Cond(tokens=cond.tokens, mask=cond.mask, vector=cond.vector + 1)),
    ):
        assert not torch.allclose(y, other, atol=1e-4)


def test_image_port_is_concatenated():
    net, cond = tiny(image_channels=2), condition()
    images = [Cond(image=torch.full((2, 2, 8, 8), value)) for value in (0.0, 1.0)]
    y, other = (net(X, TAU, cond.merge(image)) for image in images)
    assert not torch.allclose(y, other, atol=1e-4)


def test_masked_tokens_are_not_seen():
    net, cond = tiny(), condition(length=5)
    mask = cond.mask.clone()
    mask[:, 3:] = False
    garbage = torch.where(mask[..., None], cond.tokens, torch.full_like(cond.tokens, 1e3))
    short = Cond(tokens=cond.tokens[:, :3], mask=cond.mask[:, :3], vector=cond.vector)
    y = net(X, TAU, Cond(tokens=garbage, mask=mask, vector=cond.vector))
    torch.testing.assert_close(y, net(X, TAU, short), rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_do_not_mix():
    net, cond = tiny(), condition()
    torch.testing.assert_close(net(X, TAU, cond)[1:], net(X[1:], TAU[1:], cond[1:]), rtol=1e-4, atol=1e-5)


def test_odd_sizes_come_back_as_they_were():
    """Halving rounds up; the way up takes its sizes from the skips."""
    net, x = tiny(channels=[8, 8, 16], attend=[False, False, True]), torch.randn(2, 3, 7, 9)
    assert net(x, TAU, condition()).shape == x.shape


@pytest.mark.parametrize("wrong", [{"attend": [True]}, {"groups": 5}, {"heads": 3}, {"depth": [1]}, {"head_dim": 5}])
def test_numbers_that_do_not_fit_are_refused(wrong):
    with pytest.raises(InputError, match="net\\."):
        tiny(**wrong)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer, x = SelfAttention(dim=4, heads=1), torch.randn(1, 6, 4)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    expected = layer.out((q @ k.mT / 4**0.5).softmax(-1) @ v)
    torch.testing.assert_close(layer(x), expected)


def test_cross_attention_over_one_token_returns_its_value():
    layer, token = CrossAttention(dim=4, heads=2, token_dim=3), torch.randn(1, 1, 3)
    value = layer.kv(token).chunk(2, dim=-1)[1]
    expected = layer.out(value).expand(1, 5, 4)
    torch.testing.assert_close(layer(torch.randn(1, 5, 4), token, None), expected)


def test_sinusoidal_is_cosines_then_sines():
    emb = sinusoidal(torch.tensor([0.0, 2.0]), 4)
    torch.testing.assert_close(emb[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    angle = torch.tensor([2.0, 2.0 / 100])
    torch.testing.assert_close(emb[1], torch.cat([angle.cos(), angle.sin()]))


def test_grid_embedding_tells_every_place_apart_whatever_the_size():
    small, large = grid_embedding(8, 8, 32, torch.device("cpu")), grid_embedding(24, 24, 32, torch.device("cpu"))
    places = small.flatten(1).mT
    assert torch.cdist(places, places).add(torch.eye(64) * 99).min() > 1.0
    assert torch.allclose(small, large[:, 1::3, 1::3], atol=1e-5)  # the same places of the picture
    assert torch.allclose(small.square().mean(0), torch.ones(8, 8), atol=1e-5)


def test_positions_let_a_network_answer_by_place():
    """Far from the borders, convolutions alone answer an even picture evenly."""
    cond = Cond(tokens=torch.ones(1, 1, 8), vector=torch.ones(1, 6))
    for positions in (False, True):
        net = tiny(channels=[16], attend=[False], positions=positions)
        net.mid_in.transformer = None
        answer = net(torch.zeros(1, 3, 64, 64), TAU[:1], cond)[0, :, 28:36, 28:36]
        assert (answer.std((1, 2)).max() > 1e-3) == positions


def test_positions_need_a_width_of_fours():
    with pytest.raises(InputError, match="MD-NET-005"):
        tiny(channels=[6], groups=2, heads=2, attend=[False], positions=True)


def test_the_gate_that_is_computed_twice_has_its_formula_and_derivative():
    both = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    value, gate = both.chunk(2, dim=-1)
    assert torch.equal(Gated.apply(both), value * F.gelu(gate))
    assert torch.autograd.gradcheck(Gated.apply, (both,))


WHOLE = """
import torch
from test_unet import TAU, X, condition, tiny

net, cond = tiny(positions=True, depth=2), condition()
# with a cut in its graph, fullgraph raises; without Inductor, the graph computes as PyTorch does
compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
answers = [f(X, TAU, cond) for f in (net, compiled)]
assert torch.allclose(*answers, rtol=1e-4, atol=1e-4)
slopes = [torch.autograd.grad(y.square().mean(), list(net.parameters())) for y in answers]
for (name, _), a, b in zip(net.named_parameters(), *slopes, strict=True):
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item()), name
"""


@pytest.mark.slow
def test_a_compiler_sees_the_network_whole_and_trains_it_the_same():
    # in a process of its own: the shape checks of these tests would cut the graph
    subprocess.run([sys.executable, "-c", WHOLE], check=True, cwd=Path(__file__).parent)

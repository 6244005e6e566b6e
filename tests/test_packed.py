"""A packed network is the same function, of the weights as they were, without touching them."""

import pytest
import torch
from torch import nn

from minidiff.cond import Cond
from minidiff.nn.packed import PackedConv2d, packed
from minidiff.nn.unet import UNet

AT = (torch.randn(3, 4, 12, 8), torch.rand(3) * 999, Cond(tokens=torch.randn(3, 5, 16)))


@pytest.fixture
def net() -> UNet:
    torch.manual_seed(0)
    net = UNet(in_channels=4, out_channels=4, channels=(16, 32), attend=(True, False), heads=2, groups=4, token_dim=16)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.requires_grad_(False)


def test_it_answers_the_same_and_leaves_the_network_alone(net):
    names = [type(module) for module in net.modules()]
    twin = packed(net)
    torch.testing.assert_close(twin(*AT), net(*AT), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, PackedConv2d) for module in twin.modules()) == names.count(nn.Conv2d) > 10
    assert [type(module) for module in net.modules()] == names


def test_another_packing_hears_of_other_weights(net):
    before, twin = net(*AT), packed(net)
    net.stem.weight.mul_(2)
    assert torch.equal(twin(*AT), packed(twin)(*AT)) and (twin(*AT) - before).abs().max() < 1e-3
    torch.testing.assert_close(packed(net)(*AT), net(*AT), rtol=1e-4, atol=1e-4)


def test_a_layer_that_somebody_listens_to_stays(net):
    net.stem.register_forward_hook(lambda layer, inputs, output: output + 1)
    assert type(packed(net).stem) is nn.Conv2d
    torch.testing.assert_close(packed(net)(*AT), net(*AT), rtol=1e-4, atol=1e-4)


def test_compiled_and_half_precision_networks_stay_as_they_are(net):
    half = UNet(in_channels=4, out_channels=4, channels=(16,), attend=(False,), heads=2, groups=4, token_dim=16).half()
    assert packed(half) is half
    net.compile(backend="eager")
    assert packed(net) is net

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from minidiff.ema import EMA
from minidiff.errors import CheckpointError, InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.norm(self.down(x))


def wander(model: nn.Module) -> None:
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_F5_constant_weights_give_the_closed_form(decay):
    model = nn.Linear(2, 2, bias=False)
    start = model.weight.detach().double().clone()
    ema = EMA(model, decay, warmup=False)
    nn.init.constant_(model.weight, 3.0)
    for _ in range(7):
        ema.update(model)
    expected = 3 + decay**7 * (start - 3)
    torch.testing.assert_close(ema.state_dict()["weight"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
def test_F5_agrees_with_torch_averaged_model(warmup):
    def with_warmup(averages, weights, count):  # AveragedModel counts its first, copying call too
        n = int(count) - 1
        torch._foreach_lerp_(averages, weights, 1 - min(0.9, (1 + n) / (10 + n)))

    torch.manual_seed(0)
    model = Net()
    peer = AveragedModel(model, multi_avg_fn=with_warmup if warmup else get_ema_multi_avg_fn(0.9))
    ema = EMA(model, 0.9, warmup=warmup)
    peer.update_parameters(model)
    for _ in range(120):
        wander(model)
        model(torch.randn(2, 3, 5, 5))  # moves the batch norm's buffers
        ema.update(model)
        peer.update_parameters(model)
    expected = peer.module.state_dict()
    assert ema.state_dict().keys() == expected.keys()
    for name, x in ema.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-6)


def test_F5_warmup_decay_at_updates_1_10_100():
    ema = EMA(nn.Linear(1, 1), 0.999)
    assert [ema.decay_at(n - 1) for n in (1, 10, 100)] == [1 / 10, 10 / 19, 100 / 109]
    assert ema.decay_at(10**6) == 0.999


@pytest.mark.parametrize("decay", [0.05, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("warmup", [False, True])
def test_initial_share_is_the_weight_left_on_the_start(decay, warmup):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, decay, warmup=warmup)
    nn.init.zeros_(model.weight)
    assert ema.initial_share() == 1
    for n in range(1, 6):
        ema.update(model)
        assert ema.initial_share() == pytest.approx(ema.state_dict()["weight"].item(), rel=1e-5)
        assert ema.updates == n
    ema.updates = 3000
    product = math.exp(sum(math.log(ema.decay_at(n)) for n in range(3000)))
    assert ema.initial_share() == pytest.approx(product, rel=1e-6, abs=1e-300)


def test_F5_a_small_update_survives_on_a_bf16_model():
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.9999, warmup=False)
    nn.init.constant_(model.weight, 2.0)
    ema.update(model)  # 1 + 1e-4, where bfloat16 has nothing between 1 and 1.0078
    shadow = ema.state_dict()["weight"]
    assert shadow.dtype == torch.float32 and model.weight.dtype == torch.bfloat16
    torch.testing.assert_close(shadow, torch.full((4, 4), 1.0001), rtol=0, atol=1e-7)


def test_F5_parameters_registered_in_another_order_are_matched_by_name():
    first = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    second = nn.ModuleDict({"b": first["b"], "a": first["a"]})
    ema = EMA(first, 0.5)
    ema.update(second)
    torch.testing.assert_close(ema.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_integer_buffers_are_copied_and_recomputed_tables_left_out():
    model = Net()
    ema = EMA(model)
    model(torch.randn(2, 3, 5, 5))
    ema.update(model)
    assert ema.state_dict()["norm.num_batches_tracked"].item() == 1
    assert ema.state_dict()["norm.num_batches_tracked"].dtype == torch.int64
    assert ema.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_swaps_and_restores_bit_for_bit_even_after_an_exception(dtype):
    model = Net().to(dtype)
    ema = EMA(model, 0.5)
    wander(model)
    ema.update(model)
    raw, average = snapshot(model), {n: x.clone() for n, x in ema.state_dict().items()}
    where = [x.data_ptr() for x in model.parameters()]
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        assert torch.equal(model.down.weight, average["down.weight"].to(dtype))
        assert not torch.equal(model.down.weight, raw["down.weight"])
        assert torch.is_grad_enabled()
        model.norm.num_batches_tracked += 5
        raise KeyboardInterrupt
    assert all(torch.equal(x, raw[name]) for name, x in model.state_dict().items())
    assert all(torch.equal(x, average[name]) for name, x in ema.state_dict().items())
    assert where == [x.data_ptr() for x in model.parameters()]


def test_tied_weights_are_averaged_once_and_restored():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    nn.init.zeros_(model["a"].weight)
    ema = EMA(model, 0.5, warmup=False)
    nn.init.ones_(model["a"].weight)
    ema.update(model)
    with ema.applied(model):
        assert torch.equal(model["b"].weight, torch.full((2, 2), 0.5))
    assert torch.equal(model["b"].weight, torch.ones(2, 2)) and model["b"].weight is model["a"].weight


def test_E9_wrapped_and_compiled_models_keep_their_plain_names():
    model = Net()
    model.compile(backend="eager")  # in place
    names = Net().state_dict().keys()
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    assert any("_orig_mod." in name for name in wrapped.state_dict())
    ema = EMA(wrapped)
    assert EMA(model).state_dict().keys() == ema.state_dict().keys() == names
    ema.update(model)  # the same shadows, whichever way the model is held
    with ema.applied(wrapped):
        pass
    ema.load_state_dict(wrapped.state_dict(), updates=4)
    assert ema.updates == 4


def test_state_round_trip_continues_exactly():
    model = Net()
    ema = EMA(model, 0.99)
    for _ in range(3):
        wander(model)
        ema.update(model)
    saved = {name: x.clone() for name, x in ema.state_dict().items()}
    again = EMA(Net(), 0.99)
    again.load_state_dict(saved, ema.updates)
    wander(model)
    ema.update(model)
    again.update(model)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ema.state_dict().items())
    assert again.initial_share() == ema.initial_share()


def test_state_of_another_model_is_refused_by_name_and_changes_nothing():
    ema = EMA(nn.Linear(2, 2))
    before = {name: x.clone() for name, x in ema.state_dict().items()}
    with pytest.raises(CheckpointError, match="MD-CKPT-008.*missing: bias.*shape: weight"):
        ema.load_state_dict({"weight": torch.zeros(3, 2)}, 1)
    assert ema.updates == 0 and all(torch.equal(x, before[n]) for n, x in ema.state_dict().items())
    with pytest.raises(CheckpointError, match="2 unexpected: weight, bias"):
        ema.update(nn.ReLU())


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5, math.nan])
def test_a_decay_that_is_no_average_is_refused(decay):
    with pytest.raises(InputError, match="MD-EMA-001"):
        EMA(nn.Linear(1, 1), decay)

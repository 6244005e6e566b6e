import math
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator

from minidiff.data import Batch
from minidiff.errors import NumericsError
from minidiff.fit import UsualLoss, fit


def run(accumulate: int, steps: int = 3, start: int = 0) -> tuple[torch.Tensor, list]:
    """Trains y = w·x on 12 images an update, divided into `accumulate` micro-batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    images = (8 * torch.arange(12, dtype=torch.uint8)).reshape(12, 1, 1, 1).expand(12, 3, 1, 1)

    def batches():
        while True:
            for part in images.chunk(accumulate):
                yield Batch(part, [""] * len(part), list(range(len(part))), [])

    def loss(batch):
        x = batch.x()[:, :1].flatten(1)
        return (model(x) - 3 * x).square().mean(), {}

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    seen = list(
        fit(
            model,
            loss,
            batches(),
            optimizer,
            accelerator,
            steps=steps,
            start=start,
            learning_rate=lambda k: 0.1,
            clip=1e9,
        )
    )
    return torch.cat([p.detach().flatten() for p in model.parameters()]), seen


def test_accumulated_micro_batches_are_one_update():
    whole, once = run(accumulate=1)
    parts, thrice = run(accumulate=3)
    torch.testing.assert_close(whole, parts)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.grad_norm, b.grad_norm)
        assert a.images == b.images == 12


def test_steps_count_updates_from_the_start():
    assert [s.step for s in run(accumulate=3, steps=7, start=4)[1]] == [5, 6, 7]
    assert run(accumulate=1, steps=4, start=4)[1] == []


# -------------------------------------------------------------------------------------------- what is not finite


def poisoned(bad: set[int], steps: int, what: str = "nan", lr: float = 0.1):
    """Trains y = w·x; the updates in `bad` (counted from 0) get a NaN loss or an infinite gradient. Yields the model,
    the optimizer and each Step.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    x = torch.arange(1.0, 5.0)[:, None]
    update = iter(range(1000))

    def loss(batch):
        value = (model(x) - 3 * x).square().mean()
        if next(update) in bad:
            # √(0·w) is 0, so that the loss stays finite, and its slope there is infinite
            value = value * float("nan") if what == "nan" else value + (0 * model.weight).sqrt().sum()
        return value, {}

    def batches():
        first = 0
        while True:
            index = list(range(first, first + 4))
            yield Batch(torch.zeros(4, 3, 1, 1, dtype=torch.uint8), [""] * 4, index, [], [100 + i for i in index])
            first += 4

    for step in fit(
        model,
        loss,
        batches(),
        optimizer,
        Accelerator(cpu=True),
        steps=steps,
        start=0,
        learning_rate=lambda k: lr,
        clip=1.0,
    ):
        yield model, optimizer, step


def bits(model, optimizer) -> list[torch.Tensor]:
    slots = [x for state in optimizer.state_dict()["state"].values() for x in state.values()]
    return [x.detach().clone() for x in (*model.parameters(), *slots)]


@pytest.mark.parametrize("what", ["nan", "gradient"])
def test_F2_F6_an_update_that_is_not_finite_changes_no_bit_and_training_goes_on(what):
    before = None
    for model, optimizer, step in poisoned({2}, 5, what):
        now = bits(model, optimizer)
        if step.step == 3:
            assert not step.finite and not (step.loss + step.grad_norm).isfinite()
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        else:
            assert step.finite and (before is None or not torch.equal(before[0], now[0]))
        assert all(x.isfinite().all() for x in now)
        before = now
    assert step.step == 5


def test_R6_three_in_a_row_stop_the_run_and_name_step_and_rows():
    with pytest.raises(
        NumericsError, match=r"MD-NUM-001.*step 6: loss nan.*last finite loss was \d.*120, 121, 122, 123"
    ) as e:
        for _ in poisoned({1, 3, 4, 5}, 20):
            pass
    assert e.value.exit_code == 5
    *_, (_, _, last) = poisoned({0, 1, 3, 4, 6}, 8)  # never three in a row
    assert last.step == 8


def test_F1_a_learning_rate_of_1e20_stops_with_finite_weights():
    with pytest.raises(NumericsError, match=r"MD-NUM-001.*lr 1e\+20"):
        for model, _, _ in poisoned(set(), 50, lr=1e20):
            assert all(x.isfinite().all() for x in model.parameters())


def spikes(losses: list[float]) -> list[int]:
    usual = UsualLoss()
    return [i for i, loss in enumerate(losses) if usual.before_spike(loss) is not None]


def test_F13_a_loss_far_above_the_usual_is_a_spike_once():
    calm = [1 + 0.5 * math.sin(k) for k in range(60)]
    assert spikes(calm) == [] and spikes([1000 / (k + 1) for k in range(200)]) == []  # as losses fall
    assert spikes([*calm, 9.0, 8.0, 1.0, 7.0, *calm]) == [60, 63]  # a series is one
    assert spikes([*calm[:19], 100.0]) == [] and spikes([*calm[:20], 100.0]) == [20]  # what is usual must be known
    assert spikes([*calm, *[9.0] * 300, 30.0, 40.0]) == [60, 361]  # what stays is usual, some day
    assert spikes([*[0.0] * 30, 1.0]) == [30]


def test_F4_with_a_scaler_an_overflow_is_left_to_it_and_does_not_count():
    """fp16 begins with a scale that is too large, and finds the right one by overflowing."""
    from types import SimpleNamespace

    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asked = []
    optimizer.step = lambda: asked.append(1)
    scaled = SimpleNamespace(scaler=object(), gradient_accumulation_steps=1, reduce=lambda x, how: x)
    scaled.accumulate = scaled.autocast = lambda *_: nullcontext()
    scaled.backward = lambda loss: loss.backward()
    scaled.clip_grad_norm_ = lambda *_: torch.tensor(float("inf"))
    batches = iter(lambda: Batch(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), [""], [0], []), None)

    def run(value):
        loss = lambda batch: (model.weight.sum() * value, {})  # noqa: E731
        return list(
            fit(model, loss, batches, optimizer, scaled, steps=5, start=0, learning_rate=lambda k: 0.1, clip=1.0)
        )

    assert [step.finite for step in run(1.0)] == [False] * 5 and len(asked) == 5
    with pytest.raises(NumericsError):
        run(float("nan"))

import pytest
import torch
from accelerate import Accelerator

from minidiff.data import Batch
from minidiff.fit import fit, warmup_cosine


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


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [warmup_cosine(k, steps=100, lr=2.0, warmup=10) for k in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert all(b < a for a, b in zip(rates[10:], rates[11:], strict=False))
    assert warmup_cosine(0, steps=10, lr=1.0, warmup=0) == 1.0

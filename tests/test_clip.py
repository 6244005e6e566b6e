"""The contrastive task: its loss against a plain reading of its formula, and what its validation says."""

import math

import numpy as np
import pytest
import torch

from minidiff.data import Batch
from minidiff.shapes import example, render
from minidiff.tasks.clip import ContrastivePretraining


@pytest.fixture(scope="module")
def task() -> ContrastivePretraining:
    torch.manual_seed(0)
    return ContrastivePretraining()


def batch_of(logits: torch.Tensor, task: ContrastivePretraining, monkeypatch) -> Batch:
    """Returns a batch that the task finds to agree as given: rows are pictures, columns captions."""
    monkeypatch.setattr(task, "_logits", lambda _: logits)
    return Batch(torch.zeros(len(logits), 3, 32, 32, dtype=torch.uint8), [""] * len(logits), [], [])


@pytest.mark.parametrize("b", [4, 5])
def test_loss_is_the_symmetric_cross_entropy_and_that_of_neighbours(b, task, monkeypatch):
    logits = torch.randn(b, b, generator=torch.Generator().manual_seed(b), dtype=torch.float64)
    neighbours = {0: 1, 1: 0, 2: 3, 3: 2, 4: 3}
    expected = 0.0
    for i in range(b):
        exp = logits.exp()
        expected -= math.log(exp[i, i] / exp[i].sum()) / 2 + math.log(exp[i, i] / exp[:, i].sum()) / 2
        expected -= math.log(exp[i, i] / (exp[i, i] + exp[neighbours[i], i]))
    loss, shares = task.loss(batch_of(logits, task, monkeypatch))
    assert loss.item() == pytest.approx(expected / b, rel=1e-6)
    prefer = [float(logits[i, i] > logits[neighbours[i], i]) for i in range(b)]
    assert shares["pairs"].item() == pytest.approx(np.mean(prefer))
    first = [float(logits[:, i].argmax() == i) for i in range(b)]
    assert shares["retrieval"].item() == pytest.approx(np.mean(first))


def test_only_the_pair_loss_tells_an_exchanged_neighbour_from_any_other(task, monkeypatch):
    """Captions 0 and 1 with each other's pictures cost more than two that are no neighbours."""
    right = 6 * torch.eye(4)
    neighbours, strangers = right[[1, 0, 2, 3]], right[[2, 1, 0, 3]]
    near, far = (task.loss(batch_of(logits, task, monkeypatch))[0] for logits in (neighbours, strangers))
    assert near > far > task.loss(batch_of(right, task, monkeypatch))[0]


def test_validation_is_the_mean_over_batches(task, monkeypatch):
    examples = [example("test", i, siblings=2) for i in range(8)]
    images = torch.from_numpy(np.stack([render(e.scene, 32) for e in examples])).permute(0, 3, 1, 2)
    batches = [
        Batch(images[k : k + 4], [e.captions[0] for e in examples[k : k + 4]], list(range(k, k + 4)), [])
        for k in (0, 4)
    ]
    found = task.validate(batches)
    with torch.no_grad():
        losses = [task.loss(batch) for batch in batches]
    assert found["val_loss"] == pytest.approx(np.mean([loss.item() for loss, _ in losses]))
    assert found.keys() == {"val_loss", "val_retrieval", "val_pairs"}
    assert found["val_pairs"] == pytest.approx(np.mean([shares["pairs"].item() for _, shares in losses]))

import pytest
import torch

from minidiff.cond import Cond


def some(b: int) -> Cond:
    return Cond(tokens=torch.randn(b, 5, 4), mask=torch.ones(b, 5, dtype=torch.bool), vector=torch.randn(b, 3))


def test_where_drops_single_samples_not_the_batch():
    cond, null = some(4), some(1)
    keep = torch.tensor([True, False, True, False])
    mixed = cond.where(keep, null)
    for i, kept in enumerate(keep):
        source, row = (cond, i) if kept else (null, 0)
        assert torch.equal(mixed.tokens[i], source.tokens[row])
        assert torch.equal(mixed.vector[i], source.vector[row])


def test_where_never_writes_into_a_cached_embedding():
    cond, null = some(3), some(1)
    before = [x.clone() for x in (cond.tokens, cond.mask, cond.vector, null.tokens)]
    mixed = cond.where(torch.zeros(3, dtype=torch.bool), null)
    mixed.tokens.add_(1)  # even if a caller writes into the result
    for x, y in zip((cond.tokens, cond.mask, cond.vector, null.tokens), before, strict=True):
        assert torch.equal(x, y)


def test_merge_fills_different_ports_only():
    image = Cond(image=torch.randn(2, 1, 4, 4))
    both = some(2).merge(image)
    assert both.image is image.image and both.tokens is not None
    with pytest.raises(ValueError, match="vector"):
        both.merge(Cond(vector=torch.randn(2, 3)))


def test_cat_repeat_and_slice_agree():
    one = some(1)
    three = Cond.cat([one, one, one])
    assert len(three) == 3
    assert torch.equal(three.tokens, one.repeat(3).tokens)
    assert torch.equal(three[1:2].vector, one.vector)


@pytest.mark.parametrize("keep", [[True, True], [False, False], [True, False]], ids=["none", "all", "one"])
def test_F8_a_learned_null_takes_part_whatever_is_dropped(keep):
    """A parameter without gradient on one process would have the others wait for it, or PyTorch raise."""
    null = Cond(tokens=torch.ones(1, 3, 2, requires_grad=True), vector=torch.ones(1, 4, requires_grad=True))
    cond = Cond(tokens=torch.zeros(2, 3, 2, requires_grad=True), vector=torch.zeros(2, 4, requires_grad=True))
    chosen = cond.where(torch.tensor(keep), null)
    (chosen.tokens.sum() + chosen.vector.sum()).backward()
    for mine, its in ((cond.tokens, null.tokens), (cond.vector, null.vector)):
        assert (its.grad == keep.count(False)).all() and mine.grad.flatten(1).amax(1).tolist() == [
            float(k) for k in keep
        ]

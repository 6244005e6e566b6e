"""Our attention kernel for CPUs is softmax(q·kᵀ / √d)·v and its derivative, whatever the blocks."""

import pytest
import torch
import torch.nn.functional as F

from minidiff.nn import cpu_attention as room
from minidiff.nn.cpu_attention import cpu_attention


def heads_of(b: int, n: int, h: int, d: int, parts: int = 3) -> torch.Tensor:
    """A view into the output of a fused projection, as a network hands it over."""
    return torch.randn(b, n, parts * h * d)[..., : h * d].unflatten(2, (h, d)).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 1500, 2**20])  # bytes: single rows; uneven blocks; everything at once
@pytest.mark.parametrize("shape", [(2, 3, 20, 5, 7), (1, 2, 300, 4, 11), (2, 2, 9, 1, 9), (1, 1, 1, 8, 1)])
def test_values_and_gradients_are_those_of_the_formula(shape, block, masked, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", block)
    torch.manual_seed(0)
    b, h, n, d, length = shape
    q, k, v = heads_of(b, n, h, d), heads_of(b, length, h, d), heads_of(b, length, h, d)
    mask = (torch.arange(length) < 1 + length // 2)[None, None, None].expand(b, 1, 1, length) if masked else None
    direction = torch.randn(b, h, n, d)
    ours, theirs = cpu_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, want in zip(*(torch.autograd.grad(y, (q, k, v), direction) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loudness", [1.0, 50.0, 1e4])
def test_scores_may_be_of_any_size(loudness):
    """Powers of two of the loud ones would be infinite, or all zero, as they are."""
    torch.manual_seed(0)
    q, k, v = (heads_of(2, 9, 2, 4) for _ in range(3))
    direction = torch.randn(2, 2, 9, 4)
    ours = cpu_attention(loudness * q, k, v, None)
    theirs = F.scaled_dot_product_attention(loudness * q.double(), k.double(), v.double())
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)
    for mine, want in zip(*(torch.autograd.grad(y, (k, v), direction) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, want.float(), rtol=1e-3, atol=1e-5 * loudness)


def test_it_is_an_operator_like_any_other():
    """Schema, shapes and strides without numbers, and derivatives under tracing: what compilers rely on."""
    q, k, v = heads_of(2, 6, 2, 4), heads_of(2, 5, 2, 4), heads_of(2, 5, 2, 4)
    torch.library.opcheck(room._forward, (q, k, v, None))
    torch.library.opcheck(room._forward, (q, k, v, torch.arange(5)[None, None, None].expand(2, 1, 1, 5) < 3))

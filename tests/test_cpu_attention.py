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


def test_it_is_an_operator_like_any_other():
    """Schema, shapes and strides without numbers, and derivatives under tracing: what compilers rely on."""
    q, k, v = heads_of(2, 6, 2, 4), heads_of(2, 5, 2, 4), heads_of(2, 5, 2, 4)
    torch.library.opcheck(room._forward, (q, k, v, None))
    torch.library.opcheck(room._forward, (q, k, v, torch.arange(5)[None, None, None].expand(2, 1, 1, 5) < 3))

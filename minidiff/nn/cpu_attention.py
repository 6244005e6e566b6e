"""Attention on a CPU, a block of scores at a time: softmax(q·kᵀ / √d)·v, forward and backward.

A block fits a core's cache, so that scores never travel to memory; the backward pass computes them again instead of
keeping them (Dao et al. 2022, "FlashAttention"). Two layouts make it faster than PyTorch's own kernel of this kind:

    features first    q, k and v are (d, positions): a product whose last axis is a short d is slow
    keys down         weights are (keys, queries), and softmax goes down: 77 tokens do not fill vectors of 16 numbers

It is an operator as PyTorch's own are, which a compiler takes as it is.
"""

from collections.abc import Iterator
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.library import custom_op

BLOCK = 2**20  # bytes of weights at a time, about what a core's cache holds
WIDTH = 128  # queries at a time: rows that lie 4 KiB apart would evict each other from the cache


@custom_op("minidiff::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor")
def cpu_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h l d"],
    v: Float[Tensor, "b h l d"],
    mask: Bool[Tensor, "b 1 1 l"] | None,
) -> Float[Tensor, "b h n d"]:
    """Returns what every query reads from the values; a key whose mask is False is not seen."""
    queries, keys, values = (_features_first(x) for x in (q, k, v))
    hidden = _hidden(mask, k)
    out = torch.empty_like(queries)
    for rows, columns, weights in _blocks(queries, keys):
        _weigh(queries, keys, hidden, rows, columns, weights)
        out[rows, :, columns] = torch.bmm(values[rows], weights)
    return _features_last(out, q)


@custom_op(
    "minidiff::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Float[Tensor, "b h n d"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h l d"],
    v: Float[Tensor, "b h l d"],
    mask: Bool[Tensor, "b 1 1 l"] | None,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h l d"], Float[Tensor, "b h l d"]]:
    """Returns the gradients of q, k and v.

    For weights P, scores S and `grad` G they come from dV = G·Pᵀ, dP = Vᵀ·G and dS = P ⊙ (dP − Σ P ⊙ dP).
    """
    queries, keys, values, grads = (_features_first(x) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    hidden = _hidden(mask, k)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, columns, weights, slopes in _blocks(queries, keys, buffers=2):
        _weigh(queries, keys, hidden, rows, columns, weights)
        dv[rows].baddbmm_(grads[rows, :, columns], weights.mT)
        torch.bmm(values[rows].mT, grads[rows, :, columns], out=slopes)
        torch._softmax_backward_data(slopes, weights, 1, slopes.dtype, grad_input=slopes)
        dq[rows, :, columns] = torch.bmm(keys[rows], slopes).mul_(scale)
        dk[rows].baddbmm_(queries[rows, :, columns], slopes.mT, alpha=scale)
    return _features_last(dq, q), _features_last(dk, k), _features_last(dv, v)


@cpu_attention.register_fake
def _(q, k, v, mask):
    return _like(q)


@_backward.register_fake
def _(grad, q, k, v, mask):
    return _like(q), _like(k), _like(v)


cpu_attention.register_autograd(
    lambda ctx, grad: (*_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _blocks(
    queries: Float[Tensor, "bh d n"], keys: Float[Tensor, "bh d l"], buffers: int = 1
) -> Iterator[tuple[slice | Tensor, ...]]:
    """Yields the heads and the queries of a block, and `buffers` tensors (heads, l, queries), used again every time."""
    heads, n, tokens = len(queries), queries.shape[2], keys.shape[2]
    column = tokens * queries.element_size()  # bytes of one query's weights
    width = min(n, WIDTH, max(1, BLOCK // column))
    height = min(heads, max(1, BLOCK // (width * column)))
    scratch = queries.new_empty(buffers, height * tokens * width)
    for i in range(0, heads, height):
        for j in range(0, n, width):
            rows, columns = slice(i, min(i + height, heads)), slice(j, min(j + width, n))
            shape = (rows.stop - i, tokens, columns.stop - j)
            yield rows, columns, *scratch[:, : prod(shape)].unflatten(1, shape)  # each of them contiguous


def _weigh(
    queries: Float[Tensor, "bh d n"],
    keys: Float[Tensor, "bh d l"],
    hidden: Bool[Tensor, "bh l 1"] | None,
    rows: slice,
    columns: slice,
    weights: Float[Tensor, "block l width"],
) -> None:
    """Writes the softmax over the keys of one block."""
    scale = keys.shape[1] ** -0.5
    torch.baddbmm(weights, keys[rows].mT, queries[rows, :, columns], beta=0, alpha=scale, out=weights)
    if hidden is not None:
        weights.masked_fill_(hidden[rows], -torch.inf)
    torch.softmax(weights, dim=1, out=weights)


def _hidden(mask: Bool[Tensor, "b 1 1 l"] | None, k: Float[Tensor, "b h l d"]) -> Bool[Tensor, "bh l 1"] | None:
    return None if mask is None else ~mask.mT.expand(-1, k.shape[1], -1, -1).flatten(0, 1)


def _features_first(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "bh d n"]:
    return x.mT.contiguous().flatten(0, 1)


def _features_last(x: Float[Tensor, "bh d n"], like: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    return _like(like).copy_(x.unflatten(0, like.shape[:2]).mT)


def _like(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    """Returns a new tensor that joins the heads of a position in memory, as the layer after an attention wants them."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

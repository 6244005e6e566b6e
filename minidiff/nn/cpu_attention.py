"""Attention on a CPU, a block of scores at a time: softmax(q·kᵀ / √d)·v, forward and backward.

A block fits the cores' caches, so that scores never travel to memory; the backward pass computes them again instead of
keeping them (Dao et al. 2022, "FlashAttention"). Three things make it faster than PyTorch's own kernel of this kind:

    features first    q, k and v are (d, positions): a product whose last axis is a short d is slow
    keys down         weights are (keys, queries), and softmax goes down: 77 tokens do not fill vectors of 16 numbers
    powers of two     in float32, 2^x takes a quarter of eˣ's time: eˢ = 2^(s·log₂e)

For gradients and compilers it is an operator as PyTorch's own are.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.library import custom_op

BLOCK = 2**20  # bytes of weights at a time and thread, about what a core's cache holds
WIDTH = 128  # queries at a time: rows that lie 4 KiB apart would evict each other from the cache
LOG2E = math.log2(math.e)
SMALL = 64.0  # scores from -64 to 64 have powers of two that float32 holds and can add up as they are


def _read(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h l d"],
    v: Float[Tensor, "b h l d"],
    mask: Bool[Tensor, "b 1 1 l"] | None,
    totals: Float[Tensor, "bh 1 n"] | None,
) -> Float[Tensor, "b h n d"]:
    """Returns the output; writes into `totals`, of every query, log₂ Σ eˢ over its scores s (in float32 only)."""
    queries, keys, values = (_features_first(x) for x in (q, k, v))
    hidden, out = _hidden(mask, k), torch.empty_like(queries)
    small = q.dtype == torch.float32 and _largest(queries) * _largest(keys) * q.shape[-1] ** 0.5 * LOG2E < SMALL
    for rows, columns, weights in _blocks(queries, keys):
        _score(queries[rows, :, columns], keys[rows], hidden, rows, weights)
        if q.dtype == torch.float32:
            top = 0.0
            if not small:
                top = weights.amax(1, keepdim=True)
                weights.sub_(top)
            total = weights.exp2_().sum(1, keepdim=True)
            torch.div(torch.bmm(values[rows], weights), total, out=out[rows, :, columns])
            if totals is not None:
                totals[rows, :, columns] = total.log2_().add_(top)
        else:
            out[rows, :, columns] = torch.bmm(values[rows], torch.softmax(weights, dim=1, out=weights))
    return _features_last(out, q)


def _attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h l d"],
    v: Float[Tensor, "b h l d"],
    mask: Bool[Tensor, "b 1 1 l"] | None,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "bh 1 n"]]:
    totals = q.new_empty(q.shape[0] * q.shape[1], 1, q.shape[2])
    return _read(q, k, v, mask, totals), totals


_forward = custom_op(
    "minidiff::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor)"
)(_attend)


def cpu_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h l d"],
    v: Float[Tensor, "b h l d"],
    mask: Bool[Tensor, "b 1 1 l"] | None,
) -> Float[Tensor, "b h n d"]:
    """Returns what every query reads from the values; a key whose mask is False is not seen."""
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    # an operator's call costs as much as a small product
    return _forward(q, k, v, mask)[0] if traced else _read(q, k, v, mask, totals=None)


@custom_op(
    "minidiff::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor totals)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Float[Tensor, "b h n d"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h l d"],
    v: Float[Tensor, "b h l d"],
    mask: Bool[Tensor, "b 1 1 l"] | None,
    out: Float[Tensor, "b h n d"],
    totals: Float[Tensor, "bh 1 n"],
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h l d"], Float[Tensor, "b h l d"]]:
    """Returns the gradients of q, k and v.

    For weights P, scores S, output O and `grad` G they come from dV = G·Pᵀ, dP = Vᵀ·G and dS = P ⊙ (dP − Σ O ⊙ G).
    """
    queries, keys, values, grads = (_features_first(x) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    hidden = _hidden(mask, k)
    means = (grad * out).sum(-1).flatten(0, 1)[:, None]  # of dP, weighted by P
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, columns, weights, slopes in _blocks(queries, keys, buffers=2):
        _score(queries[rows, :, columns], keys[rows], hidden, rows, weights)
        if q.dtype == torch.float32:
            weights.sub_(totals[rows, :, columns]).exp2_()
        else:  # a rounded total would be wrong by up to 2 %
            torch.softmax(weights, dim=1, out=weights)
        dv[rows].baddbmm_(grads[rows, :, columns], weights.mT)
        torch.bmm(values[rows].mT, grads[rows, :, columns], out=slopes)
        slopes.sub_(means[rows, :, columns]).mul_(weights)
        dq[rows, :, columns] = torch.bmm(keys[rows], slopes).mul_(scale)
        dk[rows].baddbmm_(queries[rows, :, columns], slopes.mT, alpha=scale)
    return _features_last(dq, q), _features_last(dk, k), _features_last(dv, v)


@_forward.register_fake
def _(q, k, v, mask):
    return _like(q), q.new_empty(q.shape[0] * q.shape[1], 1, q.shape[2])


@_backward.register_fake
def _(grad, q, k, v, mask, out, totals):
    return _like(q), _like(k), _like(v)


_forward.register_autograd(
    lambda ctx, grad, _: (*_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def _blocks(
    queries: Float[Tensor, "bh d n"], keys: Float[Tensor, "bh d l"], buffers: int = 1
) -> Iterator[tuple[slice | Tensor, ...]]:
    """Yields the heads and the queries of a block, and `buffers` tensors (heads, l, queries), used again every time."""
    heads, n, tokens = len(queries), queries.shape[2], keys.shape[2]
    room = BLOCK * torch.get_num_threads()
    column = tokens * queries.element_size()  # bytes of one query's weights
    width = min(n, WIDTH, max(1, room // column))
    height = min(heads, max(1, room // (width * column)))
    scratch = queries.new_empty(buffers, height * tokens * width)
    for i in range(0, heads, height):
        for j in range(0, n, width):
            rows, columns = slice(i, min(i + height, heads)), slice(j, min(j + width, n))
            shape = (rows.stop - i, tokens, columns.stop - j)
            yield rows, columns, *scratch[:, : math.prod(shape)].unflatten(1, shape)  # each of them contiguous


def _score(
    queries: Float[Tensor, "block d width"],
    keys: Float[Tensor, "block d l"],
    hidden: Bool[Tensor, "bh l 1"] | None,
    rows: slice,
    scores: Float[Tensor, "block l width"],
) -> None:
    """Writes the scores of one block, in float32 times log₂e: to be exponents of two there, and of e elsewhere."""
    unit = LOG2E if scores.dtype == torch.float32 else 1.0
    torch.baddbmm(scores, keys.mT, queries, beta=0, alpha=unit * keys.shape[1] ** -0.5, out=scores)
    if hidden is not None:
        scores.masked_fill_(hidden[rows], -torch.inf)


def _largest(x: Float[Tensor, "bh d n"]) -> float:
    return x.abs().max().item()


def _hidden(mask: Bool[Tensor, "b 1 1 l"] | None, k: Float[Tensor, "b h l d"]) -> Bool[Tensor, "bh l 1"] | None:
    return None if mask is None else ~mask.mT.expand(-1, k.shape[1], -1, -1).flatten(0, 1)


def _features_first(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "bh d n"]:
    return x.mT.contiguous().flatten(0, 1)


def _features_last(x: Float[Tensor, "bh d n"], like: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    return _like(like).copy_(x.unflatten(0, like.shape[:2]).mT)


def _like(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    """Returns a new tensor that joins the heads of a position in memory, as the layer after an attention wants them."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

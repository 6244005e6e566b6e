"""Guidance: whatever changes sampling is a denoiser made from a denoiser.

Classifier-free guidance (Ho & Salimans 2022) goes past the conditional answer, away from the unconditional,

    guided = uncond + w·(cond - uncond),    w = 0: unconditional, w = 1: conditional, w > 1: more than that

At the bottom of the stack is `denoise(xt, t, cond)`, a `Denoiser`. `conditional` and `guided` bind the
condition, and from there on every function takes and returns `denoise(xt, t) -> (x0_hat, eps_hat)`, with
`t` a 0-dim tensor, as samplers call it. At a fixed xt each of x0_hat, eps_hat and y is linear in the others,
so it does not matter which of them is guided; but an edit of x0_hat alone (clipping, rescaling, inpainting)
must be followed by a new eps_hat, which is what `edit_x0` does.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minidiff.cond import Cond
from minidiff.process import Process


def conditional(denoise: Callable, cond: Cond) -> Callable:
    """Binds a condition: `denoise(xt, t, cond)` becomes `denoise(xt, t)`."""
    return lambda xt, t: denoise(xt, t, cond)


def guided(denoise: Callable, process: Process, cond: Cond, null: Cond, w: float, rescale: float = 0.0) -> Callable:
    """Classifier-free guidance with weight `w`; both answers come from one forward of twice the batch.

    `null` is one condition for all rows or one per row (negative prompts). `rescale` in [0, 1] pulls the
    standard deviation of x0_hat back to the conditional answer's, against overexposure (Lin 2023, §3.4).
    """
    if len(null) != len(cond):
        null = null.repeat(len(cond))
    if w == 0:
        return conditional(denoise, null)
    if w == 1:
        return conditional(denoise, cond)
    both = Cond.cat([null, cond])

    def guided_denoise(xt: Float[Tensor, "b ..."], t: Float[Tensor, ""]) -> tuple[Tensor, Tensor]:
        x0, eps = denoise(torch.cat([xt, xt]), t, both)
        (x0_null, x0_cond), (eps_null, eps_cond) = x0.chunk(2), eps.chunk(2)
        x0, eps = x0_null + w * (x0_cond - x0_null), eps_null + w * (eps_cond - eps_null)
        if rescale == 0:
            return x0, eps
        x0 = (rescale * _std(x0_cond) / _std(x0) + (1 - rescale)) * x0
        return x0, _eps_of_x0(process, xt, t, x0)

    return guided_denoise


def interval(inside: Callable, outside: Callable, low: float, high: float) -> Callable:
    """Uses `inside` for t in [low, high] and `outside` elsewhere (Kynkäänniemi et al. 2024, in sigma)."""
    return lambda xt, t: inside(xt, t) if low <= t <= high else outside(xt, t)


def edit_x0(denoise: Callable, process: Process, edit: Callable) -> Callable:
    """Passes x0_hat through `edit` and recomputes eps_hat: alpha·x0_hat + sigma·eps_hat stays xt."""

    def edited_denoise(xt: Float[Tensor, "b ..."], t: Float[Tensor, ""]) -> tuple[Tensor, Tensor]:
        x0 = edit(denoise(xt, t)[0])
        return x0, _eps_of_x0(process, xt, t, x0)

    return edited_denoise


def clamped(denoise: Callable, process: Process, low: float, high: float) -> Callable:
    """Keeps x0_hat in the range of the data, [low, high] (static thresholding, Ho et al. 2020)."""
    return edit_x0(denoise, process, lambda x0: x0.clamp(low, high))


def inpainted(
    denoise: Callable, process: Process, known: Float[Tensor, "b ..."], keep: Bool[Tensor, "b ..."]
) -> Callable:
    """Makes x0_hat the `known` picture wherever `keep` says: the rest is drawn to go with it.

    The network sees what stays under the same noise as the rest, at every step, and answers for both together.
    """
    return edit_x0(denoise, process, lambda x0: torch.where(keep, known, x0))


def dynamic_threshold(denoise: Callable, process: Process, percentile: float) -> Callable:
    """Clips each x0_hat at its `percentile` (0 … 1) of |x0_hat|, at least 1, and divides by it.

    From Imagen (Saharia et al. 2022, §2.3): strong guidance then desaturates instead of clipping.
    """

    def edit(x0: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        size = x0.abs().flatten(1)
        # kthvalue, because torch.quantile refuses more than 16 million elements.
        limit = size.kthvalue(max(1, math.ceil(percentile * size.shape[1])), dim=1).values.clamp(min=1)
        limit = limit.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) / limit

    return edit_x0(denoise, process, edit)


def _eps_of_x0(process: Process, xt: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    return (xt - process.alpha(t) * x0) / process.sigma(t)


def _std(x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    return x.std(dim=list(range(1, x.ndim)), keepdim=True)

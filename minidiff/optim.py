"""Optimizers: how gradients become updates, and how far each goes.

    AdamW    every number on its own: its gradient over the gradient's typical size   (Loshchilov & Hutter 2019)
    Muon     every matrix as a whole: U·Vᵀ in place of the gradient G = U·S·Vᵀ       (Jordan et al. 2024)

A gradient matrix consists of a few strong directions and many weak ones, such as what a single word changes. Muon
walks equally far in all of them, so that the rare is learned with the common.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from minidiff.machine import multiplies_bf16

EPS = 1e-8  # of AdamW
MATRIX_LR = 10.0  # Muon's learning rate over AdamW's: 0.02 where AdamW takes 2e-3
# a·s + b·s³ + c·s⁵ with each (a, b, c) in turn brings every s in (0.001, 1] near 1: each is made for where the one
# before leaves s, and held back a little for bfloat16's sake (Amsel et al. 2025, "The Polar Express")
QUINTICS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.02  # by which a matrix is made smaller still, so that bfloat16's rounding lifts no singular value beyond 1


def make_adamw(model: nn.Module, lr: float, betas: Sequence[float], weight_decay: float) -> Optimizer:
    """Returns AdamW for all of a model."""
    return AdamW(model.parameters(), lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=True)


def make_muon(model: nn.Module, lr: float, betas: Sequence[float], weight_decay: float) -> Optimizer:
    """Returns Muon for the matrices and kernels of a model; biases, norms and tables of embeddings are left to AdamW.

    The rows of a table (one a word, one a place) are no directions of one map, but vectors of their own.
    """
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name in matrices], "matrices": True},
        {"params": [p for name, p in model.named_parameters() if name not in matrices], "matrices": False},
    ]
    return Muon(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay)


class Muon(Optimizer):
    """Muon for the groups of `matrices`, AdamW for the others; the first of `betas` is the momentum of both.

    A kernel (o, i, h, w) is the matrix (o, i·h·w).
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Makes one update. `closure` may compute the loss once more, as PyTorch allows of every optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["matrices"] else self._adamw)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict) -> None:
        lr, momentum = MATRIX_LR * group["lr"], group["betas"][0]
        for p in parameters:
            if p not in self.state:
                self.state[p] = {"momentum": torch.zeros_like(p)}
        grads, momenta = [p.grad for p in parameters], [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, momenta, momentum)  # Nesterov's: as if one step ahead
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        by_shape = defaultdict(list)  # matrices of one shape are made orthogonal together
        for p, update in zip(parameters, updates, strict=True):
            by_shape[update.flatten(1).shape].append((p, update.flatten(1)))
        for (rows, columns), pairs in by_shape.items():
            alike = [p for p, _ in pairs]
            steps = orthogonal(torch.stack([update for _, update in pairs])).unbind()
            steps = [step.view_as(p) for p, step in zip(alike, steps, strict=True)]
            torch._foreach_add_(alike, steps, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _adamw(self, parameters: list[Tensor], group: dict) -> None:
        for p in parameters:
            if p not in self.state:
                zero = torch.zeros((), device=p.device)
                self.state[p] = {"step": zero, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            maximize=False,
        )


def orthogonal(matrices: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
    """Returns about U·Vᵀ for each matrix U·S·Vᵀ: singular values end between 0.8 and 1.1, except those near zero.

    A Newton-Schulz iteration: matrix products only, in bfloat16 where the hardware has it, for the errors do not matter
    for an update.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(torch.bfloat16 if multiplies_bf16(matrices.device) else torch.float32)
    x = x / (MARGIN * x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value exceeds 1 now
    for a, b, c in QUINTICS:
        gram = x @ x.mT
        # a·x + (b·gram + c·gram²)·x, each sum in one pass with its product
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def learning_rate(step: int, *, steps: int, lr: float, warmup: int, decay: Callable[[float], float]) -> float:
    """Returns the learning rate of update `step`: linear up to `lr` in `warmup` updates, then lr·decay(share), where
    the share of the rest that is done goes from 0 to 1.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * decay((step - warmup) / max(1, steps - warmup))


def cosine(share: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017, eq. 5)."""
    return 0.5 * (1 + math.cos(math.pi * share))


def linear(share: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - share


DECAYS = {"cosine": cosine, "linear": linear}  # how a learning rate falls, by the name in `optim.decay`

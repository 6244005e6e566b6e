"""The exponential moving average of a model's weights, from which a diffusion model samples.

    shadow <- d_n · shadow + (1 − d_n) · weights     at update n = 0, 1, 2, …
    d_n = min(decay, (1 + n) / (10 + n))

The shadow is float32 whatever the model's precision: with decay 0.9999 an update is far below what bfloat16
resolves. The warm-up (TensorFlow's `ExponentialMovingAverage(num_updates)`) makes early averages forget the
random initial weights; without it, decay 0.9999 still holds 37 % of them after 10 000 updates.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, prod

import torch
from torch import Tensor, nn

from minidiff.errors import InputError
from minidiff.state import plain_name, require_fit


class EMA:
    """Keeps a float32 average of a model's parameters and a copy of its buffers, on the model's device.

    `warmup=False` holds the decay constant. Raises `InputError` unless 0 <= decay < 1.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise InputError(
                "MD-EMA-001",
                f"The EMA decay is {decay}, but an average needs 0 <= decay < 1. Usual values are 0.999 for "
                f"runs of a few thousand steps and 0.9999 for long ones.",
            )
        self.decay = decay
        self.warmup = warmup
        self.updates = 0  # part of the state: save it beside the tensors
        self._parameters = {name: _shadow(x) for name, x in _parameters(model).items()}
        state = {plain_name(name) for name in model.state_dict()}  # tables that a model computes again are not in it
        self._buffers = {name: _shadow(x) for name, x in _buffers(model).items() if name in state}

    def decay_at(self, update: int) -> float:
        """Returns the decay of the update with index `update` (the first is 0)."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards `model`'s weights, and copies its buffers."""
        weights = _live(_parameters(model), self._parameters)
        weights = [x if x.dtype == torch.float32 else x.float() for x in weights]
        # a lerp keeps equal weights exactly equal, which d·shadow + (1 − d)·weights does not
        torch._foreach_lerp_(list(self._parameters.values()), weights, 1 - self.decay_at(self.updates))
        _copy(_live(_buffers(model), self._buffers), list(self._buffers.values()))
        self.updates += 1

    def initial_share(self) -> float:
        """Returns the share of the average that is still initial weights: the product of all decays."""
        # while d_n = (1 + n)/(10 + n), the product over n < m is m! 9! / (m + 9)!, until d_n reaches `decay`
        end = max(0, ceil((10 * self.decay - 1) / (1 - self.decay))) if self.warmup else 0
        m = min(self.updates, end)
        return prod(j / (m + j) for j in range(1, 10)) * self.decay ** (self.updates - m)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged parameters and the buffers under the model's own names (not copies).

        `updates`, the number of updates behind them, is the other half of the state.
        """
        return self._parameters | self._buffers

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Continues from saved tensors and the number of updates behind them.

        Raises `CheckpointError` if names or shapes differ from the model's.
        """
        tensors = {plain_name(name): x for name, x in tensors.items()}
        own = self.state_dict()
        require_fit("EMA weights", saved=tensors, model=own)
        _copy([tensors[name] for name in own], list(own.values()))
        self.updates = updates

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Puts the averaged weights into `model` within the `with` block; the raw ones always come back."""
        own = self.state_dict()
        live = _live(_parameters(model) | _buffers(model), own)
        raw = [x.detach().clone() for x in live]
        try:
            _copy(list(own.values()), live)
            yield
        finally:
            _copy(raw, live)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): x for name, x in model.named_parameters(remove_duplicate=False)}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): x for name, x in model.named_buffers(remove_duplicate=False)}


def _shadow(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32 if x.is_floating_point() else x.dtype, copy=True)


def _live(tensors: Mapping[str, Tensor], shadows: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns the model's tensors in the shadows' order; they may be registered in another one."""
    require_fit("EMA weights", saved=shadows, model={name: tensors[name] for name in shadows if name in tensors})
    return [tensors[name] for name in shadows]


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """Writes in place: compiled code, optimizers and tied weights go on pointing at the same memory."""
    for x, y in zip(source, target, strict=True):
        y.copy_(x)

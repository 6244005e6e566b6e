"""Conditioning: what a network is told besides the noisy image, through three ports and without subclasses.

    tokens   one vector per word piece    → keys and values of every cross-attention
    vector   one vector per image         → added to the time embedding
    image    one picture per image        → concatenated to the input channels

Dropping the condition for classifier-free guidance (Ho & Salimans 2022) and building the unconditional branch when
sampling are the same operation, `cond.where(keep, null)`. It never writes into a tensor, so cached embeddings stay as
they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)  # equal means the same one, so that a condition can be a key
class Cond:
    """A batch of conditions. A port that is `None` is closed."""

    tokens: Float[Tensor, "b l d"] | Mapping | None = None  # a mapping: what `UNet.prepare` made of them, for it alone
    mask: Bool[Tensor, "b l"] | None = None  # True where a token counts; None: all of them
    vector: Float[Tensor, "b v"] | None = None
    image: Float[Tensor, "b c h w"] | None = None

    def __len__(self) -> int:
        return next(len(x) for x in self._open().values())

    def __getitem__(self, rows: slice) -> "Cond":
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> "Cond":
        return self._map(lambda x: x.to(device, non_blocking=True))

    def repeat(self, n: int) -> "Cond":
        """Repeats a batch of one condition `n` times, without copying."""
        return self._map(lambda x: x.expand(n, *x.shape[1:]))

    def where(self, keep: Bool[Tensor, " b"], null: "Cond") -> "Cond":
        """Returns this condition where `keep` is true and the (single) condition `null` elsewhere, in new tensors."""

        def choose(x: Tensor, y: Tensor) -> Tensor:
            return torch.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, y)

        null = null.to(keep.device)
        return Cond(**{name: choose(x, getattr(null, name)) for name, x in self._open().items()})

    def merge(self, other: "Cond") -> "Cond":
        """Returns both conditions' open ports together; a port that is open in both is an error."""
        mine, theirs = self._open(), other._open()
        if both := mine.keys() & theirs.keys():
            raise ValueError(f"both conditions fill the port {sorted(both)}; merge needs different ports")
        return Cond(**mine, **theirs)

    @staticmethod
    def cat(conds: Sequence["Cond"]) -> "Cond":
        """Joins batches of the same ports along the batch."""
        return Cond(**{name: torch.cat([getattr(c, name) for c in conds]) for name in conds[0]._open()})

    def _open(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Cond":
        return Cond(**{name: f(x) for name, x in self._open().items()})

"""Low-rank adaptation (Hu et al. 2021): a small change of a large network that fits in a small file.

    W' = W + scale·(alpha / rank)·up·down        down (rank, in), up (out, rank)                        (their eq. 3)

Before it is merged it is a detour around the layer, so that it can be trained and its scale turned while the network
stays as it is; merged, it costs nothing. Unmerging puts back a copy, so that not a bit of the network is lost.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.errors import InputError
from minidiff.nn.attention import CrossAttention, SelfAttention

_PARTS = {"qkv": 3, "q": 1, "kv": 2, "out": 1}  # matrices in the layers of an attention


class LowRank(nn.Module):
    """The change of one matrix. Where a layer holds several, one below the other (q, k, v), it is number `part`."""

    def __init__(
        self,
        down: Float[Tensor, "r i *kernel"],
        up: Float[Tensor, "o r *ones"],
        *,
        layer: str,  # name of the layer in the network
        part: int = 0,
        parts: int = 1,
        alpha: float | None = None,  # None: the rank
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.layer, self.part, self.parts = layer, part, parts
        self.rank = len(down)
        self.alpha = float(self.rank if alpha is None else alpha)

    def rows(self) -> slice:
        """Returns which outputs of the layer are this matrix'."""
        n = len(self.up)
        return slice(self.part * n, (self.part + 1) * n)

    def delta(self) -> Float[Tensor, "o i *kernel"]:
        """Returns what is added to the matrix at scale 1."""
        change = self.up.flatten(1) @ self.down.flatten(1)
        return self.alpha / self.rank * change.unflatten(1, self.down.shape[1:])

    def forward(self, x: Float[Tensor, "..."], layer: nn.Module) -> Float[Tensor, "..."]:
        """Returns what is added to the answer of `layer` to x at scale 1."""
        if x.ndim == 4:  # a map: the layer is a convolution
            h = F.conv2d(x, self.down, stride=layer.stride, padding=layer.padding)
            return self.alpha / self.rank * F.conv2d(h, self.up)
        h = F.linear(F.linear(x, self.down.flatten(1)), self.up.flatten(1))
        before, n = self.rows().start, len(self.up)
        return self.alpha / self.rank * F.pad(h, (before, (self.parts - 1) * n - before))


class LoRA(nn.Module):
    """The changes of a network's layers, as one adapter: `attached` or merged, at any scale."""

    def __init__(self, changes: Sequence[LowRank]) -> None:
        super().__init__()
        self.changes = nn.ModuleList(changes)
        self._base: dict[str, Tensor] = {}  # weights before merging; empty while not merged
        self._merged: dict[str, int] = {}  # hashes of the weights after merging

    @contextmanager
    def attached(self, net: nn.Module, scale: float = 1.0) -> Iterator[None]:
        """Within the block, `net` answers with the adapter, through which gradients reach `down` and `up`."""
        with ExitStack() as stack:
            for change in self.changes:

                def add(layer: nn.Module, inputs: tuple, y: Tensor, change: LowRank = change) -> Tensor:
                    return y + scale * change(inputs[0], layer)

                stack.enter_context(_removed(net.get_submodule(change.layer).register_forward_hook(add)))
            yield

    @torch.no_grad()
    def merge(self, net: nn.Module, scale: float = 1.0) -> None:
        """Adds the adapter to the weights of `net`, of which a copy is kept. Raises `InputError` if it is merged."""
        if self._base:
            raise InputError(
                "MD-LORA-001", "This LoRA is merged already. Unmerge it before it is merged again, or with a new scale."
            )
        for change in self.changes:
            weight = net.get_submodule(change.layer).weight
            if change.layer not in self._base:
                self._base[change.layer] = weight.detach().clone()
            weight[change.rows()] += scale * change.delta().view_as(weight[change.rows()]).to(weight)
        self._merged = {name: _hash(net.get_submodule(name).weight) for name in self._base}

    @torch.no_grad()
    def unmerge(self, net: nn.Module) -> None:
        """Gives `net` back the weights it had before `merge`, bit for bit.

        Raises `InputError` if the adapter is not merged or if something else changed the weights since.
        """
        weights = {name: net.get_submodule(name).weight for name in self._base}
        if not weights or any(_hash(x) != self._merged[name] for name, x in weights.items()):
            raise InputError(
                "MD-LORA-002",
                "This LoRA cannot be unmerged: it is not merged, or the weights were changed since, and going back "
                "would undo that too. Unmerge several LoRAs in the opposite order of merging, and do not train "
                "meanwhile.",
            )
        for name, weight in weights.items():
            weight.copy_(self._base[name])
        self._base, self._merged = {}, {}


def fresh(net: nn.Module, rank: int, alpha: float | None = None) -> LoRA:
    """Returns an adapter for all attention projections of `net` that changes nothing yet (up is zero, as in §4.1)."""
    changes = []
    for name, attention in net.named_modules():
        if isinstance(attention, SelfAttention | CrossAttention):
            for child, layer in attention.named_children():
                for part in range(parts := _PARTS[child]):
                    down = torch.randn(rank, layer.in_features, device=layer.weight.device) / rank
                    up = torch.zeros(layer.out_features // parts, rank, device=layer.weight.device)
                    place = {"layer": f"{name}.{child}", "part": part, "parts": parts}
                    changes.append(LowRank(down, up, alpha=alpha, **place))
    return LoRA(changes)


def _hash(weight: Tensor) -> int:
    return int(torch.hash_tensor(weight.detach()).view(torch.int64))


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()

"""The UNet of latent / Stable Diffusion (Rombach et al. 2022): predicts the objective's target from a noisy image.

    x ─stem─► level 0 ──────────── skips ───────────► level 0 ─head─► y
                 └─down─► level 1 ── skips ──► level 1 ─up─┘
                             └─down─► … mid … ─up─┘

Going down it sees more and more of the picture at less and less resolution; going up, the skips bring the detail back.
Time and text reach every level: time through the ResBlocks, words through cross-attention. Tiny and large models are
this same class with other numbers, Stable Diffusion's own among them (`minidiff.interop.load_unet`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.cond import Cond
from minidiff.errors import InputError
from minidiff.nn.attention import CrossAttention, SpatialTransformer
from minidiff.nn.blocks import Block, Downsample, Level, ResBlock, Upsample
from minidiff.nn.embed import TimeEmbedding, grid_embedding


class UNet(nn.Module):
    """y = net(x, tau, cond) with x and y of shape (b, c, h, w), tau (b,) in 0 … 999. Any h and w will do."""

    def __init__(
        self,
        *,
        in_channels: int,  # of the space (pixels or latents), without `image_channels`
        out_channels: int,
        channels: Sequence[int] = (320, 640, 1280, 1280),  # per level, from fine to coarse
        layers: int | Sequence[int] = 2,  # blocks per level (one more on the way up); one number, or one per level
        attend: Sequence[bool] = (True, True, True, False),  # which levels hold transformers
        heads: int | Sequence[int] = 8,  # of every attention; one number, or one per level
        head_dim: int | None = None,  # channels per head, instead of `heads`
        depth: int | Sequence[int] = 1,  # layers of every transformer; one number, or one per level
        linear_projection: bool = True,  # around transformers; False: weights shaped as 1×1 convolutions
        mid: bool = True,  # two blocks in the middle; its transformer has the coarsest level's heads and depth
        groups: int = 32,  # of every GroupNorm
        norm_eps: float = 1e-5,  # of the GroupNorms outside transformers
        token_dim: int = 768,  # width of `cond.tokens`
        vector_dim: int | None = None,  # width of `cond.vector`; None: no such port
        vector_layers: int = 1,  # that `cond.vector` passes: 1 or 2
        image_channels: int = 0,  # channels of `cond.image`
        scale_shift: bool = False,  # the time embedding scales and shifts features instead of being added to them
        cos_first: bool = True,  # in the embedding of tau
        freq_shift: float = 0.0,  # in the embedding of tau
        positions: bool = False,  # tells every position where it is, by sines added to the stem's output
    ) -> None:
        super().__init__()
        levels = _levels(channels, layers, attend, heads, head_dim, depth)
        _check_widths(levels, mid, groups, positions)
        self.multiple = 2 ** (len(channels) - 1)  # sizes that are a multiple of it can be halved without rounding
        self.positions = positions
        time_dim = 4 * channels[0]

        def block(c_in: int, level: _Level, attends: bool) -> Block:
            res = ResBlock(c_in, level.width, time_dim, groups, scale_shift, norm_eps)
            shape = (level.width, level.heads, token_dim, groups, level.depth, linear_projection)
            return Block(res, SpatialTransformer(*shape) if attends else None)

        self.time = TimeEmbedding(channels[0], time_dim, vector_dim, vector_layers, cos_first, freq_shift)
        self.stem = nn.Conv2d(in_channels + image_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()

        c, skips = channels[0], [channels[0]]
        for i, level in enumerate(levels):
            last = i == len(levels) - 1
            blocks = [block(c if j == 0 else level.width, level, level.attends) for j in range(level.layers)]
            self.down.append(Level(blocks, None if last else Downsample(level.width)))
            skips += [level.width] * (level.layers if last else level.layers + 1)
            c = level.width

        self.mid_in = block(c, levels[-1], attends=True) if mid else None
        self.mid_out = block(c, levels[-1], attends=False) if mid else None

        for i, level in reversed(list(enumerate(levels))):
            blocks = []
            for _ in range(level.layers + 1):
                blocks.append(block(c + skips.pop(), level, level.attends))
                c = level.width
            self.up.append(Level(blocks, None if i == 0 else Upsample(level.width)))

        self.head_norm = nn.GroupNorm(groups, c, norm_eps)
        self.head = nn.Conv2d(c, out_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def prepare(self, cond: Cond) -> Cond:
        """Returns `cond` with the keys and values that every cross-attention takes from its tokens, for many forwards
        with the weights as they are now.
        """
        if cond.tokens is None:
            return cond
        layers = [layer for layer in self.modules() if isinstance(layer, CrossAttention)]
        return replace(cond, tokens={layer: layer.keys_values(cond.tokens) for layer in layers})

    def forward(self, x: Float[Tensor, "b c h w"], tau: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b o h w"]:
        time = F.silu(self.time(tau, cond.vector))
        h = self.stem(x if cond.image is None else torch.cat([x, cond.image], dim=1))
        if self.positions:
            h = h + grid_embedding(h.shape[2], h.shape[3], h.shape[1], h.device).to(h.dtype)

        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = block(h, time, cond.tokens, cond.mask)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)

        if self.mid_in is not None:
            h = self.mid_in(h, time, cond.tokens, cond.mask)
            h = self.mid_out(h, time, cond.tokens, cond.mask)

        for level in self.up:
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), time, cond.tokens, cond.mask)
            if level.resample is not None:
                h = level.resample(h, skips[-1].shape[2:])

        return self.head(F.silu(self.head_norm(h)))


class _Level(NamedTuple):
    """What the blocks of one resolution have in common."""

    width: int
    layers: int
    attends: bool
    heads: int
    depth: int


def _levels(
    channels: Sequence[int],
    layers: int | Sequence[int],
    attend: Sequence[bool],
    heads: int | Sequence[int],
    head_dim: int | None,
    depth: int | Sequence[int],
) -> list[_Level]:
    """Returns the options per level, where one number stands for all levels."""
    if head_dim is not None:
        heads = [max(1, width // head_dim) for width in channels]
    options = {"layers": layers, "attend": attend, "heads": heads, "depth": depth}
    options = {name: [x] * len(channels) if isinstance(x, int) else x for name, x in options.items()}
    for name, values in options.items():
        if len(values) != len(channels):
            raise InputError(
                "MD-NET-002",
                f"net.{name} has values for {len(values)} levels, but net.channels has {len(channels)} levels; give "
                "one value per level.",
            )
    return [_Level(*level) for level in zip(channels, *options.values(), strict=True)]


def _check_widths(levels: Sequence[_Level], mid: bool, groups: int, positions: bool) -> None:
    for level in levels:
        attends = level.attends or mid and level is levels[-1]
        if level.width % groups or attends and level.width % level.heads:
            raise InputError(
                "MD-NET-003",
                f"net.channels holds {level.width}, which cannot be divided into {groups} groups (net.groups) and "
                f"{level.heads} heads (net.heads or net.head_dim).",
            )
    if positions and levels[0].width % 4:
        raise InputError(
            "MD-NET-005",
            f"net.positions=true needs net.channels to begin with a multiple of 4 (a sine and a cosine for each of x "
            f"and y), and {levels[0].width} is none.",
        )

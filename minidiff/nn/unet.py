"""The UNet of latent / Stable Diffusion (Rombach et al. 2022): predicts the objective's target from a noisy image.

    x ─stem─► level 0 ──────────── skips ───────────► level 0 ─head─► y
                 └─down─► level 1 ── skips ──► level 1 ─up─┘
                             └─down─► … mid … ─up─┘

Going down it sees more and more of the picture at less and less resolution; going up, the skips bring the detail back.
Time and text reach every level: time through the ResBlocks, words through cross-attention. Tiny and large models are
this same class with other numbers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.cond import Cond
from minidiff.errors import InputError
from minidiff.nn.attention import SpatialTransformer
from minidiff.nn.blocks import Block, Downsample, Level, ResBlock, Upsample
from minidiff.nn.embed import TimeEmbedding, grid_embedding


class UNet(nn.Module):
    """y = net(x, tau, cond) with x and y of shape (b, c, h, w), tau (b,) in 0 … 999."""

    def __init__(
        self,
        *,
        in_channels: int,  # of the space (pixels or latents), without `image_channels`
        out_channels: int,
        channels: Sequence[int] = (320, 640, 1280, 1280),  # per level, from fine to coarse
        layers: int = 2,  # blocks per level (one more on the way up)
        attend: Sequence[bool] = (True, True, True, False),  # which levels hold transformers; the middle always does
        heads: int = 8,  # of every attention
        groups: int = 32,  # of every GroupNorm
        token_dim: int = 768,  # width of `cond.tokens`
        vector_dim: int | None = None,  # width of `cond.vector`; None: no such port
        image_channels: int = 0,  # channels of `cond.image`
        scale_shift: bool = False,  # the time embedding scales and shifts features instead of being added to them
        positions: bool = False,  # tells every position where it is, by sines added to the stem's output
    ) -> None:
        super().__init__()
        _check_widths(channels, attend, heads, groups, positions)
        self.multiple = 2 ** (len(channels) - 1)
        self.positions = positions
        time_dim = 4 * channels[0]

        def block(c_in: int, c_out: int, attends: bool) -> Block:
            res = ResBlock(c_in, c_out, time_dim, groups, scale_shift)
            return Block(res, SpatialTransformer(c_out, heads, token_dim, groups) if attends else None)

        self.time = TimeEmbedding(channels[0], time_dim, vector_dim)
        self.stem = nn.Conv2d(in_channels + image_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()

        c, skips = channels[0], [channels[0]]
        for i, (width, attends) in enumerate(zip(channels, attend, strict=True)):
            last = i == len(channels) - 1
            blocks = [block(c if j == 0 else width, width, attends) for j in range(layers)]
            self.down.append(Level(blocks, None if last else Downsample(width)))
            skips += [width] * (layers if last else layers + 1)
            c = width

        self.mid_in = block(c, c, attends=True)
        self.mid_out = block(c, c, attends=False)

        for i, (width, attends) in reversed(list(enumerate(zip(channels, attend, strict=True)))):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(block(c + skips.pop(), width, attends))
                c = width
            self.up.append(Level(blocks, None if i == 0 else Upsample(width)))

        self.head_norm = nn.GroupNorm(groups, c)
        self.head = nn.Conv2d(c, out_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "b c h w"], tau: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b o h w"]:
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise InputError("MD-NET-001", size_message(x.shape[2], x.shape[3], self.multiple))
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

        h = self.mid_in(h, time, cond.tokens, cond.mask)
        h = self.mid_out(h, time, cond.tokens, cond.mask)

        for level in self.up:
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), time, cond.tokens, cond.mask)
            if level.resample is not None:
                h = level.resample(h)

        return self.head(F.silu(self.head_norm(h)))


def size_message(height: int, width: int, multiple: int) -> str:
    """Returns the words for a feature map that the UNet cannot halve as often as it has levels."""
    low = height // multiple * multiple
    return (
        f"The UNet cannot halve a {height}×{width} map as often as it has levels: both sides must be multiples of "
        f"{multiple}. The nearest heights are {low or multiple} and {low + multiple}. Choose another image size "
        "or fewer levels."
    )


def _check_widths(channels: Sequence[int], attend: Sequence[bool], heads: int, groups: int, positions: bool) -> None:
    if len(attend) != len(channels):
        raise InputError(
            "MD-NET-002",
            f"net.attend says for {len(attend)} levels whether they attend, but net.channels has {len(channels)} "
            "levels; give one value per level.",
        )
    for width in channels:
        if width % groups or width % heads:
            raise InputError(
                "MD-NET-003",
                f"net.channels holds {width}, which cannot be divided into {groups} groups (net.groups) and "
                f"{heads} heads (net.heads).",
            )
    if positions and channels[0] % 4:
        raise InputError(
            "MD-NET-005",
            f"net.positions=true needs net.channels to begin with a multiple of 4 (a sine and a cosine for each of x "
            f"and y), and {channels[0]} is none.",
        )

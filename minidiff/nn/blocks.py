"""The convolutional blocks of the UNet: residual blocks that hear the time, and the two changes of resolution."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minidiff.nn.attention import SpatialTransformer, Words


class ResBlock(nn.Module):
    """norm → SiLU → conv, twice, with the time embedding in between and a skip around (Ho et al. 2020, appendix B).

    The embedding is added to the features, or it scales and shifts them after the second norm (Dhariwal & Nichol 2021,
    eq. 4).
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int, groups: int, scale_shift: bool, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)  # the block starts as its skip
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d"]) -> Float[Tensor, "b o h w"]:
        """`time` is the time embedding after its SiLU, which all blocks share."""
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.time(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        return self.skip(x) + self.conv2(F.silu(h))


class Block(nn.Module):
    """A ResBlock and, on levels that attend, a transformer."""

    def __init__(self, res: ResBlock, transformer: SpatialTransformer | None) -> None:
        super().__init__()
        self.res = res
        self.transformer = transformer

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        time: Float[Tensor, "b d"],
        tokens: Words | None,
        mask: Bool[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b o h w"]:
        h = self.res(x, time)
        return h if self.transformer is None else self.transformer(h, tokens, mask)


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution; odd sizes are rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels, then a convolution (no checkerboards: Odena et al. 2016).

    `size` (height, width) is that of the map which was halved: twice as large, or one less where it was odd.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, size, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next one (None at the ends of the U)."""

    def __init__(self, blocks: list[Block], resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

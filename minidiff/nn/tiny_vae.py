"""The tiny autoencoders of Ollin Boer Bohan (TAESD, TAEF1, TAEF2, …): a large VAE's latents, much faster.

They were distilled from a VAE, so they read and write its latents, as diffusion sees them; there is no posterior, only
one z. The layers are numbered as in their author's files (github.com/madebyollin/taesd).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class TinyBlock(nn.Module):
    """Three convolutions with a skip around; with `pool`, a wide 1×1 path with a GroupNorm comes first.

    The GroupNorm is what lets a position hear about the rest of the picture (FLUX.2's latents need that).
    """

    def __init__(self, channels: int, pool: bool) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        wide = 4 * channels
        self.pool = None
        if pool:
            widen, narrow = nn.Conv2d(channels, wide, 1, bias=False), nn.Conv2d(wide, channels, 1, bias=False)
            self.pool = nn.Sequential(widen, nn.GroupNorm(4, wide), nn.ReLU(), narrow)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """3·tanh(z / 3): latents outside of what the decoder was trained on do no harm."""

    def forward(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b z h w"]:
        return 3 * torch.tanh(z / 3)


class TinyVAE(nn.Module):
    """z = vae.encode(images); images_hat = vae.decode(z), with images in [−1, 1] (the layers themselves use [0, 1])."""

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        channels: int = 64,
        encoder_blocks: Sequence[int] = (1, 3, 3, 3),  # per resolution, from fine to coarse
        decoder_blocks: Sequence[int] = (3, 3, 3, 1),  # per resolution, from coarse to fine
        pool: bool = False,  # in the blocks of the coarsest resolution: TAEF2
        in_channels: int = 3,  # of the images it reads
        out_channels: int = 3,  # of the images it writes
        scale: float = 1.0,  # diffusion works on (z − shift)·scale
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.latent_channels, self.scale, self.shift, self.pool = latent_channels, scale, shift, pool
        self.encoder_blocks, self.decoder_blocks = list(encoder_blocks), list(decoder_blocks)
        last = len(encoder_blocks) - 1

        encoder: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1)]
        for i, n in enumerate(encoder_blocks):
            if i > 0:
                encoder.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False))
            encoder += [TinyBlock(channels, pool and i == last) for _ in range(n)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(channels, latent_channels, 3, padding=1))

        decoder: list[nn.Module] = [SoftClamp(), nn.Conv2d(latent_channels, channels, 3, padding=1), nn.ReLU()]
        for i, n in enumerate(decoder_blocks):
            if i > 0:
                decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
            decoder += [TinyBlock(channels, pool and i == 0) for _ in range(n)]
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(channels, out_channels, 3, padding=1))

    @property
    def factor(self) -> int:
        """How many pixels of a picture, in height and in width, share a position of its latents."""
        return 2 ** (len(self.encoder_blocks) - 1)

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z h2 w2"]:
        return self.encoder((images + 1) / 2)

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c h2 w2"]:
        return 2 * self.decoder(z) - 1

"""The autoencoder of latent diffusion: pictures ⇄ latents that are smaller, smooth, and nearly normal.

    q(z | x) = N(mean(x), exp(logvar(x)))       x_hat = decode(z)         (Kingma & Welling 2014; Rombach et al. 2022)

Diffusion then works on z instead of x: an eighth of the width and height, four numbers a position. The latents'
standard deviation is far from 1, so `scale` and `shift` say what diffusion sees: (z − shift)·scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.nn.attention import attend

EPS = 1e-6  # of every GroupNorm


@dataclass(frozen=True)
class Posterior:
    """A normal distribution per picture, independent in every number of its latent."""

    mean: Float[Tensor, "b z h w"]
    logvar: Float[Tensor, "b z h w"]

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "b z h w"]:
        """Returns mean + std·noise; the noise is drawn on the generator's device (without one, on the mean's)."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean.device)

    def kl(self) -> Float[Tensor, " b"]:
        """Returns the divergence from the standard normal in nats, summed over a latent (Kingma & Welling 2014, B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class ResidualBlock(nn.Module):
    """norm → SiLU → conv, twice, with a skip around: the UNet's block without the time."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class MapAttention(nn.Module):
    """Self-attention with one head over the positions of a map, added to the map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        positions = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        h = self.out(attend(*self.qkv(positions).chunk(3, dim=-1)))
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])


class Halve(nn.Module):
    """Halves the resolution by a strided convolution that is padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Doubles the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(channels: int, groups: int, attend: bool) -> nn.Sequential:
    """Returns the blocks of the coarsest resolution."""
    attention = MapAttention(channels, groups) if attend else nn.Identity()
    return nn.Sequential(
        ResidualBlock(channels, channels, groups), attention, ResidualBlock(channels, channels, groups)
    )


class Encoder(nn.Module):
    """(b, in_channels, h, w) → (b, out_channels, h / 2ⁿ, w / 2ⁿ) with n + 1 = len(channels)."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: Sequence[int], layers: int, groups: int, attend: bool
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        c = channels[0]
        for i, width in enumerate(channels):
            blocks = [ResidualBlock(c if j == 0 else width, width, groups) for j in range(layers)]
            self.down.append(nn.Sequential(*blocks, *([] if i == len(channels) - 1 else [Halve(width)])))
            c = width
        self.mid = middle(c, groups, attend)
        self.head_norm = nn.GroupNorm(groups, c, EPS)
        self.head = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z h2 w2"]:
        h = self.stem(x)
        for level in self.down:
            h = level(h)
        return self.head(F.silu(self.head_norm(self.mid(h))))


class Decoder(nn.Module):
    """(b, in_channels, h, w) → (b, out_channels, 2ⁿ·h, 2ⁿ·w) with n + 1 = len(channels), given from fine to coarse."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: Sequence[int], layers: int, groups: int, attend: bool
    ) -> None:
        super().__init__()
        c = channels[-1]
        self.stem = nn.Conv2d(in_channels, c, 3, padding=1)
        self.mid = middle(c, groups, attend)
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(channels))):
            blocks = [ResidualBlock(c if j == 0 else width, width, groups) for j in range(layers + 1)]
            self.up.append(nn.Sequential(*blocks, *([] if i == 0 else [Double(width)])))
            c = width
        self.head_norm = nn.GroupNorm(groups, c, EPS)
        self.head = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c h2 w2"]:
        h = self.mid(self.stem(z))
        for level in self.up:
            h = level(h)
        return self.head(F.silu(self.head_norm(h)))


class VAE(nn.Module):
    """posterior = vae.encode(images); images_hat = vae.decode(posterior.sample()), with images in [−1, 1]."""

    def __init__(
        self,
        *,
        in_channels: int = 3,  # of the images it reads
        out_channels: int = 3,  # of the images it writes
        latent_channels: int = 4,
        channels: Sequence[int] = (128, 256, 512, 512),  # per level, from fine to coarse; each level halves the map
        layers: int = 2,  # blocks per level (one more in the decoder)
        groups: int = 32,  # of every GroupNorm
        attend: bool = True,  # in the middle
        quant: bool = True,  # a 1×1 convolution after the encoder
        post_quant: bool = True,  # a 1×1 convolution before the decoder
        scale: float = 1.0,  # diffusion works on (z − shift)·scale
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.latent_channels, self.scale, self.shift = latent_channels, scale, shift
        self.encoder = Encoder(in_channels, 2 * latent_channels, channels, layers, groups, attend)
        self.quant = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant else nn.Identity()
        self.post_quant = nn.Conv2d(latent_channels, latent_channels, 1) if post_quant else nn.Identity()
        self.decoder = Decoder(latent_channels, out_channels, channels, layers, groups, attend)

    @property
    def factor(self) -> int:
        """How many pixels of a picture, in height and in width, share a position of its latents."""
        return 2 ** (len(self.encoder.down) - 1)

    def encode(self, images: Float[Tensor, "b c h w"]) -> Posterior:
        mean, logvar = self.quant(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.decoder(self.post_quant(z))

    def forward(
        self, images: Float[Tensor, "b c h w"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b o h w"], Posterior]:
        """Returns the reconstruction from one sample of the posterior, and the posterior: what training compares."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(generator)), posterior

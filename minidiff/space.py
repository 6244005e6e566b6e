"""The space that diffusion runs in: the pixels themselves, or the latents of a frozen autoencoder.

    x0 = space.encode(images)        images = space.decode(x0)        soft = space.blur(x0, spread)
    part = space.inside(region)      which numbers of x0 belong to a region of the picture

Images are (b, 3, h, w) in [−1, 1]. `space.shape` is the shape of one x0, which the network and the samplers work on;
`factor` pixels, in height and in width, share one of its positions. What a space has measured or was built on is its
`state`, plain JSON that a checkpoint keeps and `restore` demands back.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import chain, islice

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from minidiff.errors import CheckpointError, InputError, NumericsError
from minidiff.nn.tiny_vae import TinyVAE
from minidiff.nn.vae import VAE
from minidiff.state import fingerprint

PIXELS = 8 * 512**2  # that pass an autoencoder at once: at full resolution it needs far more memory than the UNet


class Pixels:
    """The picture itself, its pixels grouped into patches: (3, h, w) ⇄ (3·patch², h/patch, w/patch).

    Grouping loses nothing and keeps white noise white, so this is diffusion on pixels; the network only starts at a
    resolution where small machines are fast (Hoogeboom et al. 2023, "simple diffusion", §3).
    """

    bounded = True  # x0 lies in [−1, 1], where samplers may keep their estimates
    identity = None  # there is no network whose answers could be kept

    def __init__(self, image_size: int, patch: int = 1) -> None:
        if image_size % patch:
            low = image_size // patch * patch
            raise InputError(
                "MD-SPACE-001",
                f"image_size={image_size} cannot be cut into patches of {patch}×{patch} pixels (space.patch): it "
                f"must be a multiple of {patch}. The nearest sizes are {low or patch} and {low + patch}.",
            )
        self.image_size, self.patch, self.factor = image_size, patch, patch
        self.shape = (3 * patch**2, image_size // patch, image_size // patch)

    def to(self, device: torch.device | str) -> "Pixels":
        return self

    def encode(self, images: Shaped[Tensor, "b 3 h w"]) -> Shaped[Tensor, "b c h2 w2"]:
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)

    def decode(self, x0: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        return rearrange(x0, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)

    def blur(self, x0: Float[Tensor, "b c h2 w2"], spread: Float[Tensor, " b"]) -> Float[Tensor, "b c h2 w2"]:
        """Returns x0 of the pictures under a Gaussian blur of standard deviation `spread`, in widths of the picture."""
        return self.encode(blurred(self.decode(x0), spread))

    def inside(self, region: Bool[Tensor, "h w"]) -> Bool[Tensor, "1 c h2 w2"]:
        """Returns which numbers of x0 belong to a region of the picture."""
        return self.encode(region.expand(1, 3, *region.shape))

    def measure(self, batches: Iterable[Float[Tensor, "b 3 h w"]]) -> None:
        """Does nothing: pixels are what they are."""

    def state(self) -> dict:
        return {}

    def restore(self, state: Mapping) -> None:
        """Does nothing: there was nothing to keep."""


class Latents:
    """The latents of a frozen autoencoder, shifted and scaled: x0 = (z − shift)·scale (Rombach et al. 2022, §3.2).

    z is the posterior's mean where there is a posterior, so that a picture always has the same latents. Scale and
    shift are the autoencoder's own, or with `measured` one over the standard deviation of all numbers of the latents
    that `measure` sees (Rombach et al., app. G), so that diffusion starts from data of unit variance. Nothing here is
    trained. `tolerance` is the error, root mean square with pictures in [−1, 1], up to which the autoencoder may redraw
    the training pictures. Raises InputError (MD-SPACE-002) for a size that the autoencoder cannot halve evenly.
    """

    bounded = False

    def __init__(
        self, vae: VAE | TinyVAE, image_size: int, *, measured: bool = False, tolerance: float = math.inf
    ) -> None:
        if image_size % vae.factor or image_size < 1:
            low = image_size // vae.factor * vae.factor
            raise InputError(
                "MD-SPACE-002",
                f"image_size={image_size} does not fit the autoencoder, which makes one position of its latents of "
                f"{vae.factor}×{vae.factor} pixels: it must be a multiple of {vae.factor}. The nearest sizes are "
                f"{low or vae.factor} and {low + vae.factor}.",
            )
        self.vae, self.image_size, self.factor = vae.eval().requires_grad_(False), image_size, vae.factor
        self.shape = (vae.latent_channels, image_size // vae.factor, image_size // vae.factor)
        self.at_once, self.tolerance = max(1, PIXELS // image_size**2), tolerance
        self.waiting = measured  # for `measure` or `restore`
        self.identity = fingerprint(vae.state_dict())

    def to(self, device: torch.device | str) -> "Latents":
        self.vae.to(device)
        return self

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.scaled(self.code(images))

    def scaled(self, z: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b c h2 w2"]:
        """Returns x0 of what the autoencoder said."""
        return (z - self.vae.shift) * self.vae.scale

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        z = x0 / self.vae.scale + self.vae.shift
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([self.vae.decode(part) for part in z.float().split(self.at_once)])

    def blur(self, x0: Float[Tensor, "b c h2 w2"], spread: Float[Tensor, " b"]) -> Float[Tensor, "b c h2 w2"]:
        """Returns the latents under a Gaussian blur of standard deviation `spread`, in widths of the picture."""
        return blurred(x0, spread)

    def inside(self, region: Bool[Tensor, "h w"]) -> Bool[Tensor, "1 1 h2 w2"]:
        """Returns which positions of the latents lie in a region of the picture with all of their pixels."""
        return rearrange(region, "(h p) (w q) -> 1 1 h w (p q)", p=self.factor, q=self.factor).all(dim=-1)

    @torch.no_grad()
    def code(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Returns what the autoencoder says of pictures, unscaled."""
        # Never in half precision: Stable Diffusion's encoder overflows in float16, and latents are data.
        with torch.autocast(images.device.type, enabled=False):
            coded = [self.vae.encode(part) for part in images.float().split(self.at_once)]
        return torch.cat([z if isinstance(z, Tensor) else z.mean for z in coded])

    def measure(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        """Sees whether the autoencoder knows such pictures, by the first batch, and sets scale to one over the standard
        deviation of the pictures' latents, if it is still to be measured.

        Raises InputError (MD-SPACE-005) if it redraws them worse than `tolerance`, and NumericsError (MD-SPACE-003) if
        there is no scale: no pictures, or latents that are all alike.
        """
        batches = iter(batches)
        first = list(islice(batches, 1))
        if first and self.tolerance < math.inf:
            self._require_known(first[0])
        if not self.waiting:
            return
        count, total, squares = 0, 0.0, 0.0
        for images in chain(first, batches):
            z = self.code(images).cpu().double()  # Apple's GPUs have no float64
            count, total, squares = count + z.numel(), total + z.sum().item(), squares + z.square().sum().item()
        variance = squares / count - (total / count) ** 2 if count else 0.0
        if not 0 < variance < float("inf"):
            raise NumericsError(
                "MD-SPACE-003",
                f"The latents of {count} numbers have the variance {variance}, so they cannot be scaled to 1: there "
                "are no pictures, or the autoencoder answers all of them alike or with numbers that are not finite. "
                "Check that space.vae names trained weights, and that the pictures lie in [−1, 1].",
            )
        self.vae.scale, self.vae.shift, self.waiting = variance**-0.5, 0.0, False

    def _require_known(self, images: Float[Tensor, "_ 3 h w"]) -> None:
        error = (self.decode(self.encode(images)) - images).square().mean().sqrt().item()
        if not error <= self.tolerance:
            raise InputError(
                "MD-SPACE-005",
                f"The autoencoder redraws pictures of this data with an error of {error:.2f} (root mean square, "
                f"colours in [−1, 1]), where up to {self.tolerance:g} is usual for what it was trained on. So it does "
                "not know such pictures, and no model would ever draw them better. Train on pixels with space=pixels, "
                "or on the latents of an autoencoder for such pictures with space=latents space.vae=FOLDER.",
            )

    def state(self) -> dict:
        """Returns which autoencoder this is, and what turns its z into x0."""
        return {"autoencoder": self.identity, "scale": self.vae.scale, "shift": self.vae.shift}

    def restore(self, state: Mapping) -> None:
        """Takes scale and shift from a checkpoint; raises CheckpointError (MD-SPACE-004) for another autoencoder."""
        if state.get("autoencoder") != self.identity:
            raise CheckpointError(
                "MD-SPACE-004",
                f"The model was trained on the latents of the autoencoder {state.get('autoencoder')}, and "
                f"{self.identity} is what space.vae names now, so its latents would mean something else. Put the "
                "autoencoder's files back, or train again with this one.",
            )
        self.vae.scale, self.vae.shift, self.waiting = state["scale"], state["shift"], False


Space = Pixels | Latents


def blurred(x: Float[Tensor, "b c h w"], spread: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """Returns each map under a Gaussian blur of its own standard deviation `spread`, in widths of the map; 0 changes
    nothing. Near the border the mean is over what lies inside.
    """

    def weights(n: int) -> Float[Tensor, "b 1 n n"]:
        place = torch.arange(n, device=x.device) / x.shape[-1]
        distance = (place[:, None] - place) / spread.clamp(min=1e-6)[:, None, None]
        near = torch.exp(-0.5 * distance**2)
        return (near / near.sum(-1, keepdim=True))[:, None]

    with torch.autocast(x.device.type, enabled=False):  # x0 is data: never rounded to half precision
        soft = weights(x.shape[-2]) @ x @ weights(x.shape[-1]).mT
    return torch.where(spread[:, None, None, None] > 0, soft, x)

"""The space that diffusion runs in: pixels here, latents of an autoencoder elsewhere.

    x0 = space.encode(images)        images = space.decode(x0)

Images are (b, 3, h, w) in [−1, 1]. `space.shape` is the shape of one x0, which the network and the samplers work on.
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minidiff.errors import InputError


class Pixels:
    """The picture itself, its pixels grouped into patches: (3, h, w) ⇄ (3·patch², h/patch, w/patch).

    Grouping loses nothing and keeps white noise white, so this is diffusion on pixels; the network only starts at a
    resolution where small machines are fast (Hoogeboom et al. 2023, "simple diffusion", §3).
    """

    def __init__(self, image_size: int, patch: int = 1) -> None:
        if image_size % patch:
            low = image_size // patch * patch
            raise InputError(
                "MD-SPACE-001",
                f"image_size={image_size} cannot be cut into patches of {patch}×{patch} pixels (space.patch): it "
                f"must be a multiple of {patch}. The nearest sizes are {low or patch} and {low + patch}.",
            )
        self.image_size, self.patch = image_size, patch
        self.shape = (3 * patch**2, image_size // patch, image_size // patch)

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)

    def decode(self, x0: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        return rearrange(x0, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)

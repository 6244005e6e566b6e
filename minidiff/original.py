"""A picture to begin with: image to image, inpainting, outpainting.

    strength    the share of the steps that are taken, the last ones: the picture is noised to where they begin, and
                what this does not hide stays (SDEdit, Meng et al. 2022)
    keep        pixels that stay as they are: there every x0_hat is the given picture (`guidance.inpainted`), and the
                result is put together from both, so that none of them changes by a single grey level

Outpainting is inpainting of what the picture leaves transparent.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from minidiff.data import as_tensor, opaque, square
from minidiff.errors import InputError

WHITE = (255, 255, 255)
STRENGTH = 0.75  # of an image without a mask
OPAQUE = 128  # of 255: alpha from which a pixel stays; brightness of a mask from which it is drawn anew


@dataclass(frozen=True, kw_only=True)
class Original:
    """The picture that sampling begins with, in [−1, 1], and what is to become of it."""

    image: Float[Tensor, "3 h w"]
    keep: Bool[Tensor, "h w"] | None = None  # pixels that stay
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise InputError(
                "MD-SAMPLE-016",
                f"strength={self.strength} does not work: it is the share of the steps that are taken, more than 0 and "
                "at most 1 (all of them: without a mask, next to nothing of the picture is left).",
            )

    def last(self, times: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """Returns the times of the last steps, as many as `strength` says, but at least one."""
        steps = len(times) - 1
        return times[steps - max(1, round(self.strength * steps)) :]

    def over(self, drawn: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Returns drawn pictures with the pixels that stay put back."""
        return drawn if self.keep is None else torch.where(self.keep, self.image, drawn)


def prepare(
    image: Image.Image, image_size: int, *, mask: Image.Image | None = None, strength: float | None = None
) -> Original:
    """Returns a picture, scaled and cropped to a square as training pictures are, as what sampling begins with.

    `mask` is white where the picture is to be drawn anew; without one, this is where it is transparent. By default
    `strength` is 1 if pixels stay, else 0.75. Raises InputError (MD-SAMPLE-015) for a mask that does not fit.
    """
    pixels = as_tensor(square(opaque(image, WHITE), image_size)).float() / 127.5 - 1
    keep = opaque_pixels(image, image_size) if mask is None else black_pixels(mask, image, image_size)
    if strength is None:
        strength = STRENGTH if keep is None else 1.0
    return Original(image=pixels, keep=keep, strength=strength)


def opaque_pixels(image: Image.Image, image_size: int) -> Bool[Tensor, "h w"] | None:
    """Returns where a picture is opaque, or None if it is so everywhere."""
    if not image.has_transparency_data:
        return None
    alpha = square(image.convert("RGBA").getchannel("A"), image_size, Image.Resampling.BOX)
    keep = torch.from_numpy(np.array(alpha)) >= OPAQUE
    return None if keep.all() else keep


def black_pixels(mask: Image.Image, image: Image.Image, image_size: int) -> Bool[Tensor, "h w"]:
    """Returns where a mask is black; raises InputError (MD-SAMPLE-015) if it is so everywhere, or has another size than
    its picture.
    """
    if mask.size != image.size:
        raise InputError(
            "MD-SAMPLE-015",
            f"The mask has {mask.width}×{mask.height} pixels and the image {image.width}×{image.height}: the mask says "
            "of every pixel of the image whether it is drawn anew (white) or stays (black). Give it the same size.",
        )
    keep = torch.from_numpy(np.array(square(mask.convert("L"), image_size, Image.Resampling.BOX))) < OPAQUE
    if keep.all():
        raise InputError(
            "MD-SAMPLE-015",
            "The mask is black, so every pixel of the image stays and nothing is left to draw. Paint white what should "
            "be drawn anew.",
        )
    return keep

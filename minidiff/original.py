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
from PIL import Image, ImageOps
from torch import Tensor

from minidiff.errors import InputError

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
    size = (image_size, image_size)
    if mask is not None and mask.size != image.size:
        raise InputError(
            "MD-SAMPLE-015",
            f"The mask has {mask.width}×{mask.height} pixels and the image {image.width}×{image.height}: the mask says "
            "of every pixel of the image whether it is drawn anew (white) or stays (black). Give it the same size.",
        )
    keep = None
    if mask is not None:
        keep = np.asarray(ImageOps.fit(mask.convert("L"), size, Image.Resampling.BOX)) < OPAQUE
    elif image.has_transparency_data:
        keep = np.asarray(ImageOps.fit(image.convert("RGBA").getchannel("A"), size, Image.Resampling.BOX)) >= OPAQUE
    if keep is not None and keep.all():
        if mask is not None:
            raise InputError(
                "MD-SAMPLE-015",
                "The mask is black, so every pixel of the image stays and nothing is left to draw. Paint white what "
                "should be drawn anew.",
            )
        keep = None  # opaque after all
    strength = strength if strength is not None else STRENGTH if keep is None else 1.0
    pixels = np.asarray(ImageOps.fit(on_white(image), size, Image.Resampling.LANCZOS))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
    return Original(image=x, keep=None if keep is None else torch.from_numpy(keep), strength=strength)


def on_white(image: Image.Image) -> Image.Image:
    """Returns a picture in RGB, transparency shown on white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")

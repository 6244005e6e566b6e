"""A file from anywhere → a picture: RGB, upright, opaque, 8 bits; or the reason why not.

The header is judged before anything is decoded. Only common, maintained decoders of Pillow are open, chosen by content
and never by file name.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # larger pictures are refused from their header
MIN_SIDE = 4  # pixels; smaller ones would be blown up from nothing
MAX_ASPECT = 10  # a square cut from a longer strip shows little of it


class BadImage(ValueError):
    """A picture that cannot be used; the text says why."""


def load_image(
    source: Mapping | None, image_size: int, background: Sequence[int]
) -> UInt8[Tensor, "3 image_size image_size"]:
    """Decodes {"bytes", "path"}, shows transparency on `background`, scales the shorter side and crops the centre.

    Raises BadImage, whatever the reason.
    """
    return as_tensor(square(read_image(source, background), image_size))


def square(picture: Image.Image, size: int, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Scales the shorter side to `size` pixels and crops the centre."""
    return picture if picture.size == (size, size) else ImageOps.fit(picture, (size, size), resampling)


def opaque(picture: Image.Image, background: Sequence[int]) -> Image.Image:
    """Returns a picture in RGB, transparency shown on `background`."""
    if picture.has_transparency_data:
        sheet = Image.new("RGBA", picture.size, (*background, 255))
        picture = Image.alpha_composite(sheet, _in(picture, "RGBA"))
    return _in(picture, "RGB")


def as_tensor(picture: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """Returns the pixels of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_image(source: Mapping | None, background: Sequence[int]) -> Image.Image:
    """Returns the first frame in RGB, turned as EXIF says, on `background`; raises BadImage."""
    return opaque(read_transparent(source), background)


def read_transparent(source: Mapping | None) -> Image.Image:
    """Returns the first frame, turned as EXIF says, in RGBA if it has transparency and else in RGB; raises BadImage."""
    if source is None or not (source.get("bytes") or source.get("path")):
        raise BadImage("there is no image")
    file = io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we draw the line lower, below
            with Image.open(file, formats=FORMATS) as opened:
                _judge_header(*opened.size)
                ImageOps.exif_transpose(opened, in_place=True)
                opened.load()
                return _to_eight_bits(opened)
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not a picture in {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # on damaged bytes, decoders raise anything from OSError to struct.error
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _judge_header(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels ({width}×{height})")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"too small ({width}×{height})")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"too long for its width ({width}×{height})")


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if picture.mode[0] in "IF":  # 16 or 32 bits, or floats; Pillow itself would clip them to white
        return Image.fromarray(_eight_bits(np.asarray(picture), picture.mode)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
    elif picture.mode == "P":
        picture = picture.convert("RGB")
    picture = _to_srgb(picture, profile)
    return picture if picture.mode == "RGBA" else _in(picture, "RGB")


def _in(picture: Image.Image, mode: str) -> Image.Image:
    """Converts to a mode; Pillow would copy a picture that has it already."""
    return picture if picture.mode == mode else picture.convert(mode)


def _eight_bits(x: np.ndarray, mode: str) -> np.ndarray:
    """Scales grey values by the range that they declare: 16 bits, [0, 1] for floats, else from least to largest."""
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise BadImage("pixels that are not finite")
    low, high = x.min(), x.max()
    if mode.startswith("I") and low >= 0 and high <= 65535:
        low, high = 0, 65535
    elif mode == "F" and low >= 0 and high <= 1:
        low, high = 0, 1
    return ((x - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts by the colour profile that came with the picture; one that is broken or does not fit is ignored."""
    if profile is None and picture.mode != "LAB":
        return picture
    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    try:
        return ImageCms.applyTransform(picture, _transform(profile, picture.mode, mode))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture


@lru_cache(maxsize=16)  # most pictures of a data set share a few profiles
def _transform(profile: bytes | None, mode: str, to: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.createProfile("LAB") if profile is None else ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, to)

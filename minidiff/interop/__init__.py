"""The ecosystem's files ⇄ our models, without importing diffusers: same weights, same numbers, other names."""

from minidiff.interop.unet import load_unet, save_unet

__all__ = ["load_unet", "save_unet"]

"""The ecosystem's files ⇄ our models, without importing diffusers: same weights, same numbers, other names."""

from minidiff.interop.lora import load_lora, save_lora
from minidiff.interop.tiny_vae import load_pair as load_tiny_vae
from minidiff.interop.unet import load_unet, save_unet
from minidiff.interop.vae import load_vae, save_vae

__all__ = ["load_lora", "load_tiny_vae", "load_unet", "load_vae", "save_lora", "save_unet", "save_vae"]

"""The ecosystem's folders ⇄ our models, without importing diffusers: same weights, same numbers, other names."""

from minidiff.interop.lora import load_lora, save_lora
from minidiff.interop.pipeline import is_pipeline, load_pipeline, save_pipeline
from minidiff.interop.scheduler import load_scheduler, save_scheduler
from minidiff.interop.text import load_text, save_text
from minidiff.interop.tiny_vae import load_pair as load_tiny_vae
from minidiff.interop.unet import load_unet, save_unet
from minidiff.interop.vae import load_latents, load_tiny_latents, load_vae, save_vae

__all__ = [
    "is_pipeline",
    "load_latents",
    "load_lora",
    "load_pipeline",
    "load_scheduler",
    "load_text",
    "load_tiny_latents",
    "load_tiny_vae",
    "load_unet",
    "load_vae",
    "save_lora",
    "save_pipeline",
    "save_scheduler",
    "save_text",
    "save_unet",
    "save_vae",
]

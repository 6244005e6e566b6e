"""Stable Diffusion's autoencoder: a folder of diffusers' `AutoencoderKL` ⇄ our `VAE`; tiny ones: `tiny_vae`."""

from pathlib import Path

import torch
from torch import nn

from minidiff.errors import InputError
from minidiff.interop import tiny_vae
from minidiff.interop.folder import (
    WEIGHTS,
    Rules,
    listed,
    load_into,
    named_as_theirs,
    read_class,
    read_config,
    read_weights,
    require_supported,
    translate,
    write,
)
from minidiff.nn.tiny_vae import TinyVAE
from minidiff.nn.vae import VAE, MapAttention
from minidiff.resources import bundled
from minidiff.space import Latents

RULES: Rules = (
    (r"\bstem\b", "conv_in"),
    (r"\bhead_norm\b", "conv_norm_out"),
    (r"\bhead\b", "conv_out"),
    (r"\b(down|up)\.(\d+)\.\d+\.conv\b", r"\1_blocks.\2.\1samplers.0.conv"),
    (r"\b(down|up)\.(\d+)\.(\d+)\b", r"\1_blocks.\2.resnets.\3"),
    (r"\bmid\.0\b", "mid_block.resnets.0"),
    (r"\bmid\.1\b", "mid_block.attentions.0"),
    (r"\bmid\.2\b", "mid_block.resnets.1"),
    (r"\bskip\b", "conv_shortcut"),
    (r"(?<=attentions\.0)\.norm\b", ".group_norm"),
    (r"\bqkv\b", "[to_q to_k to_v]"),
    (r"\bout\b", "to_out.0"),
    (r"^quant\b", "quant_conv"),
    (r"^post_quant\b", "post_quant_conv"),
)
# Theirs of 2022 → theirs of today, in the attention; the first Stable Diffusion's VAE is still published so.
RENAMED: Rules = (
    (r"(?<=attentions\.0)\.query\b", ".to_q"),
    (r"(?<=attentions\.0)\.key\b", ".to_k"),
    (r"(?<=attentions\.0)\.value\b", ".to_v"),
    (r"(?<=attentions\.0)\.proj_attn\b", ".to_out.0"),
)
TOLERANCE = 0.1  # root mean square, of the bundled autoencoder; its own world it redraws with 0.03
DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "sample_size": 32,  # this and the next do not change what fp32 weights compute
    "force_upcast": True,
}
ACCEPTED = {
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}


def load_vae(path: str | Path) -> VAE | TinyVAE:
    """Returns the autoencoder at `path`, in float32, on the CPU.

    `path` is a folder in the layout of diffusers' `AutoencoderKL` or `AutoencoderTiny`, a folder with a pair of TAESD's
    files (`…encoder.safetensors` and `…decoder.safetensors`), or one file with both under diffusers' names. Raises
    `InputError` that names what we cannot build, and `CheckpointError` for files that are missing, damaged, pickles,
    or another model's.
    """
    path = Path(path)
    if path.is_file():
        return tiny_vae.load_file(path)
    pair = [sorted(path.glob(f"*{part}.safetensors")) for part in ("encoder", "decoder")]
    if not (path / "config.json").is_file() and all(len(x) == 1 for x in pair):
        return tiny_vae.load_pair(pair[0][0], pair[1][0])
    return tiny_vae.load_folder(path) if read_class(path) == "AutoencoderTiny" else _load(path)


def load_latents(vae: str, image_size: int, measured: bool = False) -> Latents:
    """Returns the latents of the autoencoder at the path `vae`, to train in: what `space=latents` builds.

    `measured`: the scale is measured on the training pictures instead of taken from the autoencoder. Raises as
    `load_vae` and `Latents` do.
    """
    return Latents(load_vae(vae), image_size, measured=measured)


def load_tiny_latents(image_size: int) -> Latents:
    """Returns the latents of the bundled autoencoder, which knows the shapes world at 32×32 pixels and nothing else."""
    return Latents(load_vae(bundled("vae_shapes")), image_size, tolerance=TOLERANCE)


def save_vae(vae: VAE | TinyVAE, folder: str | Path) -> None:
    """Writes `vae` so that `load_vae` and diffusers can read it, in float32.

    A `TinyVAE` with `pool` has no place in diffusers and is written as TAESD's pair of files.
    """
    if isinstance(vae, TinyVAE):
        tiny_vae.save(vae, folder)
    else:
        write(folder, {WEIGHTS: named_as_theirs(vae.state_dict(), RULES)}, _describe(vae))


def _load(folder: Path) -> VAE:
    config = read_config(folder, "AutoencoderKL", DEFAULTS, ACCEPTED)
    levels = len(listed(config["block_out_channels"]))
    types = (config["down_block_types"], config["up_block_types"])
    require_supported(
        [
            f"{len(x)} blocks {x[:1]} (only one per level, of which there are {levels})"
            for x in types
            if len(x) != levels
        ],
        folder / "config.json",
    )
    try:
        with torch.device("meta"):
            vae = VAE(
                in_channels=config["in_channels"],
                out_channels=config["out_channels"],
                latent_channels=config["latent_channels"],
                channels=config["block_out_channels"],
                layers=config["layers_per_block"],
                groups=config["norm_num_groups"],
                attend=config["mid_block_add_attention"],
                quant=config["use_quant_conv"],
                post_quant=config["use_post_quant_conv"],
                scale=float(config["scaling_factor"]),
                shift=float(config["shift_factor"] or 0),
            )
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise InputError(
            "MD-INTEROP-010",
            f"{folder / 'config.json'} does not describe an autoencoder ({error}). Take it from the same place as the "
            "weights.",
        ) from error
    tensors = {translate(name, RENAMED)[0]: x for name, x in read_weights(folder).items()}
    load_into(vae, tensors, RULES, folder)
    return vae


def _describe(vae: VAE) -> dict:
    encoder, levels = vae.encoder, len(vae.encoder.down)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": encoder.stem.in_channels,
        "out_channels": vae.decoder.head.out_channels,
        "latent_channels": vae.latent_channels,
        "block_out_channels": [level[0].conv1.out_channels for level in encoder.down],
        "layers_per_block": len(encoder.down[-1]),  # which ends without a change of resolution
        "norm_num_groups": encoder.head_norm.num_groups,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": isinstance(encoder.mid[1], MapAttention),
        "use_quant_conv": not isinstance(vae.quant, nn.Identity),
        "use_post_quant_conv": not isinstance(vae.post_quant, nn.Identity),
        "scaling_factor": vae.scale,
        "shift_factor": vae.shift or None,
    }

"""Autoencoders: folders of diffusers' `AutoencoderKL` and `AutoencoderTiny`, and the files of TAESD ⇄ ours."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.errors import CheckpointError, InputError
from minidiff.interop.folder import (
    WEIGHTS,
    Rules,
    listed,
    load_into,
    named_as_theirs,
    read_class,
    read_config,
    read_file,
    read_weights,
    require_supported,
    translate,
    write,
)
from minidiff.nn.tiny_vae import TinyVAE
from minidiff.nn.vae import VAE, MapAttention

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

# TAESD: only the place of the numbers differs; diffusers' decoder does not count the clamp.
TINY_RULES: Rules = (
    (r"^encoder\.", "encoder.layers."),
    (r"^decoder\.(\d+)", lambda found: f"decoder.layers.{int(found[1]) - 1}"),
)
TINY_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "latent_magnitude": 3,  # this and the next are of a way to store latents in bytes
    "latent_shift": 0.5,
    "force_upcast": False,
}
TINY_ACCEPTED = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}


def load_vae(path: str | Path) -> VAE | TinyVAE:
    """Returns the autoencoder at `path`, in float32, on the CPU.

    `path` is a folder in the layout of diffusers' `AutoencoderKL` or `AutoencoderTiny`, a folder with a pair of TAESD's
    files (`…encoder.safetensors` and `…decoder.safetensors`), or one file with both under diffusers' names. Raises
    `InputError` that names what we cannot build, and `CheckpointError` for files that are missing, damaged, pickles,
    or another model's.
    """
    path = Path(path)
    if path.is_file():
        tensors = {_plain(name): x for name, x in read_file(path).items()}
        return _load_tiny(tensors, path)
    pair = [sorted(path.glob(f"*{part}.safetensors")) for part in ("encoder", "decoder")]
    if not (path / "config.json").is_file() and all(len(x) == 1 for x in pair):
        return load_tiny_vae(pair[0][0], pair[1][0])
    return _load_tiny_folder(path) if read_class(path) == "AutoencoderTiny" else _load_kl(path)


def load_tiny_vae(encoder: str | Path, decoder: str | Path) -> TinyVAE:
    """Returns the autoencoder of two files with the names of github.com/madebyollin/taesd; see `load_vae`."""
    files = {"encoder": Path(encoder), "decoder": Path(decoder)}
    tensors = {f"{part}.{name}": x for part, file in files.items() for name, x in read_file(file).items()}
    return _load_tiny(tensors, f"{encoder} and {decoder}")


def save_vae(vae: VAE | TinyVAE, folder: str | Path) -> None:
    """Writes `vae` so that `load_vae` and diffusers can read it, in float32.

    A `TinyVAE` with `pool` has no place in diffusers and is written as TAESD's pair of files.
    """
    if isinstance(vae, VAE):
        write(folder, {WEIGHTS: named_as_theirs(vae.state_dict(), RULES)}, _describe(vae))
    elif not vae.pool:
        write(folder, {WEIGHTS: named_as_theirs(vae.state_dict(), TINY_RULES)}, _describe_tiny(vae))
    else:
        parts = {"encoder.safetensors": vae.encoder, "decoder.safetensors": vae.decoder}
        write(folder, {name: part.state_dict() for name, part in parts.items()})


def _load_kl(folder: Path) -> VAE:
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
        raise _senseless(folder, error) from error
    tensors = {_translate(name, RENAMED): x for name, x in read_weights(folder).items()}
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


def _load_tiny_folder(folder: Path) -> TinyVAE:
    config = read_config(folder, "AutoencoderTiny", TINY_DEFAULTS, TINY_ACCEPTED)
    widths = listed(config["encoder_block_out_channels"]) + listed(config["decoder_block_out_channels"])
    require_supported(
        [] if len(set(widths)) == 1 else [f"…_block_out_channels={widths} (only one width)"], folder / "config.json"
    )
    try:
        with torch.device("meta"):
            vae = TinyVAE(
                latent_channels=config["latent_channels"],
                channels=widths[0],
                encoder_blocks=config["num_encoder_blocks"],
                decoder_blocks=config["num_decoder_blocks"],
                in_channels=config["in_channels"],
                out_channels=config["out_channels"],
                scale=float(config["scaling_factor"]),
                shift=float(config["shift_factor"] or 0),
            )
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise _senseless(folder, error) from error
    load_into(vae, read_weights(folder), TINY_RULES, folder)
    return vae


def _load_tiny(tensors: Mapping[str, Tensor], source: str | Path) -> TinyVAE:
    """Builds the autoencoder from the shapes of its tensors, which TAESD's files say nothing else about."""
    try:
        first, last = tensors["encoder.0.weight"], tensors[f"encoder.{_convs(tensors, 'encoder')[-1]}.weight"]
        image = tensors[f"decoder.{_convs(tensors, 'decoder')[-1]}.weight"]
        with torch.device("meta"):
            vae = TinyVAE(
                latent_channels=last.shape[0],
                channels=first.shape[0],
                encoder_blocks=_blocks(tensors, "encoder"),
                decoder_blocks=_blocks(tensors, "decoder"),
                pool=any(".pool." in name for name in tensors),
                in_channels=first.shape[1],
                out_channels=image.shape[0],
            )
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            "MD-INTEROP-009",
            f"{source} does not hold an encoder and a decoder of the TAESD family (no {error}); its tensors are "
            f"{', '.join(list(tensors)[:5]) or 'none'}. Name a folder with config.json, or TAESD's pair of files.",
        ) from error
    load_into(vae, tensors, (), source)
    return vae


def _convs(tensors: Iterable[str], part: str) -> list[int]:
    """Returns the numbers of the plain convolutions: first, changes of resolution, last."""
    return sorted(int(found[1]) for name in tensors if (found := re.match(rf"{part}\.(\d+)\.weight$", name)))


def _blocks(tensors: Iterable[str], part: str) -> list[int]:
    """Returns how many blocks lie between one plain convolution and the next."""
    blocks = [int(found[1]) for name in tensors if (found := re.match(rf"{part}\.(\d+)\.conv\.0\.weight$", name))]
    return [sum(a < block < b for block in blocks) for a, b in pairwise(_convs(tensors, part))]


def _plain(name: str) -> str:
    """Returns TAESD's own name for one of diffusers'."""
    found = re.match(r"(encoder|decoder)\.layers\.(\d+)\.(.*)", name)
    return name if found is None else f"{found[1]}.{int(found[2]) + (found[1] == 'decoder')}.{found[3]}"


def _describe_tiny(vae: TinyVAE) -> dict:
    channels = vae.encoder[0].out_channels
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": vae.encoder[0].in_channels,
        "out_channels": vae.decoder[-1].out_channels,
        "latent_channels": vae.latent_channels,
        "encoder_block_out_channels": [channels] * len(vae.encoder_blocks),
        "decoder_block_out_channels": [channels] * len(vae.decoder_blocks),
        "num_encoder_blocks": vae.encoder_blocks,
        "num_decoder_blocks": vae.decoder_blocks,
        "scaling_factor": vae.scale,
        "shift_factor": vae.shift,
    }


def _translate(name: str, rules: Rules) -> str:
    return translate(name, rules)[0]


def _senseless(folder: Path, error: Exception) -> InputError:
    return InputError(
        "MD-INTEROP-010",
        f"{folder / 'config.json'} does not describe an autoencoder ({error}). Take it from the same place as the "
        "weights.",
    )

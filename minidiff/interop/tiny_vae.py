"""Tiny autoencoders: folders of diffusers' `AutoencoderTiny`, and the files of github.com/madebyollin/taesd ⇄ ours."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from minidiff.errors import CheckpointError, InputError
from minidiff.interop.folder import (
    WEIGHTS,
    Rules,
    listed,
    load_into,
    named_as_theirs,
    read_config,
    read_file,
    read_weights,
    require_supported,
    write,
)
from minidiff.nn.tiny_vae import TinyVAE

# Only the place of the numbers differs: diffusers' decoder does not count the clamp.
RULES: Rules = (
    (r"^encoder\.", "encoder.layers."),
    (r"^decoder\.(\d+)", lambda found: f"decoder.layers.{int(found[1]) - 1}"),
)
DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "latent_magnitude": 3,  # these do not change what fp32 weights compute
    "latent_shift": 0.5,
    "force_upcast": False,
    "block_out_channels": None,
}
ACCEPTED = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}


def load_folder(folder: Path) -> TinyVAE:
    """Returns the autoencoder of a folder in the layout of diffusers; see `minidiff.interop.load_vae`."""
    config = read_config(folder, "AutoencoderTiny", DEFAULTS, ACCEPTED)
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
        raise InputError(
            "MD-INTEROP-013",
            f"{folder / 'config.json'} does not describe an autoencoder ({error}). Take it from the same place as the "
            "weights.",
        ) from error
    load_into(vae, read_weights(folder), RULES, folder)
    return vae


def load_pair(encoder: str | Path, decoder: str | Path) -> TinyVAE:
    """Returns the autoencoder of TAESD's two files; see `minidiff.interop.load_vae`."""
    files = {"encoder": Path(encoder), "decoder": Path(decoder)}
    tensors = {f"{part}.{name}": x for part, file in files.items() for name, x in read_file(file).items()}
    return _build(tensors, f"{encoder} and {decoder}")


def load_file(file: Path) -> TinyVAE:
    """Returns the autoencoder of one file with diffusers' names; see `minidiff.interop.load_vae`."""
    return _build({_plain(name): x for name, x in read_file(file).items()}, file)


def save(vae: TinyVAE, folder: str | Path) -> None:
    """Writes a folder in the layout of diffusers, or with `pool`, which diffusers does not know, TAESD's two files."""
    if vae.pool:
        parts = {"encoder.safetensors": vae.encoder, "decoder.safetensors": vae.decoder}
        write(folder, {name: part.state_dict() for name, part in parts.items()})
    else:
        write(folder, {WEIGHTS: named_as_theirs(vae.state_dict(), RULES)}, _describe(vae))


def _build(tensors: Mapping[str, Tensor], source: str | Path) -> TinyVAE:
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


def _describe(vae: TinyVAE) -> dict:
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

"""Whole Stable Diffusion folders ⇄ our `Pipeline`: the parts that the other rooms read, and how they fit together.

    FOLDER/  model_index.json  unet/  vae/  scheduler/  text_encoder/  tokenizer/          (StableDiffusionPipeline)

Stable Diffusion 1 and 2 and what was made from them load; a safety checker and its feature extractor are left out. The
folder keeps weights and the noise schedule, but not how to sample: steps and guidance are those that diffusers'
pipeline starts with.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from minidiff.denoiser import Denoiser
from minidiff.errors import CheckpointError, InputError, MachineError
from minidiff.interop import scheduler as schedulers
from minidiff.interop import unet as unets
from minidiff.interop.folder import read_object
from minidiff.interop.scheduler import Scheduler, load_scheduler, save_scheduler
from minidiff.interop.text import PLAIN, PROJECTED, load_text, save_text
from minidiff.interop.unet import load_unet, save_unet
from minidiff.interop.vae import load_vae, save_vae
from minidiff.nn.tiny_vae import TinyVAE
from minidiff.nn.unet import UNet
from minidiff.nn.vae import VAE
from minidiff.objective import Uniform
from minidiff.pipeline import Pipeline, Sampling
from minidiff.space import Latents
from minidiff.text import Tower

INDEX = "model_index.json"
CLASS = "StableDiffusionPipeline"
STEPS, GUIDANCE = 50, 7.5  # what StableDiffusionPipeline takes if it is not told
# The classes that each part may have. What may be absent and is not used comes after.
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "scheduler": tuple(schedulers.SETTINGS),
    "text_encoder": (PLAIN, PROJECTED),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
UNUSED = ("safety_checker", "feature_extractor")


def is_pipeline(path: str | Path) -> bool:
    """Returns whether a path is the folder of a whole pipeline in the ecosystem's layout."""
    return (Path(path) / INDEX).is_file()


def load_pipeline(folder: str | Path) -> Pipeline:
    """Returns a Stable Diffusion folder as a `Pipeline`, in float32, on the CPU.

    It draws what diffusers' StableDiffusionPipeline draws from the same noise: pictures are as large as the UNet's
    sample_size says, x0_hat is not clipped and timesteps are offset by 1 whatever the scheduler's file says, as there.

    Raises CheckpointError for a folder that is not whole (MD-INTEROP-405) and for damaged weights, and InputError for
    another class of pipeline or of a part (-406), for parts that do not go together (-407) and for what each part's
    own loader refuses. If several parts are refused, one message (-408) holds all of it.

    A LoRA goes on top, for a while or for good:

        pipe = load_pipeline(FOLDER)
        lora = load_lora(FILE, pipe.denoiser.net)
        with lora.attached(pipe.denoiser.net, scale=0.8):
            images = pipe("a small red boat")
    """
    folder = Path(folder)
    _check_index(folder)
    parts = {
        "scheduler": lambda: load_scheduler(folder / "scheduler"),
        "text": lambda: load_text(folder, pooled=False),
        "vae": lambda: load_vae(folder / "vae"),
        "net": lambda: load_unet(folder / "unet"),
    }
    loaded = _all_or_none(folder, parts)
    size = read_object(folder / "unet" / "config.json").get("sample_size")
    _check_fit(folder, loaded["net"], loaded["vae"], loaded["text"], size)
    process, objective, sampler, grid, _ = _as_the_pipeline_does(loaded["scheduler"])
    pipe = Pipeline(
        Denoiser(loaded["net"], process, objective, Uniform()).eval().requires_grad_(False),
        Latents(loaded["vae"], size * loaded["vae"].factor),
        loaded["text"],
        Sampling(sampler=sampler, grid=grid, steps=STEPS, guidance=GUIDANCE, threshold=1.0),
    )
    pipe.name = folder.resolve().name
    return pipe


def save_pipeline(pipe: Pipeline, folder: str | Path) -> None:
    """Writes a pipeline so that `load_pipeline` and diffusers' StableDiffusionPipeline.from_pretrained read it.

    How to sample besides the scheduler (steps, guidance) has no place there. Raises InputError (MD-INTEROP-409) that
    names everything in the pipeline that has no counterpart, before anything is written, and MachineError if the disk
    refuses.
    """
    folder, net = Path(folder), pipe.denoiser.net
    how = pipe.sampling
    scheduler = Scheduler(pipe.denoiser.process, pipe.denoiser.objective, how.sampler, how.grid, clip=False)
    _check_counterparts(pipe, scheduler)
    save_unet(net, folder / "unet", sample_size=pipe.space.shape[1])
    save_vae(pipe.space.vae, folder / "vae")
    save_text(pipe.text, folder)
    save_scheduler(scheduler, folder / "scheduler")
    index = {
        "_class_name": CLASS,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny" if isinstance(pipe.space.vae, TinyVAE) else "AutoencoderKL"],
        "scheduler": ["diffusers", schedulers.describe(scheduler)["_class_name"]],
        "text_encoder": ["transformers", PLAIN if pipe.text.shape.projection is None else PROJECTED],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "requires_safety_checker": False,
    } | {name: [None, None] for name in (*UNUSED, "image_encoder")}
    try:  # last, and at once: a folder with an index is whole
        (folder / f".tmp-{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        os.replace(folder / f".tmp-{INDEX}", folder / INDEX)
    except OSError as error:
        raise MachineError(
            "MD-INTEROP-410", f"Cannot write {folder / INDEX}: {error}. Free some disk space, or check the permissions."
        ) from error


# ------------------------------------------------------------------------------------------------------- loading


def _check_index(folder: Path) -> None:
    """Raises unless model_index.json names the class and the parts that we have, and the parts are there."""
    if not is_pipeline(folder):
        there = ", ".join(sorted(x.name for x in folder.glob("*"))[:10]) or "nothing"
        raise _not_whole(folder, f"it has no {INDEX} (there is: {there})")
    index = read_object(folder / INDEX)
    named = {key: x[1] for key, x in index.items() if isinstance(x, list) and len(x) == 2 and x[1] is not None}
    flaws = [] if index.get("_class_name") == CLASS else [f"_class_name={index.get('_class_name')!r} (only {CLASS!r})"]
    flaws += [
        f"{part}={named[part]!r} (only {' or '.join(classes)})"
        for part, classes in PARTS.items()
        if part in named and named[part] not in classes
    ]
    flaws += [f"{part}={named[part]!r} (no such part)" for part in named.keys() - PARTS.keys() - {*UNUSED}]
    if flaws:
        raise InputError(
            "MD-INTEROP-406",
            f"{folder / INDEX} describes a pipeline that minidiff does not have: {'; '.join(sorted(flaws))}. It loads "
            "Stable Diffusion 1 and 2 (text to image). Open this one with diffusers, or load its parts with "
            "minidiff.interop (load_unet, load_vae).",
        )
    if absent := [part for part in PARTS if part not in named or not (folder / part).is_dir()]:
        raise _not_whole(folder, f"it has no {', no '.join(absent)}")
    if "safety_checker" in named:
        warnings.warn(
            f"{folder} has a safety checker, which minidiff does not run: look at the pictures yourself before you "
            "show them to others.",
            stacklevel=3,
        )


def _not_whole(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "MD-INTEROP-405",
        f"{folder} is not a whole pipeline in the layout of diffusers: {why}. It should hold {INDEX}, "
        f"{', '.join(PARTS)}. Copy or download the folder again, all of it.",
    )


def _all_or_none(folder: Path, steps: Mapping[str, Callable]) -> dict:
    """Runs every step, and raises what is refused: one refusal as it is, several in one message."""
    results, refused = {}, []
    for name, step in steps.items():
        try:
            results[name] = step()
        except InputError as error:
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise InputError("MD-INTEROP-408", f"Several parts of {folder} are refused. {' '.join(map(str, refused))}")
    return results


def _check_fit(folder: Path, net: UNet, vae: VAE | TinyVAE, text: Tower, size: object) -> None:
    config = unets.describe(net)
    channels, width = config["in_channels"], config["cross_attention_dim"]
    vector = config["projection_class_embeddings_input_dim"]
    rules = {
        f"unet: sample_size={size!r}, which must be a whole number": isinstance(size, int) and size > 0,
        f"unet: in_channels={channels} and out_channels={config['out_channels']}, but the vae's latents have "
        f"{vae.latent_channels}": channels == config["out_channels"] == vae.latent_channels,
        f"unet: cross_attention_dim={width}, but the text encoder's tokens have {text.token_dim} numbers": width
        == text.token_dim,
        f"unet: projection_class_embeddings_input_dim={vector}, a vector that {CLASS} does not give": vector is None,
        f"vae: shift_factor={vae.shift}, which {CLASS} leaves out": vae.shift == 0,
    }
    if flaws := [flaw for flaw, holds in rules.items() if not holds]:
        raise InputError(
            "MD-INTEROP-407",
            f"The parts of {folder} do not make a {CLASS}: {'; '.join(flaws)}. Parts of different models do not work "
            "together; copy all of them from the same place. Each alone loads with minidiff.interop.",
        )


def _as_the_pipeline_does(scheduler: Scheduler) -> Scheduler:
    """Returns what diffusers' pipeline makes of its scheduler: an offset of 1, and no clipping of latents."""
    grid = scheduler.grid
    if isinstance(grid, partial) and "offset" in grid.keywords:
        grid = partial(grid.func, **grid.keywords | {"offset": 1})
    return scheduler._replace(grid=grid, clip=False)


# -------------------------------------------------------------------------------------------------------- saving


def _check_counterparts(pipe: Pipeline, scheduler: Scheduler) -> None:
    """Raises one error with everything in a pipeline that diffusers' cannot express."""
    latents, text, how = isinstance(pipe.space, Latents), pipe.text, pipe.sampling
    rules = {
        "space: pixels, where Stable Diffusion has the latents of an autoencoder (train with space=latents)": latents,
        "space: an autoencoder with `pool`, as TAEF2 has it": not (latents and getattr(pipe.space.vae, "pool", False)),
        "space: a shift of the latents": not latents or pipe.space.vae.shift == 0,
        "text: an OpenCLIP encoder with its mask (train with text=folder)": isinstance(text, Tower),
        "net: a port for the caption's vector": pipe.denoiser.net.time.vector is None,
        "sampling: low, high or threshold": (how.low, how.high) == (0, 1) and (how.threshold or 0) >= 1,
        "sampling: candidates": how.candidates == 1,
        "sampling: a grid `leading` whose offset is not 1": schedulers.same(
            _as_the_pipeline_does(scheduler), scheduler
        ),
    }
    flaws = [flaw for flaw, holds in rules.items() if not holds]
    for describe in (lambda: unets.describe(pipe.denoiser.net), lambda: schedulers.describe(scheduler)):
        try:
            describe()
        except InputError as error:
            flaws.append(str(error))
    if flaws:
        raise InputError(
            "MD-INTEROP-409",
            f"This pipeline has no counterpart in the ecosystem, because of {'; '.join(flaws)} Nothing was written. "
            "Save what has one (save_unet, save_vae, save_text), or replace the setting: "
            "pipe.sampling = pipe.sampling.but(…).",
        )

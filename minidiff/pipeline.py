"""Prompt → picture: everything that sampling needs, in one object.

    prompt ──text──► cond ─┐
    seed ──► xT ──sampler(guided denoiser, times)──► x0 ──space.decode──► image

Every image owns its seed: the noise it starts from and all noise that a stochastic sampler adds come from one CPU
generator per image, so a picture does not depend on its batch, on the order of prompts, or on the device beyond
rounding.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from minidiff import checkpoint, guidance
from minidiff.cond import Cond
from minidiff.config import build
from minidiff.denoiser import Denoiser
from minidiff.errors import CheckpointError, InputError
from minidiff.machine import compile_network, resolve_device, resolve_precision
from minidiff.nn.packed import packed
from minidiff.objective import Objective
from minidiff.original import Original, prepare
from minidiff.process import Process
from minidiff.samplers import State
from minidiff.seeds import generator
from minidiff.space import Space
from minidiff.state import load_model
from minidiff.text import Agreement, TextEncoder


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. A run keeps its own settings; a call may replace any of them."""

    sampler: Callable  # of minidiff.samplers
    grid: Callable  # (process, steps) -> times
    steps: int  # of the sampler; each costs two network evaluations with guidance, one without
    guidance: float  # w in uncond + w·(cond − uncond)
    rescale: float = 0.0  # of guidance (Lin et al. 2023)
    low: float = 0.0  # guidance acts for t in [low, high] only (Kynkäänniemi et al. 2024)
    high: float = 1.0
    threshold: float | None = None  # percentile of dynamic thresholding; None: clamp to [−1, 1]; ≥ 1: neither
    candidates: int = 1  # drawn for every picture; the one that OpenCLIP finds to fit its prompt best is kept

    def __post_init__(self) -> None:
        def demand(holds: bool, name: str, must: str) -> None:
            if not holds:
                raise InputError(
                    "MD-SAMPLE-001", f"{name}={getattr(self, name)} does not work for sampling: it must be {must}."
                )

        demand(1 <= self.steps <= 10_000, "steps", "a whole number from 1 to 10000")
        demand(
            -100 <= self.guidance <= 100, "guidance", "a number from -100 to 100 (1: no guidance, 0: ignore the prompt)"
        )
        demand(0 <= self.rescale <= 1, "rescale", "between 0 and 1")
        demand(0 <= self.low <= self.high <= 1, "low", "at least 0 and at most high, which is at most 1")
        demand(self.threshold is None or self.threshold > 0, "threshold", "null or positive")
        demand(1 <= self.candidates <= 10_000, "candidates", "a whole number from 1 to 10000")

    def but(self, **changes: object) -> "Sampling":
        """Returns these settings with those that are given, and not None, replaced."""
        unknown = changes.keys() - {f.name for f in fields(self)}
        if unknown:
            raise TypeError(f"sampling has no setting {sorted(unknown)}; it has {[f.name for f in fields(self)]}")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


class Snapshot(NamedTuple):
    """One state of one picture on its way: tensors without a batch dimension; `image` shows x0_hat, the picture as the
    network sees it.
    """

    t: float
    xt: Float[Tensor, "c h w"]
    x0_hat: Float[Tensor, "c h w"]
    eps_hat: Float[Tensor, "c h w"]
    image: Image.Image


class Pipeline:
    """A trained model ready to be prompted. Made by `assemble` for training and by `load` from a run."""

    def __init__(self, denoiser: Denoiser, space: Space, text: TextEncoder, sampling: Sampling) -> None:
        self.denoiser, self.space, self.text, self.sampling = denoiser, space, text, sampling
        self.precision = "fp32"  # of the network while sampling
        self.vocabulary: frozenset[str] = frozenset()  # words of the training captions
        self.name = ""  # of the run and checkpoint, for the metadata of pictures
        self._agreement: Agreement | None = None  # made when there is something to choose from

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device | str) -> "Pipeline":
        self.denoiser.to(device)
        self.space.to(device)
        self.text.to(device)
        self._agreement = None  # is made where the encoder is
        return self

    def compute(self, precision: str = "fp32", compile: bool | str = False) -> str:
        """Chooses how the network computes when sampling: `precision` auto, fp32, bf16 or fp16, compiled or not;
        returns what was chosen, in words.

        fp32 is exact: a picture is the same in every batch. Half precision moves pixels a little, and compiling takes
        a minute or more for every new number of pictures at once, which pays when there are many of each.
        """
        self.precision = resolve_precision(precision, self.device)
        return f"{self.precision}, {compile_network(self.denoiser.net, compile, self.device)}"

    def __call__(
        self,
        prompt: str,
        *,
        negative: str = "",
        seed: int = 0,
        n: int = 1,
        original: Original | None = None,
        **settings: object,
    ) -> list[Image.Image]:
        """Returns `n` pictures of a prompt, with the seeds seed, seed + 1, …; `original` is a picture to begin with
        (`pipe.original`), and `settings` replace fields of `Sampling`.
        """
        seeds = list(range(seed, seed + n))
        images = self.sample([prompt] * n, seeds, negative=negative, original=original, **settings)
        return [to_pil(image) for image in images]

    def original(
        self, image: Image.Image, *, mask: Image.Image | None = None, strength: float | None = None
    ) -> Original:
        """Returns a picture to begin with, in the size of this model: see `minidiff.original`."""
        return prepare(image, self.space.image_size, mask=mask, strength=strength)

    def steps(
        self, prompt: str, *, negative: str = "", seed: int = 0, original: Original | None = None, **settings: object
    ) -> Iterator[Snapshot]:
        """Yields every state of one picture (the first candidate), from pure noise (t = 1), or from the noisy
        `original`, to the picture (t = 0).
        """
        for s in self._states([prompt], [seed], negative, self.sampling.but(**settings), original):
            image = to_pil(self.space.decode(s.x0_hat)[0])
            yield Snapshot(float(s.t), s.xt[0].cpu(), s.x0_hat[0].cpu(), s.eps_hat[0].cpu(), image)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str = "",
        original: Original | None = None,
        batch_size: int = 64,
        **settings: object,
    ) -> Float[Tensor, "n 3 h w"]:
        """Returns one picture in [−1, 1] for each prompt and seed, on the CPU, `batch_size` at a time."""
        chosen = self.sampling.but(**settings)
        done = []
        for i in range(0, len(prompts), batch_size):
            part = prompts[i : i + batch_size], seeds[i : i + batch_size]
            done.append(self._best(*part, negative, chosen, original))
        return torch.cat(done)

    @property
    def agreement(self) -> Agreement:
        """Tells how well pictures fit prompts, by the whole OpenCLIP model whose text half is the encoder."""
        if self._agreement is None:
            self._agreement = self.text.agreement()
        return self._agreement

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns the words of a prompt that no training caption held."""
        return [word for word in words(prompt) if self.vocabulary and word not in self.vocabulary]

    def _best(
        self, prompts: Sequence[str], seeds: Sequence[int], negative: str, how: Sampling, original: Original | None
    ) -> Float[Tensor, "n 3 h w"]:
        """Draws all candidates and returns of each picture's the one that fits best (Ramesh et al. 2021, §2.6)."""
        agreement = self.agreement if how.candidates > 1 else None  # without one, say so before anything is drawn
        drawn = []
        for candidate in range(how.candidates):
            *_, last = self._states(prompts, seeds, negative, how, original, candidate)
            images = self.space.decode(last.xt).float().clamp(-1, 1).cpu()
            drawn.append(images if original is None else original.over(images))
        if agreement is None:
            return drawn[0]
        fit = torch.stack([agreement(images, prompts) for images in drawn])
        return torch.stack(drawn)[fit.argmax(dim=0), torch.arange(len(prompts))]

    def _states(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative: str,
        how: Sampling,
        original: Original | None = None,
        candidate: int = 0,
    ) -> Iterator[State]:
        noise, process = ImageNoise(seeds, candidate), self.denoiser.process
        times = how.grid(process, how.steps)
        denoise = self.guided(self.text(prompts), self.text([negative]), how)
        x = noise(torch.empty((len(prompts), *self.space.shape), device=self.device))
        if original is None:
            x = process.start_std(times[0]).to(x) * x
        else:
            times, x0 = original.last(times), self.space.encode(original.image[None].to(self.device))
            x = process.alpha(times[0]).to(x) * x0 + process.sigma(times[0]).to(x) * x
            if original.keep is not None:
                denoise = guidance.inpainted(denoise, process, x0, self.space.inside(original.keep.to(self.device)))
        for state in how.sampler(denoise, x, times, process, noise):
            yield State(*state)

    @torch.no_grad()
    def guided(self, cond: Cond, null: Cond, how: Sampling) -> Callable:
        """Returns the denoiser that samplers see: classifier-free guidance, its interval, and a bounded x0_hat."""
        process, cond, null = self.denoiser.process, cond.to(self.device), null.to(self.device)
        denoiser = packed(self.denoiser) if self.precision == "fp32" else self.denoiser
        prepared = cache(denoiser.net.prepare)  # what depends on words alone: once, and not at every step
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

        @torch.no_grad()
        def network(xt: Tensor, t: Tensor, c: Cond) -> tuple[Tensor, Tensor]:
            with torch.autocast(self.device.type, half, enabled=half is not None):
                return denoiser(xt, t, prepared(c))

        denoise = guidance.guided(network, process, cond, null, how.guidance, how.rescale)
        if (how.low, how.high) != (0, 1):
            denoise = guidance.interval(denoise, guidance.conditional(network, cond), how.low, how.high)
        if how.threshold is None:
            return guidance.clamped(denoise, process, -1.0, 1.0)
        if how.threshold < 1:
            return guidance.dynamic_threshold(denoise, process, how.threshold)
        return denoise


class ImageNoise:
    """Standard normal noise for a batch in which every image, and every candidate for it, has its own generator."""

    def __init__(self, seeds: Sequence[int], candidate: int = 0) -> None:
        for seed in seeds:
            if not 0 <= seed < 2**63:
                raise InputError(
                    "MD-SAMPLE-002", f"seed={seed} does not work: a seed is a whole number from 0 to 2⁶³ − 1."
                )
        place = (candidate,) if candidate else ()  # the first is the picture that is drawn without others
        self._generators = [generator(seed, "image", *place) for seed in seeds]

    def __call__(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Returns fresh noise of the shape, dtype and device of `x`."""
        rows = [torch.randn(x.shape[1:], generator=g) for g in self._generators]
        return torch.stack(rows).to(x)


def words(caption: str) -> list[str]:
    """Returns the distinct words of a caption, in lower case and in order."""
    return list(dict.fromkeys(re.findall(r"[^\W_]+", caption.lower())))


def to_pil(image: Float[Tensor, "3 h w"]) -> Image.Image:
    """Returns a picture in [−1, 1] as a PIL image."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


# -------------------------------------------------------------------------------------------- making and loading


def assemble(
    net: Callable[..., nn.Module],
    process: Process,
    objective: Objective,
    weighting: Callable,
    space: Space,
    text: TextEncoder,
    sampling: Sampling,
) -> Pipeline:
    """Puts the parts together: the network gets its channels from the space and its widths from the text encoder.

    Latents have no bounds to keep x0_hat in, so without a threshold there they are left as they are.
    """
    channels = space.shape[0]
    unet = net(in_channels=channels, out_channels=channels, token_dim=text.token_dim, vector_dim=text.vector_dim)
    unit = space.factor * unet.multiple
    if space.image_size % unit:
        low = space.image_size // unit * unit
        raise InputError(
            "MD-NET-004",
            f"image_size={space.image_size} does not fit the network: with {space.factor}×{space.factor} pixels to a "
            f"position (space) and a UNet that halves its map {unet.multiple.bit_length() - 1} time(s), it must be a "
            f"multiple of {unit}. The nearest sizes are {low or unit} and {low + unit}.",
        )
    if not space.bounded:
        sampling = sampling.but(threshold=1.0 if sampling.threshold is None else sampling.threshold)
    return Pipeline(Denoiser(unet, process, objective, weighting), space, text, sampling)


def contract(pipeline: Pipeline, recipe: Mapping) -> dict:
    """Returns what a checkpoint must say so that sampling cannot disagree with training, as plain JSON."""
    return {
        "pipeline": recipe,
        "text_identity": pipeline.text.identity,
        "space": pipeline.space.state(),
        "vocabulary": sorted(pipeline.vocabulary),
    }


def load(path: str | Path, weights: str = "ema", device: str = "auto") -> Pipeline:
    """Loads a pipeline from a run folder (its newest whole checkpoint) or from one checkpoint folder.

    `weights` is "ema" or "raw". Raises CheckpointError if the run is missing, damaged, or was trained with another
    text encoder or autoencoder.
    """
    if weights not in ("ema", "raw"):
        raise InputError("MD-SAMPLE-003", f"weights={weights} is unknown; choose ema (the running average) or raw.")
    folder = find_checkpoint(path)
    part = "ema" if weights == "ema" else "model"
    saved = checkpoint.load(folder, [part])
    terms = saved.state.get("contract", {})
    if "pipeline" not in terms:
        raise CheckpointError(
            "MD-CKPT-020", f"{folder} holds no text-to-image model, so there is nothing to prompt. Name another run."
        )
    pipeline = build(terms["pipeline"])
    if pipeline.text.identity != terms["text_identity"]:
        raise CheckpointError(
            "MD-CKPT-021",
            f"{folder} was trained with the text encoder {terms['text_identity']}, but {pipeline.text.identity} "
            "is what its recipe gives here, so prompts would mean something else. Restore that encoder's weights, or "
            "train again with this one.",
        )
    pipeline.space.restore(terms.get("space", {}))  # runs of before there were latents say nothing
    load_model(pipeline.denoiser.net, saved.tensors[part])
    pipeline.denoiser.eval().requires_grad_(False)
    pipeline.vocabulary = frozenset(terms["vocabulary"])
    pipeline.name = f"{saved.state['name']}@{saved.step}"
    return pipeline.to(resolve_device(device))


def find_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint folder that a run folder or a checkpoint folder means."""
    path = Path(path)
    if (path / "MANIFEST.json").is_file():
        return path
    if not path.is_dir():
        runs = (
            sorted(p.name for p in path.parent.glob("*") if (p / "checkpoints").is_dir())
            if path.parent.is_dir()
            else []
        )
        there = f"Runs in {path.parent}: {', '.join(runs)}." if runs else f"There are no runs in {path.parent}."
        raise CheckpointError(
            "MD-CKPT-022", f"The run {path} does not exist. {there} Train one with `python train.py`."
        )
    newest = checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise CheckpointError(
            "MD-CKPT-023", f"{path} holds no finished checkpoint. Train on with `python train.py name={path.name}`."
        )
    return newest

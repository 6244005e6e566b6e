"""Text-to-image diffusion: what is particular to learning pictures from their captions.

    x0    = space.encode(images)
    shown = space.blur(x0, spread) for a share `blur` of the samples, x0 for the others
    cond  = text(captions), replaced by the empty caption for a share `drop_cond` of the samples
    loss  = denoiser.loss(x0, cond, t, eps, shown)

Noise, time, dropout and blur of a sample depend on the run's seed and the sample's number alone (`minidiff.seeds`).

Why blur: in training the network finds the answer in the picture, which the noise hides in part only, and learns to
look before it learns to listen. In sampling the picture is its own early guess, a mush wherever only words could have
told. Where details are hidden by blur, words are all there is, at every noise level, and they are learned much sooner
(docs/experiments.md; cf. the blurred conditions of Ho et al. 2022, "Cascaded Diffusion Models", §4.2).
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minidiff.cache import Cache, content_key
from minidiff.data import Batch
from minidiff.pipeline import Pipeline, contract, words
from minidiff.seeds import generator
from minidiff.tasks.task import Task
from minidiff.viz import grid

GOLDEN = 0.6180339887498949  # (√5 − 1)/2: multiples modulo 1 fill [0, 1) as evenly as can be
PREVIEWS = 16  # pictures on a sheet
WORTH = 10_000_000  # parameters of a text encoder from which on its embeddings are kept on the disk
NOISE_LEVELS = 10  # bins of t in which the loss is told apart
BLURRED = 0.5  # share of the samples, unless `blur` says another
BLUR_WEIGHT = (
    100.0  # of an error of x0_hat at t = 0.001, up to which that is wise: what the blur hides is an error there
)
BLUR = (1 / 32, 3 / 32)  # the least and the greatest standard deviation of a blur, in widths of the picture


@dataclass(frozen=True)
class Draws:
    """The randomness of training for each sample number: noise, a uniform number for the time, whether the caption is
    kept, and the blur's standard deviation in widths of the picture (0: none). It travels to the processes that read.

    The uniform numbers are a Weyl sequence, so that every batch covers all noise levels evenly and its loss varies less
    (cf. the low-discrepancy times of Kingma et al. 2021, appendix I.1).
    """

    seed: int
    drop_cond: float  # share of samples trained without their caption, for guidance
    blur: float  # share of samples that are shown blurred
    shape: tuple[int, ...]  # of the space

    def __call__(
        self, index: Sequence[int]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"], Bool[Tensor, " b"], Float[Tensor, " b"]]:
        draws = [generator(self.seed, "noise", i) for i in index]
        keep = torch.stack([torch.rand((), generator=g) for g in draws]) >= self.drop_cond
        eps = torch.stack([torch.randn(self.shape, generator=g) for g in draws])
        start = torch.rand((), generator=generator(self.seed, "time"), dtype=torch.float64)
        u = (start + GOLDEN * torch.tensor(index, dtype=torch.float64)) % 1
        chance, size = torch.stack([torch.rand(2, generator=g) for g in draws]).unbind(1)
        least, greatest = BLUR
        return eps, u, keep, torch.where(chance < self.blur, least * (greatest / least) ** size, 0.0)


class TextToImage(Task):
    """Trains a pipeline's network; `model` is what learns and what is saved."""

    def __init__(self, pipeline: Pipeline, drop_cond: float, blur: float | str, seed: int) -> None:
        self.pipeline = pipeline
        if blur == "auto":
            blur = BLURRED if pipeline.denoiser.x0_weight(0.001) <= BLUR_WEIGHT else 0.0
        self.draw = Draws(seed, drop_cond, blur, tuple(pipeline.space.shape))
        self.embeddings: Cache | None = None
        self.latents: Cache | None = None

    @property
    def model(self) -> nn.Module:
        return self.pipeline.denoiser.net

    @model.setter
    def model(self, wrapped: nn.Module) -> None:
        self.pipeline.denoiser.net = wrapped

    def to(self, device: torch.device) -> "TextToImage":
        self.pipeline.to(device)
        return self

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns the mean weighted error of the network's answer over a batch."""
        device = self.pipeline.device
        eps, u, keep, spread = batch.draws or self.draw(batch.index)
        cond = self.pipeline.text(batch.captions).where(keep, self.pipeline.text([""]))
        x0 = self._x0(batch)
        t = self.pipeline.denoiser.process.draw(u)
        shown = self.pipeline.space.blur(x0, spread.to(device, non_blocking=True)) if self.draw.blur else None
        loss = self.pipeline.denoiser.loss(x0, cond.to(device), t, eps.to(device, non_blocking=True), shown)
        return loss.mean(), {}

    def _x0(self, batch: Batch) -> Float[Tensor, "b c h w"]:
        """Returns the pictures in the space; latents that were computed before come from the cache, by the pixels that
        the autoencoder would see.
        """
        space, device = self.pipeline.space, self.pipeline.device
        if self.latents is None:
            return space.encode(batch.x(device))
        keys = [content_key(image) for image in batch.images]
        rows = [self.latents.get(key) for key in keys]
        if missing := [i for i, row in enumerate(rows) if row is None]:
            for i, z in zip(missing, space.code(batch.x(device)[missing]).float().cpu(), strict=True):
                rows[i] = self.latents[keys[i]] = z.flatten()
        return space.scaled(torch.stack(rows).reshape(-1, *space.shape).to(device))

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Returns val_loss at fixed noise and fixed, evenly spread times, and the loss per noise level (loss_t0: least
        noise).
        """
        device, denoiser = self.pipeline.device, self.pipeline.denoiser
        losses, times = [], []
        total = sum(len(batch.index) for batch in batches)
        for batch in batches:
            eps = torch.stack(
                [torch.randn(self.pipeline.space.shape, generator=generator(0, "validation", i)) for i in batch.index]
            )
            # (i·φ mod 1) again: neighbours in the data get times that are far apart
            u = (GOLDEN * torch.tensor(batch.index, dtype=torch.float64)) % 1
            x0, cond = self._x0(batch), self.pipeline.text(batch.captions).to(device)
            losses.append(denoiser.loss(x0, cond, denoiser.process.draw(u), eps.to(device)).cpu())
            times.append(1 - u)
        loss, level = torch.cat(losses), (torch.cat(times) * NOISE_LEVELS).long().clamp(max=NOISE_LEVELS - 1)
        levels = {f"loss_t{k}": loss[level == k].mean().item() for k in range(NOISE_LEVELS) if (level == k).any()}
        return {"val_loss": loss.mean().item()} | (levels if total >= 4 * NOISE_LEVELS else {})

    @torch.no_grad()
    def preview(self, batch: Batch) -> "Image.Image":  # noqa: F821
        """Returns a sheet of pictures of the batch's captions, from the same noise every time."""
        prompts = batch.captions[:PREVIEWS]
        return grid(self.pipeline.sample(prompts, list(range(len(prompts)))), prompts)

    def remember_in(self, folder: Path) -> str:
        """Keeps text embeddings (of an encoder that is slower than a disk) and latents in a folder for other runs;
        returns what was found there.
        """
        if self.pipeline.text.parameters >= WORTH:
            self.embeddings = self.pipeline.text.remember_in(folder / "text")
        if self.pipeline.space.identity is not None:
            architecture = zlib.crc32(repr(self.pipeline.space.vae).encode())  # what the weights do not show
            self.latents = Cache(folder / "latents" / f"{self.pipeline.space.identity}-{architecture:08x}")
        found = [f"{cache.found} {what}" for what, cache in self._caches().items()]
        return f"{' and '.join(found)} of earlier runs in {folder}" if found else "not needed"

    def _caches(self) -> dict[str, Cache]:
        return {what: x for what, x in (("captions", self.embeddings), ("latents", self.latents)) if x is not None}

    def flush(self) -> str:
        """Writes what the caches have not yet written; returns what was made, in words ("" if nothing)."""
        for cache in self._caches().values():
            cache.flush()
        made = [f"{cache.made} {what}" for what, cache in self._caches().items() if cache.made]
        trouble = [f"; {cache.trouble}" for cache in self._caches().values() if cache.trouble]
        return f"{' and '.join(made)} were computed for the cache{''.join(trouble)}" if made else ""

    def learn_words(self, captions: Iterable[str]) -> list[str]:
        """Adds the words of training captions to those known, so that sampling can name those it has never seen, and
        tells the text encoder what will come; returns what there is to say about the captions.
        """
        captions, tokenizer = list(captions), self.pipeline.text.tokenizer
        self.pipeline.text.expect(captions)
        new = {word for caption in captions for word in words(caption)} - self.pipeline.vocabulary
        self.pipeline.vocabulary |= new
        # only as many as are read in a second; a token has a letter at least
        longest = sorted((c for c in captions if len(c) > tokenizer.length - 2), key=len)[-1000:]
        cut = [caption for caption in longest if tokenizer.lost(caption)]
        if not cut:
            return []
        return [
            f"{len(cut)} of {len(captions)} distinct captions are longer than {tokenizer.length} tokens; the end of "
            f"the longest, which is lost: {tokenizer.lost(cut[-1])[-200:]!r}"
        ]

    def measure(self, batches: Sequence[Batch]) -> None:
        """Lets the space measure what it must know of the data, unless a checkpoint has told it."""
        self.pipeline.space.measure(batch.x(self.pipeline.device) for batch in batches)

    def restore(self, contract: Mapping) -> None:
        """Takes from a checkpoint the words it knows and what the space had measured; raises CheckpointError if it is
        another space.
        """
        self.pipeline.vocabulary = frozenset(contract.get("vocabulary", ()))
        self.pipeline.space.restore(contract.get("space", {}))

    def contract(self, recipe: Mapping) -> dict:
        """Returns what a checkpoint must say for `minidiff.load`; `recipe` is the configuration of this task."""
        return contract(self.pipeline, recipe["pipeline"])

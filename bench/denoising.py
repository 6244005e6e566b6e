"""How near a run's denoiser is to the best there can be: mean squared error of x0_hat (in 1e-4) at ten noise levels.

    python bench/denoising.py run=data/shapes_run           the bundled run; 2 minutes
    python bench/denoising.py run=runs/a run=runs/b --scenes 64

For runs on pixels (space=pixels). The scenes hold one thing each, and their captions tell all of it but its jitter:
where exactly the centre lies in its cell, and how large it is within its size. Then the best x0_hat is the mean over
the jitter, weighted by how well each scene fits the noisy picture,

    x0* = Σ_j w_j·x_j        w_j ∝ exp(-|xt - alpha·x_j|² / 2 sigma²)        x_j: the scene with jitter j, drawn anew

which `--draws` scenes estimate; where there is little noise they are too few, and the best is better still.

Two runs of one recipe that differ by their seed are within 3 % of each other here, where their exactness after a short
training differs by a third: so this tells recipes apart in minutes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pairs
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.pipeline import Pipeline, load
from minidiff.process import Process
from minidiff.shapes import PLACES, Claim, Description, Scene, Thing, caption, example, render
from minidiff.shapes.sample import throw

RATIOS = (0.001, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 3.0, 6.0)  # alpha over sigma


def told(scene: Scene) -> str:
    """Returns a caption that names every attribute of the one thing in a scene; a plain filling goes without saying."""
    thing = scene.things[0]
    texture = None if thing.texture == "solid" else thing.texture
    named = Description(shape=thing.shape, colour=thing.colour, size=thing.size, texture=texture, place=thing.place)
    return caption(Claim(category="single_object", things=(named,), background=scene.background), 0)


def jittered(thing: Thing, rng: np.random.Generator) -> Thing:
    """Throws a thing into its cell again."""
    row, column = divmod(PLACES.index(thing.place), 3)
    x, y, r = throw(rng, thing.size, column - 1, row - 1)
    return replace(thing, x=x, y=y, r=r)


def pictures(scenes: Sequence[Scene], px: int) -> Float[Tensor, "n 3 px px"]:
    """Renders scenes, in [−1, 1]."""
    drawn = np.stack([render(scene, px) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def noise(like: Tensor) -> Tensor:
    """Returns the noise that the best and every run get alike."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def thrown_anew(scene: Scene, draws: int, rng: np.random.Generator, px: int) -> Float[Tensor, "draws 3 px px"]:
    """Renders a scene of one thing with its jitter drawn anew."""
    things = [jittered(scene.things[0], rng) for _ in range(draws)]
    return pictures([Scene(scene.background, (thing,)) for thing in things], px)


def posterior_mean(
    candidates: Float[Tensor, "draws 3 px px"], xt: Float[Tensor, "3 px px"], alpha: float, sigma: float
) -> Float[Tensor, "3 px px"]:
    """Returns x0*: the mean of the candidates, weighted by how well each fits."""
    misfit = (xt - alpha * candidates).square().flatten(1).sum(1)
    return torch.einsum("j,jchw->chw", torch.softmax(-misfit / (2 * sigma**2), dim=0), candidates)


def best(scenes: Sequence[Scene], x0: Tensor, levels: Sequence[tuple[float, float]], draws: int) -> list[float]:
    """Returns the error of x0* at each (alpha, sigma)."""
    rng, eps, errors = np.random.default_rng(0), noise(x0), torch.zeros(len(levels))
    for scene, x, e in zip(scenes, x0, eps, strict=True):
        candidates = thrown_anew(scene, draws, rng, x.shape[-1])
        for i, (alpha, sigma) in enumerate(levels):
            mean = posterior_mean(candidates, alpha * x + sigma * e, alpha, sigma)
            errors[i] += (mean - x).square().mean() / len(scenes)
    return errors.tolist()


@torch.no_grad()
def of_run(pipe: Pipeline, captions: list[str], x0: Tensor, times: Float[Tensor, " n"]) -> list[float]:
    """Returns the error of a run's x0_hat at each time."""
    cond, errors = pipe.text(captions), []
    clean, process = pipe.space.encode(x0), pipe.denoiser.process
    eps = pipe.space.encode(noise(x0))
    for t in times:
        xt = process.alpha(t).float() * clean + process.sigma(t).float() * eps
        errors.append((pipe.denoiser(xt, t, cond)[0] - clean).square().mean().item())
    return errors


def levels_of(process: Process, ratios: Sequence[float]) -> tuple[Float[Tensor, " n"], list[tuple[float, float]]]:
    """Returns the times at which alpha/sigma is as in `ratios`, and (alpha, sigma) there."""
    times = process.t_of_log_snr(2 * torch.tensor(ratios, dtype=torch.float64).log())
    return times, [(process.alpha(t).item(), process.sigma(t).item()) for t in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run=FOLDER")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--draws", type=int, default=2048, help="scenes that estimate the best; 0: without")
    values = pairs.parse(parser)
    scenes = [example("test", i, weights={"single_object": 1.0}).scene for i in range(values.scenes)]
    captions = [told(scene) for scene in scenes]
    print(f"{'alpha/sigma':<24}" + "".join(f"{ratio:>8g}" for ratio in RATIOS))
    for k, name in enumerate(values.runs):
        pipe = load(name.removeprefix("run="), device="cpu")
        times, levels = levels_of(pipe.denoiser.process, RATIOS)
        x0 = pictures(scenes, pipe.space.image_size)
        if k == 0 and values.draws:
            show("the best", best(scenes, x0, levels, values.draws), scenes=len(scenes), draws=values.draws)
        show(name, of_run(pipe, captions, x0, times), scenes=len(scenes))


def show(name: str, errors: list[float], **facts: object) -> None:
    print(f"{name:<24}" + "".join(f"{1e4 * error:8.1f}" for error in errors), flush=True)
    pairs.record(name, alpha_over_sigma=RATIOS, mse=errors, **facts)


if __name__ == "__main__":
    main()

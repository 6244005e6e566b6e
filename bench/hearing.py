"""How strongly a run hears a word, and sees what it says: the share, at six noise levels, of what the best there can be
does.

    python bench/hearing.py run=data/shapes_run                        the texture of the bundled run; 1 minute
    python bench/hearing.py run=runs/a run=runs/b --attribute shape

For runs on pixels (space=pixels). Every scene holds one thing, its caption tells all of it but its jitter, and its twin
has another value of the attribute and the same jitter. With captions c and c', and xt and xt' made by the same noise,

    heard = ⟨x0_hat(xt, c) − x0_hat(xt, c'), d*⟩ / ⟨d*, d*⟩      d* = the same difference of the best (see denoising.py)
    seen  = ⟨x0_hat(xt, c) − x0_hat(xt', c), d⟩ / ⟨d, d⟩         d = x0 − x0'

so that 1 is a network that hears all. Where there is little noise the best one need not be told what it sees; one that
sees poorly must be told, and draws a mush if it does not hear. Short runs are deaf to texture until late: this shows it
where exactness is still luck.
"""

import argparse
from dataclasses import replace

import numpy as np
import pairs
import torch
from denoising import levels_of, noise, pictures, posterior_mean, thrown_anew, told
from jaxtyping import Float
from torch import Tensor

from minidiff.cond import Cond
from minidiff.pipeline import Pipeline, load
from minidiff.shapes import COLOURS, SHAPES, TEXTURES, Scene, example

RATIOS = (0.001, 0.1, 0.2, 0.45, 1.2, 5.0)  # alpha over sigma
VALUES = {"texture": TEXTURES[1:], "shape": SHAPES, "colour": tuple(COLOURS)}  # a plain filling goes without saying


def twin(scene: Scene, attribute: str) -> Scene:
    """Gives the one thing of a scene the attribute's next value."""
    (thing,), values = scene.things, VALUES[attribute]
    other = values[(values.index(getattr(thing, attribute)) + 1) % len(values)]
    return replace(scene, things=(replace(thing, **{attribute: other}),))


def best_differences(
    scenes: list[Scene], twins: list[Scene], x0: Tensor, levels: list[tuple[float, float]], draws: int
) -> Float[Tensor, "levels n 3 h w"]:
    """Returns what the best denoiser answers to xt of each scene if it is told the scene, less if it is told the twin,
    at each (alpha, sigma).
    """
    differences = []
    for scene, other, x, eps in zip(scenes, twins, x0, noise(x0), strict=True):
        means = []
        for claimed in (scene, other):  # with the same jitter
            candidates = thrown_anew(claimed, draws, np.random.default_rng(0), x.shape[-1])
            means.append(torch.stack([posterior_mean(candidates, a * x + s * eps, a, s) for a, s in levels]))
        differences.append(means[0] - means[1])
    return torch.stack(differences, dim=1)


@torch.no_grad()
def heard_and_seen(
    pipe: Pipeline, captions: tuple[list[str], list[str]], x0: tuple[Tensor, Tensor], best: Tensor, times: Tensor
) -> tuple[list[float], list[float]]:
    """Returns both shares at each time; `captions` and `x0` are those of the scenes and of their twins."""
    said, other = (pipe.text(texts) for texts in captions)
    process, eps = pipe.denoiser.process, noise(x0[0])

    def answer(pictures: Tensor, t: Tensor, cond: Cond) -> Tensor:
        xt = process.alpha(t).float() * pictures + process.sigma(t).float() * eps
        return pipe.space.decode(pipe.denoiser(pipe.space.encode(xt), t, cond)[0])

    heard, seen = [], []
    for t, ideal in zip(times, best, strict=True):
        told_all = answer(x0[0], t, said)
        heard.append(share(told_all - answer(x0[0], t, other), ideal))
        seen.append(share(told_all - answer(x0[1], t, said), x0[0] - x0[1]))
    return heard, seen


def share(difference: Float[Tensor, "n 3 h w"], ideal: Float[Tensor, "n 3 h w"]) -> float:
    """Returns how much of an ideal there is in a difference, the mean over scenes."""
    along, whole = (difference * ideal).flatten(1).sum(1), ideal.square().flatten(1).sum(1)
    return (along / whole).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run=FOLDER")
    parser.add_argument("--attribute", choices=VALUES, default="texture")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--draws", type=int, default=2048, help="scenes that estimate the best")
    values = pairs.parse(parser)
    singles = (example("test", i, weights={"single_object": 1.0}).scene for i in range(20 * values.scenes))
    telling = [s for s in singles if getattr(s.things[0], values.attribute) in VALUES[values.attribute]]
    scenes = telling[: values.scenes]
    twins = [twin(scene, values.attribute) for scene in scenes]
    captions = tuple([told(scene) for scene in some] for some in (scenes, twins))
    best = None
    print(f"{'alpha/sigma':<32}" + "".join(f"{ratio:>8g}" for ratio in RATIOS))
    for name in values.runs:
        pipe = load(name.removeprefix("run="), device="cpu")
        x0 = pictures(scenes, pipe.space.image_size), pictures(twins, pipe.space.image_size)
        times, levels = levels_of(pipe.denoiser.process, RATIOS)
        if best is None:
            best = best_differences(scenes, twins, x0[0], levels, values.draws)
        heard, seen = heard_and_seen(pipe, captions, x0, best, times)
        for what, shares in (("heard", heard), ("seen", seen)):
            print(f"{name:<25}{what:<7}" + "".join(f"{x:8.2f}" for x in shares), flush=True)
        pairs.record(name, attribute=values.attribute, alpha_over_sigma=RATIOS, heard=heard, seen=seen)


if __name__ == "__main__":
    main()

"""Sampling against diffusers' StableDiffusionPipeline: same weights, DDIM, steps, guidance; each as it comes.

    python bench/sampling.py                       tiny: one picture (latency), eight at once (throughput); 2 minutes
    python bench/sampling.py --size small --n 1 4 --json FILE
    python bench/sampling.py --ours precision=bf16 compile=true

Each side loads the folder in a process of its own: theirs with from_pretrained, ours with minidiff.load. What is timed
goes from prompts to pixels, the text encoder and the decoder included; both have seen the prompt before.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import folders
import pairs
import sides

PROMPT = "a large red star on a navy background"


def peer(folder: str, device: str, n: str, steps: str, guidance: str) -> Callable[[], object]:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": int(steps), "guidance_scale": float(guidance), "num_images_per_prompt": int(n)}
    return lambda: pipe(PROMPT, generator=[torch.Generator().manual_seed(i) for i in range(int(n))], **how)


def ours(folder: str, device: str, n: str, steps: str, guidance: str, *choices: str) -> Callable[[], object]:
    import minidiff

    pipe = minidiff.load(folder, device=device)
    if choices:
        chosen = dict(choice.split("=") for choice in choices)
        print(pipe.compute(chosen.get("precision", "fp32"), chosen.get("compile") == "true"))
    return lambda: pipe(PROMPT, n=int(n), steps=int(steps), guidance=float(guidance))


def parent() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=folders.SIZES, default="tiny")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="precision=, compile=")
    values = pairs.parse(parser)
    with tempfile.TemporaryDirectory() as place:
        folder = folders.write(Path(place) / "folder", folders.SIZES[values.size])
        for n in values.n:
            how = (folder, values.device, n, values.steps, values.guidance)
            both = [sides.Side(__file__, "peer", *how), sides.Side(__file__, "ours", *how, *values.ours)]
            ratio = pairs.compare(*both, rounds=values.rounds, warmup=1)
            theirs_mib, ours_mib = (side.peak_mib() for side in both)
            for side in both:
                side.close()
            pairs.report(
                f"sampling, {values.size}, {n} at once {' '.join(values.ours)}",
                ratio,
                images_per_s=round(n / ratio.ours_s, 2),
                peer_mib=theirs_mib,
                ours_mib=ours_mib,
                memory=round(ours_mib / max(theirs_mib, 1), 2),
            )


if __name__ == "__main__":
    sides.main(globals(), parent)

"""Makes pictures: run folder + prompts → PNG files.

    python sample.py run=runs/shapes prompt="a large red star on a navy background" seed=7
    python sample.py run=runs/shapes prompts=prompts.txt n=4 steps=50 guidance=3 sampler=heun
    python sample.py run=stable-diffusion-v1-5 prompt="a small red boat" lora=boats.safetensors lora_scale=0.8
    python sample.py run=runs/shapes prompt="a blue star" image=star.png strength=0.6      # that picture, changed
    python sample.py run=runs/shapes prompt="a blue star" image=star.png mask=left.png     # its white part drawn anew

`run` is a run of ours or a Stable Diffusion folder in the layout of diffusers.
Each PNG carries in its metadata that a model made it, and what is needed to make it again: prompt, seed, sampler,
steps, guidance, run, version.
"""

import json
import re
from pathlib import Path

from minidiff.config import SAMPLE_RANGES, build, check, entry
from minidiff.errors import InputError, MachineError

METADATA = 16_384  # characters at most; readers, Pillow among them, distrust longer ones
# IPTC's word for what a trained model made. Anyone can remove it: it informs, and proves nothing.
MADE_BY_A_MODEL = {"digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"}
SETTINGS = ("steps", "guidance", "rescale", "low", "high", "threshold", "candidates")


@entry("sample")
def main(values: dict) -> None:
    check(values, SAMPLE_RANGES)
    prompts = read_prompts(values)

    import torch

    import minidiff
    from minidiff.pipeline import to_pil

    pipe = minidiff.load(values["run"], weights=values["weights"], device=values["device"])
    if values["lora"] is not None:
        net = pipe.denoiser.net
        minidiff.interop.load_lora(values["lora"], net).merge(net, values["lora_scale"])
    computing = pipe.compute(values["precision"], values["compile"])
    if computing != "fp32, eager":
        print(f"note: computing in {computing}")
    for prompt in dict.fromkeys(prompts):
        for remark in remarks(pipe, prompt):
            print(remark)

    original = read_original(pipe, values)
    settings = {name: values[name] for name in SETTINGS}
    settings |= {name: build(values[name]) for name in ("sampler", "grid") if values.get(name)}
    jobs = [(prompt, values["seed"] + i) for prompt in prompts for i in range(values["n"])]
    try:
        images = pipe.sample(
            [prompt for prompt, _ in jobs],
            [seed for _, seed in jobs],
            negative=values["negative"],
            original=original,
            batch_size=values["batch_size"],
            **settings,
        )
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "MD-ENV-006",
            f"{pipe.device} ran out of memory with batch_size={values['batch_size']} pictures of "
            f"{pipe.space.image_size}×{pipe.space.image_size} pixels at once. Take a smaller batch_size; or "
            "guidance=1, which halves the network's batch; or device=cpu. Nothing was written.",
        ) from error
    how = facts(pipe, values, settings, original)
    made = [
        (to_pil(image), MADE_BY_A_MODEL | {"prompt": prompt, "seed": seed} | how)
        for image, (prompt, seed) in zip(images, jobs, strict=True)
    ]
    write(made, values["out"], Path(values["run"]))


def read_prompts(values: dict) -> list[str]:
    """Returns the prompts of the command line or of a file, one a line; blank lines do not count."""
    if values["prompts"] is None:
        if values["prompt"] is None:
            raise InputError("MD-SAMPLE-010", 'Nothing to draw: give prompt="a large red star" or prompts=FILE.txt.')
        return [str(values["prompt"])]
    if values["prompt"] is not None:
        raise InputError("MD-SAMPLE-011", "Both prompt= and prompts= are given; give one of them.")
    file = Path(values["prompts"])
    if not file.is_file():
        raise InputError("MD-SAMPLE-012", f"prompts={file} is not a file. It should hold one prompt a line.")
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    if not any(lines):
        raise InputError("MD-SAMPLE-013", f"prompts={file} holds no prompt. It should hold one a line.")
    return [line for line in lines if line]


def read_original(pipe, values: dict) -> "Original | None":  # noqa: F821
    """Returns the picture to begin with, read as carefully as training data, or None."""
    from minidiff.data import BadImage, read_transparent

    given = [name for name in ("image", "mask", "strength") if values[name] is not None]
    if "image" not in given:
        if given:
            raise InputError("MD-SAMPLE-017", f"{given[0]}= says what becomes of a picture: name one by image=FILE.")
        return None
    pictures = []
    for name in ("image", "mask"):
        try:
            pictures.append(values[name] and read_transparent({"path": values[name]}))
        except BadImage as error:
            raise InputError("MD-SAMPLE-014", f"{name}={values[name]} cannot be read: {error}.") from error
    return pipe.original(pictures[0], mask=pictures[1], strength=values["strength"])


def remarks(pipe, prompt: str) -> list[str]:
    """Returns what the user should know about a prompt before believing its picture."""
    said = []
    if not prompt.strip():
        said.append("note: the prompt is empty, so the picture is unconditional")
    if unknown := pipe.unknown_words(prompt):
        said.append(
            f"note: no training caption held {', '.join(map(repr, unknown))}; expect the model to ignore it "
            f"(prompt: {prompt!r})"
        )
    if lost := pipe.text.tokenizer.lost(prompt):
        said.append(f"note: the prompt is longer than {pipe.text.tokenizer.length} tokens; this part is lost: {lost!r}")
    return said


def facts(pipe, values: dict, settings: dict, original: "Original | None") -> dict:  # noqa: F821
    """Returns what is needed to make a picture again, but for its prompt and seed, as plain values."""
    import minidiff

    how = describe(pipe.sampling.but(**settings))
    how |= {name: values[name] for name in ("negative", "weights", "lora", "lora_scale")}
    how |= {"run": pipe.name, "minidiff": minidiff.__version__, "precision": pipe.precision}
    if original is not None:
        how |= {name: Path(values[name]).name for name in ("image", "mask") if values[name] is not None}
        how["strength"] = original.strength
    return how


def describe(how) -> dict:
    """Returns sampling settings as plain values, for the metadata of a picture."""
    plain = {name: getattr(how, name) for name in SETTINGS}
    parts = {name: getattr(how, name) for name in ("sampler", "grid")}
    return (
        {name: getattr(f, "func", f).__name__ for name, f in parts.items()}
        | {f"{name}_options": f.keywords for name, f in parts.items() if getattr(f, "keywords", None)}
        | plain
    )


def write(made: list[tuple], out: str | None, run: Path) -> None:
    """Writes one PNG per picture into a folder, or a sheet of all of them into one file."""
    from PIL.PngImagePlugin import PngInfo

    def save(image, facts: object, file: Path) -> None:
        info = PngInfo()
        info.add_itxt("minidiff", json.dumps(facts)[:METADATA])  # ASCII: no tricks with directions of writing
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, pnginfo=info)
        print(file)

    if out is not None and out.lower().endswith(".png"):
        from minidiff.viz import grid

        [(image, facts)] = (
            made
            if len(made) == 1
            else [
                (
                    grid([image for image, _ in made], [facts["prompt"] for _, facts in made]),
                    [facts for _, facts in made],
                )
            ]
        )
        return save(image, facts, Path(out))
    folder = Path(out) if out is not None else run / "pictures"
    for image, facts in made:
        save(image, facts, folder / f"{slug(facts['prompt'])}_{facts['seed']}.png")


def slug(prompt: str) -> str:
    """Returns a file name for a prompt: plain letters, digits and dashes, at most 60 of them."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


if __name__ == "__main__":
    main()

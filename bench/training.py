"""Whole training loops: ours against diffusers' train_text_to_image recipe and denoising_diffusion_pytorch's Trainer.

    python bench/training.py                       tiny UNet, batches of 16 pictures of 128×128; 3 minutes
    python bench/training.py --updates 20 --json FILE

From files to updated weights and average: pictures are decoded and put through the frozen autoencoder, captions through
the frozen text encoder, with AdamW and an average of the weights. Same architecture, same pictures, same batch; the
recipe in fp32 and eager, as its script defaults to, ours as `python train.py` defaults to on this machine: bf16 where
it has that, captions and decoded pictures remembered. Each side runs in a process of its own.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import folders
import pairs
import sides

ROWS = 256  # pictures to train on
LR, WEIGHT_DECAY, CLIP, EMA = 1e-4, 1e-2, 1.0, 0.9999


def recipe(folder: str, data: str, device: str, batch: str, updates: str) -> Callable[[], None]:
    """diffusers' text-to-image script, by its calls: accelerate, datasets, DataLoader, AdamW, EMAModel."""
    import datasets
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torchvision import transforms
    from transformers import CLIPTextModel, CLIPTokenizer

    accelerator = Accelerator(cpu=device == "cpu")
    noise_levels = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
    text, vae = text.to(accelerator.device), vae.to(accelerator.device)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    average = EMAModel(unet.parameters(), decay=EMA, model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    size = unet.config.sample_size * 8
    look = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.RandomCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def preprocess(rows: dict) -> dict:
        captions = [texts[0] for texts in rows["captions"]]
        ids = tokenizer(captions, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"pixel_values": [look(image.convert("RGB")) for image in rows["image"]], "input_ids": ids}

    def collate(rows: list[dict]) -> dict:
        return {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "input_ids")}

    rows = datasets.load_dataset("parquet", data_files=data, split="train").with_transform(preprocess)
    batches = torch.utils.data.DataLoader(rows, batch_size=int(batch), shuffle=True, collate_fn=collate)
    schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0)
    unet, optimizer, batches, schedule = accelerator.prepare(unet, optimizer, batches, schedule)

    def endless():
        while True:
            yield from batches

    stream = endless()

    def run() -> None:
        for _ in range(int(updates)):
            batch = next(stream)
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(
                    0, noise_levels.config.num_train_timesteps, (len(latents),), device=latents.device
                )
                noisy = noise_levels.add_noise(latents, noise, timesteps)
                words = text(batch["input_ids"], return_dict=False)[0]
                answer = unet(noisy, timesteps, words, return_dict=False)[0]
                loss = F.mse_loss(answer.float(), noise.float(), reduction="mean")
                accelerator.gather(loss.repeat(len(latents))).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            average.step(unet.parameters())

    return run


def ours(
    folder: str, data: str, device: str, batch: str, updates: str, place: str, *choices: str
) -> Callable[[], None]:
    """What `python train.py` does between two previews."""
    os.chdir(place)
    from minidiff.config import compose
    from minidiff.interop import load_unet
    from minidiff.run import Run

    net = load_unet(Path(folder) / "unet")  # of which ours is to be another one
    levels, vae = [len(level.blocks) for level in net.down], f"{folder}/vae"
    channels = [level.blocks[-1].res.conv2.out_channels for level in net.down]
    attend = [level.blocks[0].transformer is not None for level in net.down]
    size = 8 * json.loads((Path(folder) / "unet" / "config.json").read_text())["sample_size"]
    values = compose(
        "train",
        [
            *("net=small", f"net.channels={channels}", f"net.layers={levels}", f"net.attend={attend}"),
            *("net.scale_shift=false", "+net.linear_projection=false", "space=latents", f"space.vae={vae}"),
            *("text=folder", f"text.folder={folder}", "process=table", "objective=eps", "weighting=uniform"),
            *("sampler=ddim", "grid=leading", f"image_size={size}", "optim=adamw", f"optim.lr={LR}", f"ema={EMA}"),
            *(
                "data=parquet",
                f"data.path={data}",
                f"batch_size={batch}",
                "steps=1000000",
                "resume=none",
                f"device={device}",
            ),
            *(f"every.{name}=1000000" for name in ("log", "preview", "validate", "save")),
            *choices,
        ],
    )
    Path("runs/shapes").mkdir(parents=True)
    run = Run(values)
    assert sum(p.numel() for p in run.model.parameters()) == sum(p.numel() for p in net.parameters())
    steps = run.updates()

    def some() -> None:
        for _ in range(int(updates)):
            run.take(next(steps))

    return some


def lucidrains(folder: str, data: str, device: str, batch: str, updates: str) -> Callable[[], None]:
    """denoising_diffusion_pytorch's Trainer on the same pictures, unconditional and on pixels, as it has no others."""
    import datasets
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    pictures = Path(data).parent / "pictures"
    pictures.mkdir(exist_ok=True)
    for i, row in enumerate(datasets.load_dataset("parquet", data_files=data, split="train")):
        row["image"].convert("RGB").resize((32, 32)).save(pictures / f"{i}.png")
    model = GaussianDiffusion(Unet(dim=32, dim_mults=(1, 2, 4), flash_attn=False), image_size=32)
    trainer = Trainer(
        model,
        str(pictures),
        train_batch_size=int(batch),
        gradient_accumulate_every=1,
        train_num_steps=int(updates),
        save_and_sample_every=10**9,
        amp=False,
        calculate_fid=False,
        results_folder=str(pictures.parent / "results"),
    )

    def run() -> None:
        trainer.step = 0
        trainer.train()

    return run


def pixels(folder: str, data: str, device: str, batch: str, updates: str, place: str) -> Callable[[], None]:
    """Ours beside that Trainer: the same sizes, on pixels, with captions."""
    os.chdir(place)
    from minidiff.config import compose
    from minidiff.run import Run

    choices = ["net=small", "net.channels=[32,64,128]", "net.layers=2", "net.attend=[true,true,true]", "net.heads=4"]
    choices += ["net.groups=8", "image_size=32", "optim=adamw", "data=parquet", f"data.path={data}", "resume=none"]
    choices += [f"batch_size={batch}", "steps=1000000", f"device={device}"]
    choices += [f"every.{name}=1000000" for name in ("log", "preview", "validate", "save")]
    Path("runs/shapes").mkdir(parents=True)
    run = Run(compose("train", choices))
    steps = run.updates()

    def some() -> None:
        for _ in range(int(updates)):
            run.take(next(steps))

    return some


def draw(file: Path, size: int) -> Path:
    """Writes captioned scenes as a parquet file of PNGs."""
    from minidiff.data import shapes

    shapes(size, n=ROWS, validation=1).train.to_parquet(file)
    return file


def parent() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=folders.SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--updates", type=int, default=4, help="between two readings of the clock")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="options of train.py")
    values = pairs.parse(parser)
    with tempfile.TemporaryDirectory() as place:
        place, size = Path(place), folders.SIZES[values.size]
        what = folders.write(place / "folder", size), draw(place / "train.parquet", 8 * size.resolution)
        what += (values.device, values.batch, values.updates)
        jobs = {"diffusers' recipe": ("recipe", "ours", values.ours)}
        if importlib.util.find_spec("denoising_diffusion_pytorch"):
            jobs["denoising_diffusion_pytorch"] = ("lucidrains", "pixels", [])
        else:
            print("denoising_diffusion_pytorch is not installed here, so there is no row for its Trainer")
        for i, (name, (theirs, mine, choices)) in enumerate(jobs.items()):
            (run := place / f"run{i}").mkdir()
            both = [sides.Side(__file__, theirs, *what), sides.Side(__file__, mine, *what, run, *choices)]
            ratio = pairs.compare(*both, rounds=values.rounds, warmup=1)
            theirs_mib, ours_mib = (side.peak_mib() for side in both)
            for side in both:
                side.close()
            pairs.report(
                f"training loop, {values.size}, against {name} {' '.join(choices)}",
                ratio,
                images_per_s=round(values.batch * values.updates / ratio.ours_s, 1),
                peer_mib=theirs_mib,
                ours_mib=ours_mib,
                memory=round(ours_mib / max(theirs_mib, 1), 2),
            )


if __name__ == "__main__":
    sides.main(globals(), parent)

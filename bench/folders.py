"""A small Stable Diffusion folder with random weights, which diffusers and minidiff both load."""

import json
from dataclasses import dataclass
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """A Stable Diffusion 1 in small (no transformer on the coarsest level), and what its UNet is given."""

    channels: tuple[int, ...]
    layers: int
    resolution: int  # of square latents of 4 channels, 8 pixels each
    batch: int
    tokens: int = 77
    token_dim: int = 64


SIZES = {
    "tiny": Size((32, 64, 128), layers=1, resolution=16, batch=16),  # UNet of 3.2 M parameters
    "small": Size((64, 128, 256), layers=2, resolution=32, batch=4),  # 18 M
    "base": Size((128, 256, 512), layers=2, resolution=32, batch=2, token_dim=768),  # 72 M
}


def write(folder: Path, size: Size) -> Path:
    """Has diffusers and transformers write the folder; seeded."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    n = len(size.channels) - 1
    unet = UNet2DConditionModel(
        sample_size=size.resolution,
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=["CrossAttnDownBlock2D"] * n + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * n,
        cross_attention_dim=size.token_dim,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    tokenizer = _tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.token_dim,
        intermediate_size=4 * size.token_dim,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path):
    """Writes CLIP's vocabulary, which comes with OpenCLIP, as transformers reads it."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    bpe = SimpleTokenizer()
    rename = {"<start_of_text>": START, "<end_of_text>": END}
    folder.mkdir(parents=True)
    pieces = {rename.get(piece, piece): i for piece, i in bpe.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(pieces), encoding="utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in bpe.bpe_ranks)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77} | special))
    return CLIPTokenizer.from_pretrained(folder)

"""Bundles a trained tiny autoencoder: averaged weights, and the scale that gives its latents unit variance.

python train.py experiment=vae_shapes
python data/vae_shapes/prepare.py runs/vae_shapes
"""

import sys
from pathlib import Path

import torch

from minidiff import checkpoint
from minidiff.config import build
from minidiff.interop import save_vae
from minidiff.pipeline import find_checkpoint
from minidiff.shapes import example, render
from minidiff.space import Latents
from minidiff.state import load_model

PICTURES = 2000  # whose latents are measured

if __name__ == "__main__":
    newest = find_checkpoint(sys.argv[1])
    saved = checkpoint.load(newest, ["ema"])
    vae = build(saved.state["contract"]["autoencoder"]["vae"])
    load_model(vae, saved.tensors["ema"])
    pixels = torch.stack([torch.from_numpy(render(example("train", i).scene, 32)) for i in range(PICTURES)])
    Latents(vae, 32, measured=True).measure([pixels.permute(0, 3, 1, 2) / 127.5 - 1])
    out = Path(__file__).parent
    save_vae(vae, out)
    print(f"{newest} → {out} (scale {vae.scale:.3f})")

"""The autoencoder task: the loss is the evidence lower bound, and what is trained is a space to diffuse in."""

import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, train

import minidiff
from minidiff import checkpoint
from minidiff.config import build
from minidiff.data import Batch
from minidiff.errors import CheckpointError, InputError
from minidiff.interop import load_tiny_latents, load_vae, save_vae
from minidiff.nn.vae import VAE
from minidiff.pipeline import to_pil
from minidiff.seeds import generator
from minidiff.shapes import example, parse, render
from minidiff.state import load_model
from minidiff.tasks.autoencoder import Autoencoding

NOISE = 0.3
BASE = [x for x in TINY_RUN if not x.startswith(("net.", "space", "sampling"))]
BASE += ["experiment=vae_shapes", "task.vae.channels=[8,8,8]", "optim.lr=1e-3"]


def small() -> VAE:
    torch.manual_seed(0)
    return VAE(latent_channels=2, channels=[8, 16], layers=1, groups=4, attend=False)


def batch(n: int, size: int = 16, first: int = 0) -> Batch:
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Batch(images, [""] * n, list(range(first, first + n)), [])


def test_the_loss_is_the_negative_evidence_lower_bound_up_to_a_factor_and_a_constant():
    task, some = Autoencoding(small(), NOISE, seed=3), batch(4)
    x = some.x()
    loss, parts = task.loss(some)
    posterior = task.model.encode(x)
    drawn = posterior.sample(generator(3, "posterior", 0))
    likelihood = torch.distributions.Normal(task.model.decode(drawn), NOISE).log_prob(x).sum((1, 2, 3))
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    numbers = x[0].numel()
    constant = numbers * math.log(NOISE * math.sqrt(2 * math.pi))
    expected = (kl - likelihood).mean() - constant
    torch.testing.assert_close(loss * numbers / (2 * NOISE**2), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(parts["nats"], kl.mean())


def test_noise_belongs_to_the_place_in_the_run():
    task = Autoencoding(small(), NOISE, seed=0)
    first, again, later = (task.loss(batch(4, first=i))[0].item() for i in (0, 0, 4))
    assert first == again != later
    assert task.validate([batch(4)]) == task.validate([batch(4)])


def test_a_sheet_shows_pictures_over_their_reconstructions():
    task = Autoencoding(small(), NOISE, seed=0)
    rows = [np.asarray(task.preview(batch(n))).shape[0] for n in (3, 8, 11)]
    assert rows[0] == rows[1] < rows[2]


def test_half_precision_keeps_small_errors():
    task, some = Autoencoding(small(), NOISE, seed=0), batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = task.loss(some)
    whole, _ = task.loss(some)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.02, atol=0)


def test_it_is_trained_resumed_and_becomes_a_space(tmp_path):
    whole = train(tmp_path / "whole", "steps=4", base=BASE)
    assert (whole / "samples" / "step_00000004.png").is_file()
    parts = train(tmp_path / "parts", "steps=4", base=BASE)
    newest = parts / "checkpoints" / "step_00000004"
    shutil.rmtree(newest)
    train(tmp_path / "parts", "steps=4", base=BASE)  # from step 2
    a, b = (checkpoint.load(run / "checkpoints" / newest.name, ["ema"]) for run in (whole, parts))
    assert all(torch.equal(x, b.tensors["ema"][name]) for name, x in a.tensors["ema"].items())

    vae = build(b.state["contract"]["autoencoder"]["vae"])
    load_model(vae, b.tensors["ema"])
    save_vae(vae, tmp_path / "vae")
    run = train(tmp_path, "space=latents", f"space.vae={tmp_path / 'vae'}", "space.measured=true")
    assert minidiff.load(run).space.shape == (6, 8, 8)
    with pytest.raises(CheckpointError, match="MD-CKPT-020"):
        minidiff.load(whole)


def test_the_bundled_autoencoder_redraws_scenes_so_that_they_read_the_same():
    space, same = load_tiny_latents(32), 0
    examples = [example("heldout", i) for i in range(60)]
    pixels = torch.stack([torch.from_numpy(render(e.scene, 32)) for e in examples]).permute(0, 3, 1, 2)
    x = pixels / 127.5 - 1
    x0 = space.encode(x)
    assert 0.9 < x0.std().item() < 1.1
    redrawn = space.decode(x0)
    assert (redrawn - x).square().mean().sqrt() < 0.05
    for e, image in zip(examples, redrawn, strict=True):
        read = parse(np.asarray(to_pil(image)))
        same += all(claim.holds(read) for claim in e.claims)
    assert same >= 54
    space.measure([x])  # nothing to complain of
    assert load_vae(minidiff.bundled("vae_shapes")).scale == space.vae.scale


def test_a_run_in_its_latents_refuses_pictures_that_it_does_not_know(tmp_path):
    pipe = minidiff.load(train(tmp_path, "space=tiny"))
    assert pipe.space.shape == (6, 8, 8) and pipe("a star", steps=1)[0].size == (32, 32)
    with pytest.raises(InputError, match="MD-SPACE-005.*space=pixels"):
        pipe.space.measure([torch.rand(8, 3, 32, 32) * 2 - 1])

import json
from pathlib import Path

import pytest
import torch

from minidiff.errors import CheckpointError, InputError, NumericsError
from minidiff.nn.tiny_vae import TinyVAE
from minidiff.nn.vae import VAE
from minidiff.space import Latents, Pixels, blurred

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real data, where it exists


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_pixels_lose_nothing_and_keep_noise_white(patch):
    space = Pixels(image_size=16, patch=patch)
    images = torch.randn(3, 3, 16, 16)
    x0 = space.encode(images)
    assert x0.shape[1:] == space.shape
    assert torch.equal(space.decode(x0), images)
    assert torch.equal(x0.flatten().sort().values, images.flatten().sort().values)  # a permutation: white stays white


def test_a_patch_holds_neighbouring_pixels():
    images = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert Pixels(4, patch=2).encode(images)[0, :4, 0, 0].tolist() == [0, 1, 4, 5]


def test_A4_a_size_that_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="48 and 52"):
        Pixels(image_size=50, patch=4)


# ----------------------------------------------------------------------------------------------------------- latents


def kl() -> VAE:
    torch.manual_seed(0)
    vae = VAE(channels=[8, 16, 16], layers=1, groups=4, scale=0.5, shift=0.25)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return vae


def tiny() -> TinyVAE:
    torch.manual_seed(0)
    return TinyVAE(channels=8, latent_channels=6, encoder_blocks=[1, 1], decoder_blocks=[1, 1], scale=2.0)


@pytest.mark.parametrize("make, shape", [(kl, (4, 4, 4)), (tiny, (6, 8, 8))])
def test_latents_are_the_autoencoders_shifted_and_scaled(make, shape):
    vae, images = make(), torch.rand(11, 3, 16, 16) * 2 - 1
    space = Latents(vae, 16)
    assert space.shape == shape and space.factor == 16 // shape[1]
    x0 = space.encode(images)
    z = vae.encode(images)
    z = z if isinstance(z, torch.Tensor) else z.mean
    torch.testing.assert_close(x0, (z - vae.shift) * vae.scale)
    torch.testing.assert_close(space.decode(x0), vae.decode(z), rtol=1e-4, atol=1e-4)
    assert not x0.requires_grad and not any(p.requires_grad for p in vae.parameters())
    assert torch.equal(space.encode(images), x0)  # nothing is drawn


@pytest.mark.parametrize("size, nearest", [(18, "16 and 20"), (3, "4 and 4")])
def test_sizes_that_the_autoencoder_cannot_halve_are_refused_with_the_nearest(size, nearest):
    with pytest.raises(InputError, match=f"MD-SPACE-002.*{nearest}"):
        Latents(kl(), size)


def test_measured_latents_have_unit_variance_once_and_for_all():
    images = torch.rand(40, 3, 16, 16) * 2 - 1
    space = Latents(kl(), 16, measured=True)
    space.measure(images.split(7))
    assert space.encode(images).std(correction=0).item() == pytest.approx(1, rel=1e-4)
    state = json.loads(json.dumps(space.state()))
    space.measure([images[:1]])
    assert space.state() == state
    again = Latents(kl(), 16, measured=True)
    again.restore(state)
    again.measure([images[:1]])
    assert again.state() == state and torch.equal(again.encode(images), space.encode(images))
    with pytest.raises(CheckpointError, match="MD-SPACE-004"):
        Latents(tiny(), 16).restore(state)
    own = Latents(kl(), 16)
    own.measure([images])
    assert (own.vae.scale, own.vae.shift) == (0.5, 0.25)


def test_latents_without_variance_cannot_be_measured():
    for batches in ([], [torch.full((2, 3, 16, 16), float("nan"))]):
        with pytest.raises(NumericsError, match="MD-SPACE-003"):
            Latents(kl(), 16, measured=True).measure(batches)


def test_half_precision_around_it_does_not_reach_the_autoencoder():
    space, images = Latents(kl(), 16), torch.rand(2, 3, 16, 16)
    plain = space.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(space.encode(images), plain)
        assert torch.equal(space.decode(plain), Latents(kl(), 16).decode(plain))


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="no shared data")
def test_real_taef2_is_a_space_to_train_in():
    from minidiff.config import build, compose

    overrides = ["space=latents", f"space.vae={SHARED / 'weights'}", "space.measured=true", "image_size=64"]
    space = build(compose("train", overrides)["space"])
    assert space.shape == (32, 8, 8)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    images = torch.stack([torch.stack([x, y, (k + 1) * x * y / 4]) for k in range(4)])
    space.measure([images])
    x0 = space.encode(images)
    assert x0.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert (space.decode(x0) - images).square().mean() < 0.01


def test_latents_are_blurred_as_maps_and_pixels_as_pixels():
    x0, spread = torch.rand(2, 4, 8, 8), torch.tensor([0.1, 0.0])
    assert torch.equal(Latents(TinyVAE(latent_channels=4), 64).blur(x0, spread), blurred(x0, spread))
    images, pixels = torch.rand(2, 3, 32, 32), Pixels(32, patch=4)
    assert torch.equal(pixels.decode(pixels.blur(pixels.encode(images), spread)), blurred(images, spread))


def test_blurred_is_torchvisions_blur_away_from_the_border():
    from torchvision.transforms.v2.functional import gaussian_blur

    images, spreads = torch.rand(3, 3, 48, 64), torch.tensor([0.02, 0.03, 0.05])
    softened = blurred(images, spreads)
    for image, spread, soft in zip(images, spreads, softened, strict=True):
        peer = gaussian_blur(image, [31, 31], [64 * spread.item()] * 2)
        torch.testing.assert_close(soft[:, 16:-16, 16:-16], peer[:, 16:-16, 16:-16], rtol=0, atol=1e-4)
    plain = torch.full((2, 3, 8, 8), 0.3)
    torch.testing.assert_close(blurred(plain, torch.tensor([1e-4, 10.0])), plain)  # also at the border
    assert torch.equal(blurred(images, torch.zeros(3)), images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blurred(images, spreads), softened)  # data is not rounded

import torch

from minidiff.nn.tiny_vae import TinyVAE
from minidiff.nn.vae import VAE, Posterior


def tiny(**changes) -> VAE:
    torch.manual_seed(0)
    return VAE(**({"latent_channels": 2, "channels": [8, 16], "layers": 1, "groups": 4} | changes))


IMAGES = torch.randn(2, 3, 16, 24)


def test_shapes_there_and_back():
    vae = tiny(channels=[8, 8, 16])
    posterior = vae.encode(IMAGES)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 2, 4, 6)
    assert vae.decode(posterior.mean).shape == IMAGES.shape


def test_posterior_samples_have_its_mean_and_standard_deviation():
    mean, logvar = torch.tensor([1.0, -3.0]).reshape(1, 2, 1, 1), torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1)
    posterior = Posterior(mean.expand(50_000, 2, 1, 1), logvar.expand(50_000, 2, 1, 1))
    z = posterior.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0, keepdim=True), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(z.std(0, keepdim=True), (logvar / 2).exp(), atol=0.04, rtol=0)
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(0)))


def test_kl_is_that_of_torch_and_zero_for_the_standard_normal():
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(Posterior(mean, logvar).kl(), expected)
    assert torch.equal(Posterior(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl(), torch.zeros(1))


def test_a_training_pass_reaches_every_parameter():
    vae = tiny()
    images_hat, posterior = vae(IMAGES, torch.Generator().manual_seed(0))
    ((images_hat - IMAGES).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_tiny_vae_halves_three_times_and_never_leaves_its_clamp():
    torch.manual_seed(0)
    vae = TinyVAE(channels=8)
    z = vae.encode(IMAGES)
    assert z.shape == (2, 4, 2, 3) and vae.decode(z).shape == IMAGES.shape
    assert torch.allclose(vae.decode(torch.full_like(z, 50.0)), vae.decode(torch.full_like(z, 5000.0)))


def test_pool_lets_far_positions_hear_of_each_other():
    """Convolutions of a few pixels cannot; the pool's GroupNorm looks at the whole map."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 512, 16)
    other = images.clone()
    other[..., :8, :] += 3
    for pool in (False, True):
        vae = TinyVAE(channels=8, encoder_blocks=[1, 1], decoder_blocks=[1, 1], pool=pool)
        far = (vae.encode(images) - vae.encode(other)).detach().abs()[..., -8:, :].max()
        assert (far > 1e-6) == pool

"""The autoencoder of latent diffusion: learns latents from which a picture can be drawn again.

    loss = mean (x − x_hat)² + 2·noise²·KL(q(z|x) ‖ N(0, 1)) / numbers of x,    x_hat = decode(z), z ~ q(z|x)

which is the negative evidence lower bound of a decoder with Gaussian noise on every number of a picture, up to a factor
and a constant (Kingma & Welling 2014, eq. 3 and 7). `noise` is the price of a nat: what is smaller than it is not worth
remembering. So latents hold what a picture shows, a little noise on them does no harm, and diffusion in them is easy.
Rombach et al. (2022) add perceptual and adversarial losses, which photographs need to look sharp.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.data import Batch
from minidiff.nn.vae import VAE, Posterior
from minidiff.seeds import generator
from minidiff.tasks.task import Task
from minidiff.viz import grid

SHOWN = 16  # pictures on a sheet, and as many reconstructions


class Autoencoding(Task):
    """Trains a VAE from random weights; `model` is what learns and what is saved."""

    def __init__(self, vae: VAE, noise: float, seed: int) -> None:
        self.model, self.noise, self.seed = vae, noise, seed

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns the loss above, and its two parts: the mean squared error, and the nats of a picture's latents."""
        x = batch.x(self.device)
        x_hat, posterior = self.model(x, generator(self.seed, "posterior", batch.index[0]))
        # under autocast both come in half precision, in which small differences vanish
        error = (x_hat.float() - x).square().mean()
        nats = Posterior(posterior.mean.float(), posterior.logvar.float()).kl().mean()
        return error + 2 * self.noise**2 * nats / x[0].numel(), {"error": error.detach(), "nats": nats.detach()}

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Returns val_loss, val_error and val_nats, the latents being drawn with the same noise every time."""
        results = [self.loss(batch) for batch in batches]
        means = {name: torch.stack([extra[name] for _, extra in results]).mean().item() for name in results[0][1]}
        loss = torch.stack([loss for loss, _ in results]).mean().item()
        return {"val_loss": loss} | {f"val_{name}": mean for name, mean in means.items()}

    @torch.no_grad()
    def preview(self, batch: Batch) -> "Image.Image":  # noqa: F821
        """Returns a sheet of pictures, and below each row of them what the decoder makes of their latents' means."""
        x = batch.x(self.device)[:SHOWN]
        x_hat = self.model.decode(self.model.encode(x).mean)
        half = [part for row in zip(x.split(SHOWN // 2), x_hat.split(SHOWN // 2), strict=True) for part in row]
        return grid(torch.cat(half), columns=min(SHOWN // 2, len(x)))

    def contract(self, recipe: Mapping) -> dict:
        return {"autoencoder": dict(recipe)}

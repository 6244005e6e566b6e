"""Contrastive language-image pre-training: trains an OpenCLIP model so that captions and pictures that belong together
agree.

    loss = ½·CE(s·I·Tᵀ) + ½·CE(s·T·Iᵀ) + mean of −log σ(s·tᵢ·(iᵢ − iⱼ)),   j: the neighbour of i,
    I, T: (b, e) of unit length, correct pairs on the diagonal

The first two terms are of Radford et al. 2021 (figure 3). In the third, which they do not have, a caption chooses
between its own picture and its neighbour's. Among hundreds of wrong answers, one that differs in the order of two words
hardly counts; as the only one it does (cf. Yüksekgönül et al. 2023, "When and why vision-language models behave like
bags-of-words"). The text half then becomes the frozen text encoder of the diffusion model.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.data import Batch
from minidiff.tasks.task import Task
from minidiff.text import TINY, Tokenizer, create_clip

MAX_LOGIT_SCALE = 4.6052  # log 100, the paper's bound


class ContrastivePretraining(Task):
    """Trains the tiny OpenCLIP model from random weights; `model` is what learns and what is saved."""

    def __init__(self, model: str = TINY) -> None:
        self.model: nn.Module = create_clip(model)
        self.tokenizer = Tokenizer(model)

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns the loss, the share of captions that find their own picture first (`retrieval`), and of those that
        prefer it to their neighbour's (`pairs`; rows 0 and 1 are neighbours, 2 and 3, …).
        """
        logits = self._logits(batch)
        truth = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        neighbour = (truth ^ 1).where(truth ^ 1 < len(truth), truth - 1)  # the last of an odd number has the one before
        own, other = logits.T[truth, truth], logits.T[truth, neighbour]
        loss = loss + F.softplus(other - own).mean()
        shares = {"retrieval": logits.T.argmax(1) == truth, "pairs": own > other}
        return loss, {name: share.float().mean().detach() for name, share in shares.items()}

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Returns val_loss, and the shares of `loss` within batches."""
        results = [{"loss": loss} | shares for loss, shares in map(self.loss, batches)]
        return {f"val_{name}": torch.stack([r[name] for r in results]).mean().item() for name in results[0]}

    @torch.no_grad()
    def preview(self, batch: Batch) -> "Image.Image":  # noqa: F821
        """Returns the matrix of agreement between captions (rows) and pictures (columns), the diagonal being the
        truth.
        """
        from PIL import Image

        agreement = self._logits(batch).T.softmax(dim=1).cpu()
        return Image.fromarray((255 * (1 - agreement)).byte().numpy()).resize((512, 512), Image.Resampling.NEAREST)

    def contract(self, recipe: Mapping) -> dict:
        return {"clip": dict(recipe)}

    def _logits(self, batch: Batch) -> Float[Tensor, "b b"]:
        ids = self.tokenizer(batch.captions).to(self.device)
        # on a CPU, PyTorch's fused attention trains several times slower on sequences this short
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            image = self.model.encode_image(batch.x(self.device), normalize=True)
            text = self.model.encode_text(ids, normalize=True)
        return self.model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * image.float() @ text.float().T

"""How well pictures fit captions, in the eyes of OpenCLIP."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minidiff.text.clip import Tokenizer, load_clip


class Agreement:
    """A whole OpenCLIP model: pictures and captions become vectors of unit length, and fit as far as these agree.

    DALL·E (Ramesh et al. 2021, §2.6) draws many pictures and shows those whose cosine with the caption is highest. As a
    measure of models it is known as CLIP score (Hessel et al. 2021).
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Takes OpenCLIP's weights `pretrained`, or those of a safetensors file; see `create_clip` for errors."""
        self.name = f"{model}/{pretrained or Path(weights or 'random').name}"
        self.device, self.tokenizer = torch.device(device), Tokenizer(model)
        self._clip = load_clip(model, pretrained, weights).to(device)

    def __call__(self, images: Float[Tensor, "n 3 h w"], captions: Sequence[str]) -> Float[Tensor, " n"]:
        """Returns the cosine of each picture (in [−1, 1]) with its caption, on the CPU."""
        return (self.pictures(images) * self.captions(captions)).sum(dim=1)

    @torch.no_grad()
    def pictures(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n e"]:
        """Returns the unit vectors of pictures in [−1, 1], on the CPU."""
        visual = self._clip.visual
        x = F.interpolate(images.to(self.device), visual.image_size, mode="bicubic", antialias=True)
        mean, std = (torch.tensor(c, device=self.device).view(3, 1, 1) for c in (visual.image_mean, visual.image_std))
        return self._clip.encode_image(((x + 1) / 2 - mean) / std, normalize=True).cpu()

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Float[Tensor, "n e"]:
        """Returns the unit vectors of captions, on the CPU."""
        return self._clip.encode_text(self.tokenizer(captions).to(self.device), normalize=True).cpu()

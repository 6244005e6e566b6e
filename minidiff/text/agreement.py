"""How well pictures fit their captions, in the eyes of OpenCLIP."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minidiff.errors import InputError
from minidiff.text.clip import Tokenizer, load_clip
from minidiff.text.encoder import TextEncoder


class Agreement:
    """The whole model of which `TextEncoder` is the text half: the cosine between a picture's vector and its caption's.

    DALL·E (Ramesh et al. 2021, §2.6) draws many pictures and shows those with the highest one. As a measure of models
    it is known as CLIP score (Hessel et al. 2021), there times 2.5 and not below 0.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        """Raises InputError (MD-TEXT-004) for the encoder of a Stable Diffusion folder, which is a text half only."""
        if encoder.recipe is None:
            raise InputError(
                "MD-TEXT-004",
                "This model's text encoder comes without the half that looks at pictures, so nobody can say which of "
                "several candidates fits the prompt best. Draw without candidates=.",
            )
        recipe = encoder.recipe
        self.device, self.tokenizer = encoder.device, Tokenizer(recipe["model"])
        self._clip = load_clip(recipe["model"], recipe["pretrained"], recipe["weights"]).to(encoder.device)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 h w"], captions: Sequence[str]) -> Float[Tensor, " n"]:
        """Returns the cosine of each picture (in [−1, 1]) with its caption, on the CPU."""
        visual = self._clip.visual
        x = F.interpolate(images.to(self.device), visual.image_size, mode="bicubic", antialias=True)
        mean, std = (torch.tensor(c, device=self.device).view(3, 1, 1) for c in (visual.image_mean, visual.image_std))
        picture = self._clip.encode_image(((x + 1) / 2 - mean) / std, normalize=True)
        caption = self._clip.encode_text(self.tokenizer(captions).to(self.device), normalize=True)
        return (picture * caption).sum(dim=1).cpu()

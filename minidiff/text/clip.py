"""OpenCLIP's models and tokenizers, our own tiny one among them."""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.errors import InputError, MachineError
from minidiff.resources import bundled
from minidiff.state import load_model
from minidiff.tensor_files import read_tensors

TINY = "minidiff-tiny"  # our own OpenCLIP configuration, data/clip_shapes/minidiff-tiny.json


def create_clip(model: str, pretrained: str | None = None) -> nn.Module:
    """Returns an OpenCLIP model: with random weights, or with weights that OpenCLIP fetches by the tag `pretrained`.

    Without `pretrained` it expects pictures in [−1, 1], which is how `minidiff.tasks.clip` shows them; the tags' models
    have a mean and a standard deviation of their own (`visual.image_mean`, `visual.image_std`, of pictures in [0, 1]).

    Raises MachineError (MD-TEXT-001) if they cannot be fetched and InputError (MD-TEXT-002) for an unknown model.
    """
    with open_clip_quietly() as open_clip:
        if model not in open_clip.list_models():
            raise InputError(
                "MD-TEXT-002", f"OpenCLIP has no model '{model}'. Known models: {open_clip.list_models()}."
            )
        # a path would be taken as well, and a recipe that came with a checkpoint could name somebody's pickle
        tags = open_clip.list_pretrained_tags_by_model(model)
        if pretrained is not None and pretrained not in tags:
            raise InputError(
                "MD-TEXT-003",
                f"OpenCLIP has no weights '{pretrained}' for {model}; it has {', '.join(tags) or 'none'}. Your own "
                "weights go by text.weights=FILE.safetensors.",
            )
        try:
            ours = None if pretrained else {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
            return open_clip.create_model(model, pretrained=pretrained, force_preprocess_cfg=ours).eval()
        except (OSError, RuntimeError) as error:
            repo, _, file = open_clip.get_pretrained_cfg(model, pretrained or "").get("hf_hub", "").rpartition("/")
            raise MachineError(
                "MD-TEXT-001",
                f"The pretrained weights '{pretrained}' of OpenCLIP's {model} are neither in the local cache nor "
                f"could they be downloaded ({type(error).__name__}). Fetch them once where there is internet, by "
                f"`hf download {repo} {file or 'open_clip_model.safetensors'}`, and copy ~/.cache/huggingface/hub "
                "(its place is $HF_HUB_CACHE) here; or use text=tiny, which comes with minidiff.",
            ) from error


def load_clip(model: str, pretrained: str | None = None, weights: str | Path | None = None) -> nn.Module:
    """Returns an OpenCLIP model with OpenCLIP's weights `pretrained`, or with those of a safetensors file."""
    clip = create_clip(model, pretrained)
    if weights is not None:
        load_model(clip, read_tensors(weights))
    return clip.float().requires_grad_(False)


def text_half(
    clip: nn.Module, ids: Int[Tensor, "b l"], layer: int = -1
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b e"]]:
    """Encodes captions by an OpenCLIP model's text transformer: tokens after layer `layer`, normed, and the end
    token of the last layer, projected into the space that it shares with pictures, of unit length.

    As OpenCLIP's own `encode_text`, but the ids may be cut to fewer places than the context has.
    """
    from open_clip.transformer import text_global_pool

    places = ids.shape[1]
    x = clip.token_embedding(ids) + clip.positional_embedding[:places]
    before = None if clip.attn_mask is None else clip.attn_mask[:places, :places]
    x, (asked,) = clip.transformer.forward_intermediates(x, attn_mask=before, indices=[clip.transformer.layers + layer])
    end = text_global_pool(clip.ln_final(x), ids, clip.text_pool_type, clip.text_eos_id)
    if clip.text_projection is not None:
        linear = isinstance(clip.text_projection, nn.Linear)
        end = clip.text_projection(end) if linear else end @ clip.text_projection
    return clip.ln_final(asked), F.normalize(end, dim=-1)


@contextmanager
def open_clip_quietly():
    """Imports open_clip, knowing our own configuration, and keeps its remarks and retries off the screen."""
    import logging

    import open_clip

    open_clip.add_model_config(bundled("clip_shapes") / f"{TINY}.json")
    logging.disable(logging.CRITICAL)  # what matters of it is said in our own errors
    try:
        yield open_clip
    finally:
        logging.disable(logging.NOTSET)


@cache
def _openclips_tokenizer(model: str):
    with open_clip_quietly() as open_clip:
        return open_clip.get_tokenizer(model)


class Tokenizer:
    """OpenCLIP's byte-pair encoding: caption → start, word pieces, end, padding."""

    def __init__(self, model: str) -> None:
        self._bpe = _openclips_tokenizer(model)
        self.length = self._bpe.context_length

    def __call__(self, captions: Sequence[str]) -> Int[Tensor, "b l"]:
        """Returns ids padded with 0 to the context length; longer captions lose their tail but keep the end token."""
        return self._bpe(list(captions))

    def lengths(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """Returns the number of tokens up to and with the end token, which has the largest id."""
        return ids.argmax(dim=1) + 1

    def lost(self, caption: str) -> str:
        """Returns the end of the caption that does not fit into the context ("" if all of it does)."""
        pieces = self._bpe.encode(caption)
        return self._bpe.decode(pieces[self.length - 2 :]).strip()

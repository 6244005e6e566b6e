"""The text half of CLIP alone, as Stable Diffusion's folders ship it, with a tokenizer of its own."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minidiff.cache import Cache
from minidiff.cond import Cond
from minidiff.errors import InputError
from minidiff.state import fingerprint, load_model
from minidiff.text.clip import open_clip_quietly
from minidiff.text.encoder import TextEncoder


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """The sizes of a text transformer, and its activation."""

    width: int
    mlp_width: int
    heads: int
    layers: int
    length: int = 77  # tokens of a caption, with start, end and padding
    vocabulary: int = 49408
    projection: int | None = None  # width of the caption's vector; None: the end token as it is
    quick_gelu: bool = False  # x·sigmoid(1.702·x), as in OpenAI's CLIP; OpenCLIP uses the exact GELU


class TowerTokenizer:
    """CLIP's byte-pair encoding over a vocabulary of its own: caption → start, pieces, end, padding.

    A caption is normalised (NFC), lower-cased and cut as transformers' CLIPTokenizer does it. The start, end and
    padding tokens written out in a caption mean themselves: Stable Diffusion 2 pads with "!", so that an exclamation
    mark in its prompts is padding, here as in diffusers.
    """

    start, end = "<|startoftext|>", "<|endoftext|>"

    def __init__(
        self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, pad: str, length: int = 77
    ) -> None:
        self.vocabulary, self.merges, self.pad, self.length = dict(vocabulary), list(merges), pad, length
        with open_clip_quietly() as open_clip:
            self._bpe = open_clip.SimpleTokenizer(context_length=length)
        # OpenCLIP's machinery runs on these tables; its own vocabulary goes.
        self._bpe.bpe_ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._bpe.decoder = {i: piece for piece, i in self.vocabulary.items()}
        self._bpe.cache = {}
        self._special = re.compile("|".join(re.escape(x) for x in (self.start, self.end, pad)))

    def __call__(self, captions: Sequence[str]) -> Int[Tensor, "b l"]:
        """Returns ids, padded to `length`; longer captions lose their tail but keep the end token."""
        ids = torch.full((len(captions), self.length), self.vocabulary[self.pad])
        for row, caption in zip(ids, captions, strict=True):
            pieces = [self.vocabulary[self.start], *self._pieces(caption)[: self.length - 2], self.vocabulary[self.end]]
            row[: len(pieces)] = torch.tensor(pieces)
        return ids

    def lost(self, caption: str) -> str:
        """Returns the end of the caption that does not fit into the context ("" if all of it does)."""
        return self._bpe.decode(self._pieces(caption)[self.length - 2 :]).strip()

    def _pieces(self, caption: str) -> list[int]:
        ids, unknown, at = [], self.vocabulary[self.end], 0
        for special in [*self._special.finditer(caption), None]:
            plain = caption[at : special.start()] if special else caption[at:]
            plain = " ".join(unicodedata.normalize("NFC", plain).split()).lower()
            for word in self._bpe.pat.findall(plain):
                spelt = "".join(self._bpe.byte_encoder[byte] for byte in word.encode())
                ids += [self.vocabulary.get(piece, unknown) for piece in self._bpe.bpe(spelt).split(" ")]
            if special:
                ids.append(self.vocabulary[special[0]])
                at = special.end()
        return ids


class Tower(TextEncoder):
    """A frozen text transformer with its tokenizer, as Stable Diffusion's folders ship it.

    All `length` positions are tokens, padding too: Stable Diffusion was trained to look at them, so there is no mask.
    Tokens are the last layer's after the final norm (`last_hidden_state`), and the vector is the end token among them,
    projected if there is a projection (`text_embeds`, else `pooler_output`); without `pooled` there is none, because
    Stable Diffusion's UNets do not hear it. Weights are random until loaded.
    """

    def __init__(self, shape: TowerShape, tokenizer: TowerTokenizer, *, pooled: bool = True) -> None:
        with open_clip_quietly():
            from open_clip.transformer import QuickGELU, TextTransformer

            clip = TextTransformer(
                context_length=shape.length,
                vocab_size=shape.vocabulary,
                width=shape.width,
                heads=shape.heads,
                layers=shape.layers,
                mlp_ratio=(shape.mlp_width + 0.5) / shape.width,  # it rounds width·mlp_ratio down
                output_dim=shape.projection,
                eos_id=tokenizer.vocabulary[tokenizer.end],
                pool_type="eos",
                act_layer=QuickGELU if shape.quick_gelu else nn.GELU,
                output_tokens=True,
            )
        self.shape, self.tokenizer = shape, tokenizer
        self._clip = clip.eval().requires_grad_(False)
        self._memory, self._waiting, self.device = {}, defaultdict(dict), torch.device("cpu")
        self.token_dim, self.vector_dim = shape.width, (shape.projection or shape.width) if pooled else None

    def agreement(self) -> NoReturn:
        """Raises InputError (MD-TEXT-004): there is no other half."""
        raise InputError(
            "MD-TEXT-004",
            "This model's text encoder comes without the half that looks at pictures, so it cannot say how well a "
            "picture fits its prompt. Draw without candidates=; evaluate with other eyes, such as "
            "eyes=ViT-L-14/openai.",
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """The transformer's tensors, under OpenCLIP's names."""
        return self._clip.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies tensors under OpenCLIP's names, whatever their float type, and forgets captions encoded before."""
        load_model(self._clip, weights)
        self._memory.clear()

    def remember_in(self, folder: Path) -> Cache:
        """As `TextEncoder` does; what the weights do not show is part of the folder's name."""
        return super().remember_in(folder / f"{self.shape.heads}-heads-{'quick-' * self.shape.quick_gelu}gelu")

    @property
    def identity(self) -> str:
        return f"tower-pad-{self.tokenizer.pad}/-1/{fingerprint(self.weights)}"

    def __call__(self, captions: Sequence[str]) -> Cond:
        """Returns tokens (b, l, d) and, if pooled, vectors (b, e): float32, on the CPU, l the encoder's context."""
        tokens, vectors = zip(*self._rows(captions), strict=True)
        return Cond(tokens=torch.stack(tokens), vector=None if self.vector_dim is None else torch.stack(vectors))

    def _tokenize(self, caption: str) -> Int[Tensor, "1 places"]:
        return self.tokenizer([caption])  # padding is looked at

    @torch.no_grad()
    def _encode(self, captions: dict[str, Int[Tensor, "1 places"]]) -> dict[str, tuple[Tensor, Tensor]]:
        vectors, tokens = self._clip(torch.cat(list(captions.values())).to(self.device))
        rows = {}
        for caption, row, vector in zip(captions, tokens.float().cpu(), vectors.float().cpu(), strict=True):
            rows[caption] = self._memory[caption] = (row.clone(), vector.clone())
        return rows

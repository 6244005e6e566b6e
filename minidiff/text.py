"""Text → numbers, by a frozen OpenCLIP text encoder; the only door to `open_clip`.

    captions ─BPE─► ids (b, l) ─transformer─► tokens (b, l, d)   every word in its context → cross-attention
                                        └───► vector (b, e)      the caption as a whole    → time embedding

OpenCLIP (Cherti et al. 2022) is trained so that a caption's vector lies near its picture's. Stable Diffusion uses the
tokens, DALL·E 2 the vectors, here both are at hand. The empty caption is the null condition of classifier-free
guidance.

`TextEncoder` is a whole OpenCLIP model; `Tower` is what a Stable Diffusion folder ships: the text half alone, with a
tokenizer of its own (`minidiff.interop.text` reads and writes it).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.cache import Cache, content_key
from minidiff.cond import Cond
from minidiff.errors import InputError, MachineError
from minidiff.resources import bundled
from minidiff.state import fingerprint, load_model
from minidiff.tensor_files import read_tensors

TINY = "minidiff-tiny"  # our own OpenCLIP configuration, data/clip_shapes/minidiff-tiny.json
# Captions encoded at once, the last ones filled up with expected and then with empty ones. Always as many, because the
# last bits of a matrix product depend on its size, and a caption's embedding must not depend on what was encoded with
# it.
BATCH = 16
EXPECTED = 200_000  # captions that are kept to fill up batches; of more, they would take hundreds of megabytes


def create_clip(model: str, pretrained: str | None = None) -> nn.Module:
    """Returns an OpenCLIP model: with random weights, or with weights that OpenCLIP fetches by the tag `pretrained`.

    Raises MachineError (MD-TEXT-001) if they cannot be fetched and InputError (MD-TEXT-002) for an unknown model.
    """
    with _open_clip() as open_clip:
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
            return open_clip.create_model(model, pretrained=pretrained).eval()
        except (OSError, RuntimeError) as error:
            repo, _, file = open_clip.get_pretrained_cfg(model, pretrained or "").get("hf_hub", "").rpartition("/")
            raise MachineError(
                "MD-TEXT-001",
                f"The pretrained weights '{pretrained}' of OpenCLIP's {model} are neither in the local cache nor "
                f"could they be downloaded ({type(error).__name__}). Fetch them once where there is internet, by "
                f"`hf download {repo} {file or 'open_clip_model.safetensors'}`, and copy ~/.cache/huggingface/hub "
                "(its place is $HF_HUB_CACHE) here; or use text=tiny, which comes with minidiff.",
            ) from error


@contextmanager
def _open_clip():
    """Imports open_clip, knowing our own configuration, and keeps its remarks and retries off the screen."""
    import logging

    import open_clip

    open_clip.add_model_config(bundled("clip_shapes") / f"{TINY}.json")
    logging.disable(logging.CRITICAL)  # what matters of it is said in our own errors
    try:
        yield open_clip
    finally:
        logging.disable(logging.NOTSET)


class Tokenizer:
    """OpenCLIP's byte-pair encoding: caption → start, word pieces, end, padding."""

    def __init__(self, model: str) -> None:
        with _open_clip() as open_clip:
            self._bpe = open_clip.get_tokenizer(model)
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


class Embeddings:
    """A memory of embeddings on the disk: a caption is known by its token ids, which are all that an encoder sees."""

    def __init__(self, cache: Cache, tokenizer: "Tokenizer | TowerTokenizer", token_dim: int) -> None:
        self.cache, self._tokenizer, self._width = cache, tokenizer, token_dim
        self._keys: dict[str, bytes] = {}

    def get(self, caption: str) -> tuple[Float[Tensor, "l d"], Float[Tensor, " e"]] | None:
        row = self.cache.get(self._key(caption))
        if row is None:
            return None
        length = int(row[0])
        tokens, vector = row[1:].split([length * self._width, len(row) - 1 - length * self._width])
        return tokens.reshape(length, self._width), vector

    def __setitem__(self, caption: str, row: tuple[Float[Tensor, "l d"], Float[Tensor, " e"]]) -> None:
        tokens, vector = row
        self.cache[self._key(caption)] = torch.cat([torch.tensor([float(len(tokens))]), tokens.flatten(), vector])

    def clear(self) -> None:
        raise RuntimeError("an encoder that keeps its embeddings on the disk cannot change its weights")

    def _key(self, caption: str) -> bytes:
        if caption not in self._keys:
            self._keys[caption] = content_key(self._tokenizer([caption]))
        return self._keys[caption]


class TextEncoder:
    """A frozen OpenCLIP text encoder with a memory: each distinct caption is encoded once.

    `layer` counts from the end: −1 is the transformer's last layer, −2 the one before, as in Stable Diffusion 2.
    """

    _expected: Iterator[str] = iter(())  # none, until `expect` says which

    def __init__(
        self, model: str, *, pretrained: str | None = None, weights: str | Path | None = None, layer: int = -1
    ) -> None:
        clip = create_clip(model, pretrained)
        if weights is not None:
            load_model(clip, read_tensors(weights))
        del clip.visual  # captions only; the picture tower may be most of the model
        self.recipe = {"model": model, "pretrained": pretrained, "weights": weights and str(weights), "layer": layer}
        self.tokenizer = Tokenizer(model)
        self._clip, self._layer = clip.float().requires_grad_(False), layer
        self._memory: dict[str, tuple[Tensor, Tensor]] | Embeddings = {}
        self.device = torch.device("cpu")
        self.identity = f"{model}/{layer}/{fingerprint(clip.state_dict())}"  # by what it computes
        null = self([""])
        self.token_dim, self.vector_dim = null.tokens.shape[2], null.vector.shape[1]

    @property
    def parameters(self) -> int:
        """How many numbers the transformer has."""
        return sum(p.numel() for p in self._clip.parameters())

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Moves the transformer; the memory stays on the CPU."""
        self.device = torch.device(device)
        self._clip.to(device)
        return self

    def __call__(self, captions: Sequence[str]) -> Cond:
        """Returns tokens (b, l, d), their mask and vectors (b, e): float32, on the CPU, l the encoder's context."""
        rows = self._rows(captions)
        tokens = rows[0][0].new_zeros(len(rows), self.tokenizer.length, rows[0][0].shape[1])
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        for i, (row, _) in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return Cond(tokens=tokens, mask=mask, vector=torch.stack([vector for _, vector in rows]))

    def expect(self, captions: Iterable[str]) -> None:
        """Tells captions that will be asked for: they fill up batches, which are encoded whole in any case."""
        self._expected = iter(list(islice(captions, EXPECTED)))

    def remember_in(self, folder: Path) -> Cache:
        """Keeps embeddings in a folder, for other runs and to save memory, and takes from it those that are there."""
        cache = Cache(folder / self.identity.replace("/", "_"))
        self._memory = Embeddings(cache, self.tokenizer, self.token_dim)
        return cache

    def _rows(self, captions: Sequence[str]) -> list[tuple[Float[Tensor, "l d"], Float[Tensor, " e"]]]:
        """Returns tokens and vector of each caption, having encoded those that are not remembered."""
        rows = {caption: self._memory.get(caption) for caption in captions}
        missing = [caption for caption, row in rows.items() if row is None]
        for i in range(0, len(missing), BATCH):
            batch = missing[i : i + BATCH]
            others = (x for x in self._expected if x not in rows and self._memory.get(x) is None)
            rows |= self._encode([*batch, *islice(others, BATCH - len(batch))])
        return [rows[caption] for caption in captions]

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        ids = self.tokenizer([*captions, *[""] * (BATCH - len(captions))])
        # in full precision also under a training's autocast: what is remembered must not depend on who asked first
        with torch.autocast(self.device.type, enabled=False):
            out = self._clip.forward_intermediates(
                text=ids.to(self.device),
                text_indices=[self._clip.transformer.layers + self._layer],
                normalize_intermediates=True,
            )
        tokens, vectors = out["text_intermediates"][0].float().cpu(), out["text_features"].float().cpu()
        vectors = vectors * vectors.shape[1] ** 0.5  # unit length → unit variance, as every other network input
        rows = {}
        for i, (caption, length) in enumerate(zip(captions, self.tokenizer.lengths(ids).tolist(), strict=False)):
            rows[caption] = self._memory[caption] = (tokens[i, :length].clone(), vectors[i])
        return rows


def tiny(weights: str | Path | None = None, layer: int = -1) -> TextEncoder:
    """Returns the bundled encoder of the shapes world, or one trained by `python train.py experiment=clip_shapes`."""
    weights = weights or bundled("clip_shapes") / "model.safetensors"
    return TextEncoder(TINY, weights=weights, layer=layer)


# ------------------------------------------------------------------------------------------- the text half alone


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
        with _open_clip() as open_clip:
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
        with _open_clip():
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
        self._memory, self.device = {}, torch.device("cpu")
        self.token_dim, self.vector_dim = shape.width, (shape.projection or shape.width) if pooled else None

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

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        vectors, tokens = self._clip(self.tokenizer(captions).to(self.device))
        rows = {}
        for caption, row, vector in zip(captions, tokens.float().cpu(), vectors.float().cpu(), strict=True):
            rows[caption] = self._memory[caption] = (row.clone(), vector.clone())
        return rows

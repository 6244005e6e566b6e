"""A frozen text encoder that remembers: each distinct caption is encoded once."""

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minidiff.cache import Cache, content_key
from minidiff.cond import Cond
from minidiff.resources import bundled
from minidiff.state import fingerprint
from minidiff.text.agreement import Agreement
from minidiff.text.clip import TINY, Tokenizer, load_clip, text_half

# Captions encoded at once, the last ones filled up with expected and then with empty ones. Always as many on a device,
# all in as many places, because the last bits of a matrix product depend on its size, and a caption's embedding must
# not depend on what was encoded with it. A GPU takes no longer for many.
BATCH, GPU_BATCH = 16, 256
PLACES = 16  # a caption is given the places it fills, up to a multiple of this: the rest of 77 would be for nothing
EXPECTED = 200_000  # captions that are kept to fill up batches; of more, they would take hundreds of megabytes


class TextEncoder:
    """A frozen OpenCLIP text encoder with a memory: each distinct caption is encoded once.

    `layer` counts from the end: −1 is the transformer's last layer, −2 the one before, as in Stable Diffusion 2.
    `pooled=False` gives tokens only and no vectors, as Stable Diffusion listens to them.
    """

    _expected: Iterator[str] = iter(())  # none, until `expect` says which

    def __init__(
        self,
        model: str,
        *,
        pretrained: str | None = None,
        weights: str | Path | None = None,
        layer: int = -1,
        pooled: bool = True,
    ) -> None:
        clip = load_clip(model, pretrained, weights)
        del clip.visual  # captions only; the picture tower may be most of the model
        self.recipe = {"model": model, "pretrained": pretrained, "weights": weights and str(weights), "layer": layer}
        self.tokenizer = Tokenizer(model)
        self._clip, self._layer, self._pooled = clip, layer, pooled
        self._memory: dict[str, tuple[Tensor, Tensor]] | Embeddings = {}
        self._waiting: dict[int, dict[str, Tensor]] = defaultdict(dict)  # places → expected captions and their ids
        self.device = torch.device("cpu")
        self.identity = f"{model}/{layer}/{fingerprint(clip.state_dict())}"  # by what it computes
        null = self([""])
        self.token_dim, self.vector_dim = null.tokens.shape[2], null.vector.shape[1] if pooled else None

    @property
    def parameters(self) -> int:
        """How many numbers the transformer has."""
        return sum(p.numel() for p in self._clip.parameters())

    def agreement(self) -> Agreement:
        """Returns the whole OpenCLIP model of which this is the text half, built again, where the encoder is."""
        recipe = {name: value for name, value in self.recipe.items() if name != "layer"}
        return Agreement(**recipe, device=self.device)

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Moves the transformer; the memory stays on the CPU."""
        self.device = torch.device(device)
        self._clip.to(device)
        return self

    def __call__(self, captions: Sequence[str]) -> Cond:
        """Returns tokens (b, l, d), their mask and, if `pooled`, vectors (b, e): float32, on the CPU, l the encoder's
        context.
        """
        rows = self._rows(captions)
        tokens = pad_sequence([row for row, _ in rows], batch_first=True)
        tokens = F.pad(tokens, (0, 0, 0, self.tokenizer.length - tokens.shape[1]))
        mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row, _ in rows])
        return Cond(
            tokens=tokens, mask=mask, vector=torch.stack([vector for _, vector in rows]) if self._pooled else None
        )

    def expect(self, captions: Iterable[str]) -> None:
        """Tells captions that will be asked for: they fill up batches, which are encoded whole in any case."""
        self._expected = iter(list(islice(captions, EXPECTED)))
        self._waiting.clear()

    def remember_in(self, folder: Path) -> Cache:
        """Keeps embeddings in a folder, for other runs and to save memory, and takes from it those that are there."""
        cache = Cache(folder / self.identity.replace("/", "_"))
        self._memory = Embeddings(cache, self.tokenizer, self.token_dim)
        return cache

    def _rows(self, captions: Sequence[str]) -> list[tuple[Float[Tensor, "l d"], Float[Tensor, " e"]]]:
        """Returns tokens and vector of each caption, having encoded those that are not remembered."""
        rows = {caption: self._memory.get(caption) for caption in captions}
        missing = defaultdict(list)
        for caption in (caption for caption, row in rows.items() if row is None):
            ids = self._ids(caption)
            missing[ids.shape[1]].append((caption, ids))
        size = self._batch()
        for places, pairs in missing.items():
            for i in range(0, len(pairs), size):
                batch = pairs[i : i + size]
                others = self._others(places, known=rows)
                rows |= self._encode(dict([*batch, *islice(others, size - len(batch))]))
        return [rows[caption] for caption in captions]

    def _ids(self, caption: str) -> Int[Tensor, "1 places"]:
        """Takes a caption's ids from those that wait, or makes them."""
        for waiting in self._waiting.values():
            if caption in waiting:
                return waiting.pop(caption)
        return self._tokenize(caption)

    def _tokenize(self, caption: str) -> Int[Tensor, "1 places"]:
        """Returns a caption's ids, cut to the places that are encoded. Those after its end change nothing, if each
        token sees only the ones before it.
        """
        ids = self.tokenizer([caption])
        if self._clip.attn_mask is None:
            return ids
        return ids[:, : math.ceil(int(self.tokenizer.lengths(ids)) / PLACES) * PLACES]

    def _others(self, places: int, known: Container[str]) -> Iterator[tuple[str, Int[Tensor, "1 places"]]]:
        """Yields some of the expected captions that take so many places, and their ids."""
        waiting, size = self._waiting[places], self._batch()
        unknown = (caption for caption in self._expected if caption not in known and self._memory.get(caption) is None)
        if len(waiting) < size:
            for caption in islice(unknown, 4 * size):  # not all: those that are sought may be few
                ids = self._tokenize(caption)
                self._waiting[ids.shape[1]][caption] = ids
        while waiting:
            caption = next(iter(waiting))
            yield caption, waiting.pop(caption)

    def _batch(self) -> int:
        return GPU_BATCH if self.device.type == "cuda" else BATCH

    @torch.no_grad()
    def _encode(self, captions: dict[str, Int[Tensor, "1 places"]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Encodes captions that take as many places, given with their ids."""
        ids = torch.cat(list(captions.values()))
        empty = self.tokenizer([""])[:, : ids.shape[1]]
        ids = torch.cat([ids, empty.expand(self._batch() - len(ids), -1)])
        # in full precision also under a training's autocast: what is remembered must not depend on who asked first
        with torch.autocast(self.device.type, enabled=False):
            tokens, vectors = text_half(self._clip, ids.to(self.device), self._layer)
        tokens, vectors = tokens.float().cpu(), vectors.float().cpu()
        vectors = vectors * vectors.shape[1] ** 0.5  # unit length → unit variance, as every other network input
        rows = {}
        for i, (caption, length) in enumerate(zip(captions, self.tokenizer.lengths(ids).tolist(), strict=False)):
            rows[caption] = self._memory[caption] = (tokens[i, :length].clone(), vectors[i])
        return rows


def tiny(weights: str | Path | None = None, layer: int = -1, pooled: bool = True) -> TextEncoder:
    """Returns the bundled encoder of the shapes world, or one trained by `python train.py experiment=clip_shapes`."""
    weights = weights or bundled("clip_shapes") / "model.safetensors"
    return TextEncoder(TINY, weights=weights, layer=layer, pooled=pooled)


class Embeddings:
    """A memory of embeddings on the disk: a caption is known by its token ids, which are all that an encoder sees."""

    def __init__(self, cache: Cache, tokenizer: Callable[[Sequence[str]], Tensor], token_dim: int) -> None:
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

"""Text → numbers, by a frozen OpenCLIP text encoder; the only door to `open_clip`.

    captions ─BPE─► ids (b, l) ─transformer─► tokens (b, l, d)   every word in its context → cross-attention
                                        └───► vector (b, e)      the caption as a whole    → time embedding

OpenCLIP (Cherti et al. 2022) is trained so that a caption's vector lies near its picture's. Stable Diffusion uses the
tokens, DALL·E 2 the vectors, here both are at hand. The empty caption is the null condition of classifier-free
guidance.

`TextEncoder` (`encoder`) is the text half of an OpenCLIP model (`clip`), and `Agreement` (`agreement`) asks both halves
how well pictures fit captions. `Tower` (`tower`) is what a Stable Diffusion folder ships: a text half alone, with a
tokenizer of its own (`minidiff.interop.text` reads and writes it).
"""

from minidiff.text.agreement import Agreement
from minidiff.text.clip import TINY, Tokenizer, create_clip
from minidiff.text.encoder import BATCH, Embeddings, TextEncoder, tiny
from minidiff.text.tower import Tower, TowerShape, TowerTokenizer

__all__ = ["BATCH", "TINY", "Agreement", "Embeddings", "TextEncoder", "Tokenizer", "Tower", "TowerShape"]
__all__ += ["TowerTokenizer", "create_clip", "tiny"]

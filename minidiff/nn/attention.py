"""Attention: every position asks (query), every source answers (key, value).

    attention(q, k, v) = softmax(q·kᵀ / √d)·v                                  (Vaswani et al. 2017, eq. 1)

Self-attention lets far parts of a picture agree. Cross-attention is where text enters it: positions ask, words answer.
The transformer of Stable Diffusion (Rombach et al. 2022, appendix E.2.1) stacks both and a gated feed-forward layer.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minidiff.nn.cpu_attention import cpu_attention

Words = Float[Tensor, "b l e"] | Mapping  # tokens; or their keys and values, by the layer that they are for
NARROW = 8  # channels per head, up to which PyTorch's kernel is the slower one in float32 (in bfloat16 it always is)


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h l d"],
    v: Float[Tensor, "b h l d"],
    mask: Bool[Tensor, "b 1 1 l"] | None = None,
) -> Float[Tensor, "b h n d"]:
    """The formula above, by the fastest kernel at hand: PyTorch's own, or ours where a CPU's is slow."""
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.shape[-1] <= NARROW):
        return cpu_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask)


class SelfAttention(nn.Module):
    """Multi-head self-attention over a sequence."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention from a sequence to tokens; tokens whose mask is False are not seen."""

    def __init__(self, dim: int, heads: int, token_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(token_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, tokens: Float[Tensor, "b l e"]) -> tuple[Float[Tensor, "b h l d"], Float[Tensor, "b h l d"]]:
        """Returns what the tokens answer with, whatever the positions ask: sampling needs it once for all steps."""
        k, v = (rearrange(y, "b l (h d) -> b h l d", h=self.heads) for y in self.kv(tokens).chunk(2, dim=-1))
        return k, v

    def forward(
        self, x: Float[Tensor, "b n d"], tokens: Words, mask: Bool[Tensor, "b l"] | None
    ) -> Float[Tensor, "b n d"]:
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = self.keys_values(tokens) if isinstance(tokens, Tensor) else tokens[self]
        seen = None if mask is None else mask[:, None, None, :]  # (b, 1, 1, l)
        return self.out(rearrange(attend(q, k, v, seen), "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """GEGLU, then a projection back: (x·W₁ ⊙ gelu(x·W₂))·W₃ (Shazeer 2020, eq. 6)."""

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * expansion * dim)
        self.out = nn.Linear(expansion * dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        both = self.proj(x)
        # a compiler finds for itself what to compute again, and would cut its graph at a backward pass of our own
        return self.out(gated(both) if torch.compiler.is_compiling() else Gated.apply(both))


def gated(both: Float[Tensor, "b n two_f"]) -> Float[Tensor, "b n f"]:
    """value ⊙ gelu(gate) of (value, gate) side by side."""
    value, gate = both.chunk(2, dim=-1)
    return value * F.gelu(gate)


class Gated(torch.autograd.Function):
    """`gated`, whose backward pass computes gelu again instead of keeping it, the largest tensor of a transformer but
    one.
    """

    @staticmethod
    def forward(ctx, both: Float[Tensor, "b n two_f"]) -> Float[Tensor, "b n f"]:
        ctx.save_for_backward(both)
        return gated(both)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "b n f"]) -> Float[Tensor, "b n two_f"]:
        (both,) = ctx.saved_tensors
        (value, gate), slopes = both.chunk(2, dim=-1), torch.empty_like(both)
        to_value, to_gate = slopes.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=to_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=to_gate)
        return slopes


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalised before and added after."""

    def __init__(self, dim: int, heads: int, token_dim: int) -> None:
        super().__init__()
        self._add_layer(dim, heads, token_dim)

    def _add_layer(self, dim: int, heads: int, token_dim: int) -> None:
        self.norm_self, self.norm_cross, self.norm_ff = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = SelfAttention(dim, heads)
        self.cross_attention = CrossAttention(dim, heads, token_dim)
        self.feed_forward = FeedForward(dim)

    def forward(
        self, h: Float[Tensor, "b n d"], tokens: Words, mask: Bool[Tensor, "b l"] | None
    ) -> Float[Tensor, "b n d"]:
        h = h + self.self_attention(self.norm_self(h))
        h = h + self.cross_attention(self.norm_cross(h), tokens, mask)
        return h + self.feed_forward(self.norm_ff(h))


class Pointwise(nn.Conv2d):
    """A linear layer that keeps its weight as a 1×1 convolution (o, i, 1, 1), as Stable Diffusion 1 does."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, 1)

    def forward(self, x: Float[Tensor, "b n i"]) -> Float[Tensor, "b n o"]:
        return F.linear(x, self.weight[:, :, 0, 0], self.bias)


class SpatialTransformer(TransformerLayer):
    """A transformer over the positions of a feature map, added to the map.

    It is its own first layer and keeps further ones in `deeper`: `depth` adds names of weights and changes none.
    """

    def __init__(
        self, channels: int, heads: int, token_dim: int, groups: int, depth: int = 1, linear_projection: bool = True
    ) -> None:
        nn.Module.__init__(self)
        project = nn.Linear if linear_projection else Pointwise
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = project(channels, channels)
        self._add_layer(channels, heads, token_dim)
        self.deeper = nn.ModuleList(TransformerLayer(channels, heads, token_dim) for _ in range(depth - 1))
        self.proj_out = project(channels, channels)
        nn.init.zeros_(self.proj_out.weight)  # the block starts as the identity
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self, x: Float[Tensor, "b c h w"], tokens: Words, mask: Bool[Tensor, "b l"] | None
    ) -> Float[Tensor, "b c h w"]:
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        h = super().forward(h, tokens, mask)
        for layer in self.deeper:
            h = layer(h, tokens, mask)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2])

"""Convolutions for many forwards on a CPU: its kernels read weights in an order of their own.

PyTorch puts them in that order at every call, which with few positions takes longer than the convolution. A packed
network has done it once.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn


def packed(net: nn.Module) -> nn.Module:
    """Returns a network that computes the same as `net`, in float32 and without gradients, with the weights of its
    convolutions as they are now; everything else is shared. Elsewhere than on a CPU with oneDNN, `net` itself.
    """
    fits = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in net.parameters())
    compiled = any(module._compiled_call_impl is not None for module in net.modules())
    return _twin(net) if fits and not compiled and torch.backends.mkldnn.is_available() else net


class PackedConv2d(nn.Module):
    """A convolution whose weights lie as oneDNN wants them."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.shape = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(conv.weight.detach().to_mkldnn(), *self.shape)
        self.bias = conv.bias

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.shape, "none", [], "")


def _twin(module: nn.Module) -> nn.Module:
    if type(module) is nn.Conv2d:
        heard = module._forward_hooks or module._forward_pre_hooks  # a hook, such as LoRA's, wants the layer itself
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return PackedConv2d(module) if plain and not heard else module
    children = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module  # no convolutions in there
    twin = copy.copy(module)  # parameters and buffers are the same tensors
    twin._modules = children
    return twin

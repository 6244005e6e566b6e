"""diffusers' UNet and ours with the same weights, on the same inputs, doing the same work."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from folders import Size
from torch import Tensor, nn

import minidiff.interop
from minidiff.cond import Cond
from minidiff.optim import make_adamw


def networks(size: Size, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """Returns diffusers' UNet2DConditionModel with random weights, and ours with these same weights; on a GPU ours with
    channels last, as `train.py` has it there.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    n = len(size.channels) - 1
    theirs = UNet2DConditionModel(
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=["CrossAttnDownBlock2D"] * n + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * n,
        cross_attention_dim=size.token_dim,
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = minidiff.interop.load_unet(folder)
    layout = torch.contiguous_format if device == "cpu" else torch.channels_last
    return theirs.to(device), ours.to(device, memory_format=layout)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    tau: Tensor
    tokens: Tensor
    target: Tensor


def inputs(size: Size, device: str = "cpu") -> Inputs:
    torch.manual_seed(1)
    x, target = torch.randn(2, size.batch, 4, size.resolution, size.resolution)
    tau, tokens = 999 * torch.rand(size.batch), torch.randn(size.batch, size.tokens, size.token_dim)
    return Inputs(*(tensor.to(device) for tensor in (x, tau, tokens, target)))


def call_theirs(net: nn.Module, at: Inputs) -> Tensor:
    return net(at.x, at.tau, at.tokens, return_dict=False)[0]


def call_ours(net: nn.Module, at: Inputs) -> Tensor:
    return net(at.x, at.tau, Cond(tokens=at.tokens))


def theirs_adamw(net: nn.Module) -> torch.optim.Optimizer:
    """As diffusers' training scripts make it."""
    return torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2)


def ours_adamw(net: nn.Module) -> torch.optim.Optimizer:
    return make_adamw(net, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2)


def forward(net: nn.Module, call: Callable, at: Inputs, bf16: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad(), torch.autocast(at.x.device.type, torch.bfloat16, enabled=bf16):
            return call(net, at)

    return run


def training_step(
    net: nn.Module, call: Callable, at: Inputs, bf16: bool, optimizer: torch.optim.Optimizer
) -> Callable[[], Tensor]:
    """Returns one update: loss, gradients, clipping and AdamW."""

    def run() -> Tensor:
        with torch.autocast(at.x.device.type, torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(call(net, at).float(), at.target)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run

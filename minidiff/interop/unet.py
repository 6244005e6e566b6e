"""Stable Diffusion's UNet: a folder of diffusers' `UNet2DConditionModel` ⇄ our `UNet`.

Only names differ, and that we fuse the projections of an attention; both compute the same function. Read the table
from left to right: our names, theirs.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from minidiff.errors import InputError
from minidiff.interop.folder import (
    WEIGHTS,
    Rules,
    listed,
    load_into,
    named_as_theirs,
    read_config,
    read_weights,
    require_supported,
    same,
    write,
)
from minidiff.nn.attention import Pointwise, SpatialTransformer
from minidiff.nn.blocks import Block
from minidiff.nn.unet import UNet

RULES: Rules = (
    (r"^time\.mlp\.0\b", "time_embedding.linear_1"),
    (r"^time\.mlp\.2\b", "time_embedding.linear_2"),
    (r"^time\.vector\.0\b", "class_embedding.linear_1"),
    (r"^time\.vector\.2\b", "class_embedding.linear_2"),
    (r"^time\.vector\b", "class_embedding"),
    (r"^stem\b", "conv_in"),
    (r"^head_norm\b", "conv_norm_out"),
    (r"^head\b", "conv_out"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.res\b", r"\1_blocks.\2.resnets.\3"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.transformer\b", r"\1_blocks.\2.attentions.\3"),
    (r"^(down|up)\.(\d+)\.resample\b", r"\1_blocks.\2.\1samplers.0"),
    (r"^mid_in\.res\b", "mid_block.resnets.0"),
    (r"^mid_in\.transformer\b", "mid_block.attentions.0"),
    (r"^mid_out\.res\b", "mid_block.resnets.1"),
    (r"\b(resnets\.\d+)\.time\b", r"\1.time_emb_proj"),
    (r"\b(resnets\.\d+)\.skip\b", r"\1.conv_shortcut"),
    (r"\b(attentions\.\d+)\.(?=norm_|self_|cross_|feed_)", r"\1.transformer_blocks.0."),
    (r"\bdeeper\.(\d+)\b", lambda found: f"transformer_blocks.{int(found[1]) + 1}"),
    (r"\bnorm_self\b", "norm1"),
    (r"\bnorm_cross\b", "norm2"),
    (r"\bnorm_ff\b", "norm3"),
    (r"\bself_attention\.qkv\b", "attn1.[to_q to_k to_v]"),
    (r"\bself_attention\.out\b", "attn1.to_out.0"),
    (r"\bcross_attention\.q\b", "attn2.to_q"),
    (r"\bcross_attention\.kv\b", "attn2.[to_k to_v]"),
    (r"\bcross_attention\.out\b", "attn2.to_out.0"),
    (r"\bfeed_forward\.proj\b", "ff.net.0.proj"),
    (r"\bfeed_forward\.out\b", "ff.net.2"),
)

# What we can vary, with diffusers' defaults; the last three say nothing about the function that fp32 weights compute.
DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "cross_attention_dim": 1280,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "class_embed_type": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "sample_size": None,
    "upcast_attention": False,
    "addition_embed_type_num_heads": 64,
}

# What we do not vary: the first value is diffusers' default.
ACCEPTED = {
    "center_input_sample": (False,),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None, "simple_projection", "projection"),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}

_ATTENDS = {True: "CrossAttn", False: ""}  # in the names of block types
_VECTOR_LAYERS = {"simple_projection": 1, "projection": 2}


def load_unet(folder: str | Path) -> UNet:
    """Returns the UNet of a folder in the layout of diffusers' `UNet2DConditionModel`, in float32, on the CPU.

    Where it reads more channels than it answers (inpainting), the first `out_channels` are x and the others are
    `cond.image`. Raises `InputError` that names what we cannot build, and `CheckpointError` for files that are missing,
    damaged, pickles, or another model's.
    """
    config = read_config(folder, "UNet2DConditionModel", DEFAULTS, ACCEPTED)
    file = Path(folder) / "config.json"
    require_supported(_flaws(config), file)
    try:
        with torch.device("meta"):  # no time for numbers that are replaced at once
            net = build(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise InputError(
            "MD-INTEROP-007", f"{file} does not describe a UNet ({error}). Take it from the same place as the weights."
        ) from error
    load_into(net, read_weights(folder), RULES, folder)
    return net


def build(config: Mapping) -> UNet:
    """Returns a new UNet with the numbers of a complete configuration (`DEFAULTS` and what differs)."""
    image_channels = max(0, config["in_channels"] - config["out_channels"])
    class_embed = config["class_embed_type"]
    return UNet(
        in_channels=config["in_channels"] - image_channels,
        out_channels=config["out_channels"],
        channels=config["block_out_channels"],
        layers=config["layers_per_block"],
        attend=[x == "CrossAttnDownBlock2D" for x in config["down_block_types"]],
        heads=config["attention_head_dim"],  # the name is historical: these are numbers of heads
        depth=config["transformer_layers_per_block"],
        linear_projection=config["use_linear_projection"],
        mid=config["mid_block_type"] is not None,
        groups=config["norm_num_groups"],
        norm_eps=float(config["norm_eps"]),
        token_dim=same(listed(config["cross_attention_dim"])),
        vector_dim=None if class_embed is None else config["projection_class_embeddings_input_dim"],
        vector_layers=_VECTOR_LAYERS.get(class_embed, 1),
        image_channels=image_channels,
        scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
        cos_first=config["flip_sin_to_cos"],
        freq_shift=float(config["freq_shift"]),
    )


def save_unet(net: UNet, folder: str | Path, sample_size: int | None = None) -> None:
    """Writes `net` so that `load_unet` and diffusers' `UNet2DConditionModel.from_pretrained` can read it, in float32.

    `sample_size` (height of the map in positions) is what diffusers' pipelines take as the default size. Raises
    `InputError` for a network that the format cannot express.
    """
    write(folder, {WEIGHTS: named_as_theirs(net.state_dict(), RULES)}, describe(net, sample_size))


def describe(net: UNet, sample_size: int | None = None) -> dict:
    """Returns the configuration of diffusers' `UNet2DConditionModel` that computes the same function as `net`."""
    if net.positions:
        raise InputError(
            "MD-INTEROP-006",
            "A UNet with net.positions=true adds sines of the place to its features, and diffusers' UNets do not: what "
            "was saved would compute something else. Train with net.positions=false to share the result.",
        )
    firsts = [level.blocks[0] for level in net.down]
    attend = [block.transformer is not None for block in firsts]
    transformers = [m for m in net.modules() if isinstance(m, SpatialTransformer)]
    if net.mid_in is not None:  # which speaks for the coarsest level if that does not attend
        firsts = [*firsts[:-1], net.mid_in]
    shapes = [_heads_and_depth(block) for block in firsts]
    filler = next((x for x in reversed(shapes) if x is not None), (1, 1))  # the format wants numbers for every level
    shapes = [x or filler for x in shapes]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": net.stem.in_channels,
        "out_channels": net.head.out_channels,
        "block_out_channels": [level.blocks[0].res.conv1.out_channels for level in net.down],
        "layers_per_block": same(len(level.blocks) for level in net.down),
        "down_block_types": [f"{_ATTENDS[x]}DownBlock2D" for x in attend],
        "mid_block_type": None if net.mid_in is None else "UNetMidBlock2DCrossAttn",
        "up_block_types": [f"{_ATTENDS[x]}UpBlock2D" for x in reversed(attend)],
        "attention_head_dim": same(heads for heads, _ in shapes),
        "transformer_layers_per_block": same(depth for _, depth in shapes),
        "use_linear_projection": not any(isinstance(x.proj_in, Pointwise) for x in transformers),
        "cross_attention_dim": transformers[0].cross_attention.kv.in_features if transformers else 1,
        "norm_num_groups": net.head_norm.num_groups,
        "norm_eps": net.head_norm.eps,
        "flip_sin_to_cos": net.time.cos_first,
        "freq_shift": net.time.freq_shift,
        "resnet_time_scale_shift": "scale_shift" if net.down[0].blocks[0].res.scale_shift else "default",
        **_describe_vector(net),
    }


def _heads_and_depth(block: Block) -> tuple[int, int] | None:
    x = block.transformer
    return None if x is None else (x.self_attention.heads, 1 + len(x.deeper))


def _describe_vector(net: UNet) -> dict:
    layer = net.time.vector
    if layer is None:
        return {"class_embed_type": None, "projection_class_embeddings_input_dim": None}
    if isinstance(layer, torch.nn.Linear):
        return {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": layer.in_features}
    return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": layer[0].in_features}


def _flaws(config: Mapping) -> list[str]:
    """Returns the values that we cannot build although each option alone could be varied."""
    down, up = config["down_block_types"], config["up_block_types"]
    mirrored = [x.replace("UpBlock2D", "DownBlock2D") for x in reversed(up)]
    depth, width, groups = (
        config[x] for x in ("transformer_layers_per_block", "cross_attention_dim", "norm_num_groups")
    )
    rules = {
        f"up_block_types={up} (only the mirror image of down_block_types={down})": mirrored == down,
        f"transformer_layers_per_block={depth} (only one number per level)": _numbers(depth),
        f"cross_attention_dim={width} (only one width for all levels)": isinstance(same(listed(width)), int),
        f"norm_num_groups={groups} (only a number)": isinstance(groups, int),
    }
    return [flaw for flaw, holds in rules.items() if not holds]


def _numbers(value: object) -> bool:
    return all(isinstance(x, int) for x in listed(value))

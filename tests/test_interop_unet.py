"""Our UNet is diffusers' UNet: the same outputs, the same gradients, the same files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import minidiff
from minidiff.cond import Cond
from minidiff.errors import CheckpointError, InputError
from minidiff.interop import load_unet, save_unet
from minidiff.interop.folder import named_as_theirs, translate
from minidiff.interop.unet import DEFAULTS, RULES, build, describe
from minidiff.nn.unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 24, "norm_num_groups": 8}
SMALL |= {"attention_head_dim": 4, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
SMALL |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
FOUR = {"block_out_channels": [32, 32, 64, 64], "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
FOUR |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
DEEP = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}

SD1 = {"norm_num_groups": 32, "attention_head_dim": 8}

CONFIGS = {
    # at least two channels a group: with one, the gradients of biases before it are nothing but rounding
    "sd1": (FOUR | {"layers_per_block": 2, "block_out_channels": [64, 64, 128, 128]} | SD1, (16, 16)),
    "sd2": (FOUR | {"layers_per_block": 2, "attention_head_dim": [2, 2, 4, 4], "use_linear_projection": True}, (8, 16)),
    "inpainting": (FOUR | {"in_channels": 9}, (8, 8)),
    "odd sizes": (FOUR, (13, 9)),
    "odd sizes, two levels": ({"use_linear_projection": True}, (7, 11)),
    "one level": (
        {"block_out_channels": [32], "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D"]}
        | {"up_block_types": ["CrossAttnUpBlock2D"]},
        (8, 8),
    ),
    "scale-shift": ({"resnet_time_scale_shift": "scale_shift"}, (8, 8)),
    "scale-shift, linear": ({"resnet_time_scale_shift": "scale_shift", "use_linear_projection": True}, (8, 8)),
    "one head": ({"attention_head_dim": 1}, (8, 8)),
    "heads per level": (DEEP | {"attention_head_dim": [2, 16]}, (8, 8)),
    "deeper transformers": (DEEP | {"transformer_layers_per_block": 3}, (8, 8)),
    "depth per level": (DEEP | {"transformer_layers_per_block": [1, 2], "use_linear_projection": True}, (8, 8)),
    "vector, one layer": (
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 10},
        (8, 8),
    ),
    "vector, two layers": ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10}, (8, 8)),
    "sines first, shifted": ({"flip_sin_to_cos": False, "freq_shift": 1}, (8, 8)),
    "epsilon and channels": ({"norm_eps": 1e-3, "in_channels": 3, "out_channels": 6}, (8, 8)),
    "layers per level": ({"layers_per_block": [1, 2]}, (8, 8)),
    "no middle": ({"mid_block_type": None}, (8, 8)),
}


def randomise(net: torch.nn.Module) -> torch.nn.Module:
    """A new network has layers of zeros and norms of ones, which hide what flows through them."""
    torch.manual_seed(0)
    for name, p in net.named_parameters():
        torch.nn.init.normal_(
            p, mean=float("norm" in name and name.endswith("weight")), std=0.1 if p.ndim == 1 else 0.05
        )
    return net.eval()


def foreign(changes: dict, folder: Path) -> UNet2DConditionModel:
    net = randomise(UNet2DConditionModel.from_config({"sample_size": 8} | SMALL | changes))
    net.save_pretrained(folder)
    return net


def inputs(net: UNet2DConditionModel, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    torch.manual_seed(1)
    width = net.config.projection_class_embeddings_input_dim
    cond = Cond(tokens=torch.randn(2, 7, 24), vector=None if width is None else torch.randn(2, width))
    return torch.randn(2, net.config.in_channels, *size), torch.tensor([3.0, 981.5]), cond


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_diffusers(name, tmp_path, record_property):
    changes, size = CONFIGS[name]
    theirs = foreign(changes, tmp_path)
    ours = load_unet(tmp_path)
    x, tau, cond = inputs(theirs, size)
    expected = theirs(x, tau, cond.tokens, class_labels=cond.vector).sample
    answer = ours(x, tau, cond)
    error = relative(answer, expected)
    record_property("relative error", error)
    assert expected.std() > 1e-2 and error < 1e-5

    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (answer * direction).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    errors = [
        relative(p.grad, torch.cat([gradients.pop(part) for part in translate(own, RULES)]))
        for own, p in ours.named_parameters()
    ]
    record_property("relative error of gradients", max(errors))
    assert not gradients and max(errors) < 1e-4


REAL = {
    "Stable Diffusion 1.5": ({"cross_attention_dim": 768}, 859_520_964),
    "its inpainting": ({"cross_attention_dim": 768, "in_channels": 9}, 859_535_364),
    "Stable Diffusion 2.1": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        865_910_724,
    ),
    "2.1 unCLIP": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
        | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
        None,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_have_our_tensors(name):
    """At full size, without memory for the numbers: names and shapes."""
    changes, parameters = REAL[name]
    with torch.device("meta"):
        theirs, ours = UNet2DConditionModel(**changes).state_dict(), build(DEFAULTS | changes)
    named = named_as_theirs(ours.state_dict(), RULES)
    assert {x: y.shape for x, y in named.items()} == {x: y.shape for x, y in theirs.items()}
    assert parameters in (None, sum(x.numel() for x in ours.parameters()))


def test_masked_tokens_are_those_of_diffusers(tmp_path):
    theirs = foreign({}, tmp_path)
    x, tau, cond = inputs(theirs, (8, 8))
    mask = torch.arange(7)[None] < torch.tensor([[3], [7]])
    expected = theirs(x, tau, cond.tokens, encoder_attention_mask=mask).sample
    assert relative(load_unet(tmp_path)(x, tau, Cond(tokens=cond.tokens, mask=mask)), expected) < 1e-5


def test_inpainting_reads_mask_and_picture_from_the_image_port(tmp_path):
    theirs = foreign({"in_channels": 9}, tmp_path)
    x, tau, cond = inputs(theirs, (8, 8))
    answer = load_unet(tmp_path)(x[:, :4], tau, cond.merge(Cond(image=x[:, 4:])))
    assert relative(answer, theirs(x, tau, cond.tokens).sample) < 1e-5


@pytest.mark.parametrize("name", ["sd1", "sd2", "inpainting", "scale-shift", "depth per level", "layers per level"])
def test_round_trip_is_exact_and_diffusers_loads_what_we_save(name, tmp_path):
    theirs = foreign(CONFIGS[name][0], tmp_path / "theirs")
    save_unet(load_unet(tmp_path / "theirs"), tmp_path / "ours", sample_size=8)
    again = UNet2DConditionModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    saved, original = again.state_dict(), theirs.state_dict()
    assert saved.keys() == original.keys() and all(torch.equal(saved[x], original[x]) for x in original)
    ignore = {"_name_or_path", "_use_default_values"}
    mine, want = ({k: v for k, v in net.config.items() if k not in ignore} for net in (again, theirs))
    assert {k: v for k, v in mine.items() if v != want[k] and set(as_list(v)) != set(as_list(want[k]))} == {}
    twice, once = load_unet(tmp_path / "ours").state_dict(), load_unet(tmp_path / "theirs").state_dict()
    assert all(torch.equal(twice[x], once[x]) for x in once)


def as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(
    "numbers",
    [
        {"vector_dim": 5, "scale_shift": True, "attend": [False, True]},
        {"vector_dim": 5, "vector_layers": 2, "attend": [False, False], "heads": [3, 4], "groups": 4},
        {"head_dim": 4, "depth": [2, 1], "linear_projection": False, "image_channels": 4, "attend": [True, False]},
        {"mid": False, "cos_first": False, "freq_shift": 1.0, "norm_eps": 1e-6, "attend": [True, True]},
    ],
)
def test_diffusers_computes_what_our_own_networks_compute(numbers, tmp_path):
    net = UNet(
        in_channels=4, out_channels=4, **({"channels": [16, 32], "layers": 1, "token_dim": 24, "groups": 8} | numbers)
    )
    randomise(net)
    minidiff.interop.save_unet(net, tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path)
    x, tau, cond = inputs(theirs, (8, 8))
    answer = net(x, tau, cond)
    assert relative(answer, theirs(x, tau, cond.tokens, class_labels=cond.vector).sample) < 1e-5
    assert torch.equal(load_unet(tmp_path)(x, tau, cond), answer)


def test_names_are_those_of_the_network_within_wrappers(good):
    net = load_unet(good)
    plain, wrapped = (named_as_theirs(x.state_dict(), RULES) for x in (net, torch.compile(net)))  # compiles nothing yet
    assert wrapped.keys() == plain.keys()


def test_head_dim_is_the_number_of_channels_per_head():
    net = UNet(in_channels=3, out_channels=3, channels=[16, 32], layers=1, attend=[True, True], head_dim=8, groups=4)
    assert describe(net)["attention_head_dim"] == [2, 4]


def test_a_network_that_the_format_cannot_express_is_refused(tmp_path):
    net = UNet(in_channels=3, out_channels=3, channels=[16], attend=[True], groups=4, positions=True)
    with pytest.raises(InputError, match="MD-INTEROP-006"):
        save_unet(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_and_half_precision_load_as_float32(tmp_path):
    theirs = foreign({}, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 1
    whole, shards = load_unet(tmp_path / "whole").state_dict(), load_unet(tmp_path / "shards").state_dict()
    assert all(torch.equal(whole[x], shards[x]) for x in whole)
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    for name, x in load_unet(tmp_path / "half").state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, whole[name].half().float())


UNSUPPORTED = {
    "addition_embed_type": "text_time",
    "class_embed_type": "timestep",
    "num_class_embeds": 1000,
    "only_cross_attention": [True, False],
    "dual_cross_attention": True,
    "encoder_hid_dim": 32,
    "act_fn": "gelu",
    "time_cond_proj_dim": 256,
    "resnet_skip_time_act": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": [24, 32],
    "norm_num_groups": None,
    "_class_name": "ControlNetModel",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    foreign({}, folder)
    return folder


def changed(good: Path, folder: Path, **values) -> Path:
    shutil.copytree(good, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_we_cannot_build_is_named(key, good, tmp_path):
    with pytest.raises(InputError, match=rf"MD-INTEROP-004.*{key}="):
        load_unet(changed(good, tmp_path, **{key: UNSUPPORTED[key]}))


def test_all_of_it_is_named_at_once_and_defaults_are_fine(good, tmp_path):
    values = {key: UNSUPPORTED[key] for key in ("act_fn", "encoder_hid_dim", "dual_cross_attention")}
    with pytest.raises(InputError) as caught:
        load_unet(changed(good, tmp_path, **values))
    assert all(key in str(caught.value) for key in values)
    load_unet(changed(good, tmp_path / "fine", only_cross_attention=[False, False], dropout=0.0, act_fn="swish"))


def test_options_from_the_future_are_ignored_aloud(good, tmp_path):
    with pytest.warns(UserWarning, match="quantum_attention"):
        load_unet(changed(good, tmp_path, quantum_attention="yes"))


@pytest.mark.parametrize("values", [{"block_out_channels": 32}, {"attention_head_dim": "8"}, {"norm_eps": "small"}])
def test_values_without_sense_are_refused_in_words(values, good, tmp_path):
    with pytest.raises(InputError, match="MD-INTEROP-007.*does not describe a UNet"):
        load_unet(changed(good, tmp_path, **values))


def test_differences_are_reported_five_of_each_kind(good, tmp_path):
    folder = changed(good, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    gone = [x for x in tensors if ".resnets." in x]
    kept = {name: x for name, x in tensors.items() if name not in gone}
    kept |= {"extra.weight": torch.zeros(1), "conv_in.weight": torch.zeros(2, 2)}
    save_file(kept, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="MD-INTEROP-005") as caught:
        load_unet(folder)
    text = str(caught.value)
    assert f"{len(gone)} missing: " in text and sum(x in text for x in gone) == 5
    assert "1 left over: extra.weight" in text and "1 of another shape: conv_in.weight [2, 2]" in text


def test_bad_folders_are_refused_by_name(good, tmp_path):
    with pytest.raises(CheckpointError, match="MD-INTEROP-001.*nowhere"):
        load_unet(tmp_path / "nowhere")
    folder = changed(good, tmp_path / "config")
    (folder / "config.json").write_text('{"in_channels": 4')
    with pytest.raises(CheckpointError, match=r"MD-INTEROP-003.*config\.json"):
        load_unet(folder)
    folder = changed(good, tmp_path / "truncated")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"MD-CKPT-014.*{WEIGHTS}"):
        load_unet(folder)
    folder = changed(good, tmp_path / "header")
    (folder / WEIGHTS).write_bytes(b"\xff" * 8 + (folder / WEIGHTS).read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"MD-CKPT-014.*{WEIGHTS}"):
        load_unet(folder)
    folder = changed(good, tmp_path / "unreadable")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="MD-INTEROP-001.*unreadable"):
        load_unet(folder)


def test_a_flipped_bit_in_what_we_saved_is_noticed(good, tmp_path):
    save_unet(load_unet(good), tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1001] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"MD-INTEROP-003.*{WEIGHTS}"):
        load_unet(tmp_path)


def test_a_pickle_is_refused_with_the_way_out(good, tmp_path):
    folder = changed(good, tmp_path)
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"MD-INTEROP-002.*model\.bin.*weights_only=True.*save_file"):
        load_unet(folder)


def test_a_shard_that_is_missing_or_elsewhere_is_refused(good, tmp_path):
    folder, index = changed(good, tmp_path), tmp_path / f"{WEIGHTS}.index.json"
    (folder / WEIGHTS).unlink()
    for shard, code in {"part.safetensors": "MD-INTEROP-001", "../part.safetensors": "MD-INTEROP-003"}.items():
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
        with pytest.raises(CheckpointError, match=f"{code}.*part.safetensors"):
            load_unet(folder)

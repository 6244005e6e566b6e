"""Our adapters are peft's: the same outputs, attached and merged, and the same files."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from minidiff.cond import Cond
from minidiff.errors import CheckpointError, InputError
from minidiff.interop import load_lora, load_unet, save_lora
from minidiff.nn.lora import LoRA, fresh
from minidiff.nn.unet import UNet

FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv_shortcut", "conv_in"]
EVERYWHERE += ["time_emb_proj", "linear_1", "downsamplers.0.conv"]
X, TAU, COND = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), Cond(tokens=torch.randn(2, 5, 24))


def randomise(net: torch.nn.Module, only: str = "") -> None:
    for name, p in net.named_parameters():
        if only in name:
            torch.nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.1)


def foreign(folder: Path, linear: bool = True) -> UNet2DConditionModel:
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        block_out_channels=[16, 32],
        layers_per_block=1,
        cross_attention_dim=24,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        use_linear_projection=linear,
    )
    randomise(net)
    net.save_pretrained(folder)
    return net.eval()


def adapted(net: UNet2DConditionModel, modules: list[str], folder: Path, rank: int = 4, alpha: float = 4) -> None:
    net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, init_lora_weights=False))
    randomise(net, only="lora_")
    net.save_lora_adapter(folder)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def answer(net: UNet, lora: LoRA, scale: float = 1.0) -> torch.Tensor:
    with lora.attached(net, scale), torch.no_grad():
        return net(X, TAU, COND)


@pytest.mark.parametrize("alpha", [4, 10])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("modules", [ATTENTION, ["to_v"], EVERYWHERE], ids=["attention", "values", "everywhere"])
@torch.no_grad()
def test_attached_and_merged_are_those_of_peft(modules, linear, alpha, tmp_path, record_property):
    theirs = foreign(tmp_path / "unet", linear)
    net = load_unet(tmp_path / "unet")
    plain = net(X, TAU, COND)
    adapted(theirs, modules, tmp_path / "lora", alpha=alpha)
    lora = load_lora(tmp_path / "lora", net)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    errors = []
    for scale in (1.0, 0.3):
        theirs.set_adapters(["default"], [scale])
        expected = theirs(X, TAU, COND.tokens).sample
        assert relative(plain, expected) > 1e-3
        errors.append(relative(answer(net, lora, scale), expected))
        lora.merge(net, scale)
        errors.append(relative(net(X, TAU, COND), expected))
        lora.unmerge(net)
        assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    record_property("relative errors", errors)
    assert max(errors) < 1e-5
    assert torch.equal(net(X, TAU, COND), plain)


@pytest.mark.parametrize("alpha", [4, 7])
def test_round_trip_is_exact_and_diffusers_loads_what_we_save(alpha, tmp_path):
    theirs = foreign(tmp_path / "unet")
    net = load_unet(tmp_path / "unet")
    adapted(foreign(tmp_path / "unet"), EVERYWHERE, tmp_path / "lora", alpha=alpha)
    lora = load_lora(tmp_path / "lora", net)
    save_lora(lora, tmp_path / "ours")
    again = load_lora(tmp_path / "ours" / FILE, net)
    save_lora(again, tmp_path / "twice.safetensors")
    first, second = load_file(tmp_path / "lora" / FILE), load_file(tmp_path / "twice.safetensors")
    assert {f"unet.{name}" for name in first} == second.keys()
    assert all(torch.equal(x, second[f"unet.{name}"]) for name, x in first.items())
    theirs.load_lora_adapter(tmp_path / "ours", weight_name=FILE, prefix="unet")
    assert relative(answer(net, again), theirs(X, TAU, COND.tokens).sample) < 1e-5


def respelled(tensors: dict, style: str) -> dict:
    """Returns a file of peft's as others spell it."""
    older = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    processors = {
        f".{x}.lora_{a}.": f".processor.{x.removesuffix('.0')}_lora.{b}."
        for x in ATTENTION
        for a, b in (("A", "down"), ("B", "up"))
    }
    result = {}
    for name, x in tensors.items():
        if style == "kohya":
            module, _, kind = name.rpartition(".lora_")
            name = f"lora_unet_{module.replace('.', '_')}.lora_{'down' if kind.startswith('A') else 'up'}.weight"
        else:
            for old, new in (older if style == "older" else processors).items():
                name = name.replace(old, new)
            name = f"unet.{name}"
        result[name] = x
    return result


@pytest.mark.parametrize("style", ["older", "processors", "kohya"])
def test_other_spellings_are_read(style, tmp_path):
    theirs = foreign(tmp_path / "unet")
    net = load_unet(tmp_path / "unet")
    adapted(theirs, ATTENTION, tmp_path / "lora")
    expected = answer(net, load_lora(tmp_path / "lora", net))
    tensors = respelled(load_file(tmp_path / "lora" / FILE), style)
    save_file(tensors, tmp_path / "other.safetensors")
    assert torch.equal(answer(net, load_lora(tmp_path / "other.safetensors", net)), expected)


def test_alpha_in_the_file_scales_the_change(tmp_path):
    theirs = foreign(tmp_path / "unet")
    net = load_unet(tmp_path / "unet")
    adapted(foreign(tmp_path / "unet"), ATTENTION, tmp_path / "lora", rank=4)
    tensors = load_file(tmp_path / "lora" / FILE)
    modules = {name.split(".lora_")[0] for name in tensors}
    alphas = {f"{module}.alpha": torch.tensor(float(i % 3 + 1)) for i, module in enumerate(sorted(modules))}
    save_file(tensors | alphas, tmp_path / "x.safetensors")
    prefixed = {f"unet.{name}": x for name, x in tensors.items()}
    values = {f"unet.{name}": x.item() for name, x in alphas.items()}
    theirs.load_lora_adapter(prefixed, prefix="unet", network_alphas=values)
    ours = answer(net, load_lora(tmp_path / "x.safetensors", net))
    assert relative(ours, theirs(X, TAU, COND.tokens).sample) < 1e-5


def test_a_fresh_adapter_changes_nothing_and_learns(tmp_path):
    foreign(tmp_path)
    net = load_unet(tmp_path)
    lora = fresh(net, rank=2, alpha=4.0)
    assert torch.equal(answer(net, lora), net(X, TAU, COND))
    with lora.attached(net):
        net(X, TAU, COND).square().sum().backward()
    assert all(change.up.grad.abs().sum() > 0 for change in lora.changes)
    assert len(lora.changes) == sum(8 for m in net.modules() if hasattr(m, "cross_attention"))


def test_merging_out_of_order_is_refused(tmp_path):
    foreign(tmp_path)
    net = load_unet(tmp_path)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    one, two = fresh(net, rank=2), fresh(net, rank=2)
    randomise(one)
    randomise(two)
    with pytest.raises(InputError, match="MD-LORA-002"):
        one.unmerge(net)
    one.merge(net)
    with pytest.raises(InputError, match="MD-LORA-001"):
        one.merge(net, 0.5)
    two.merge(net)
    with pytest.raises(InputError, match="MD-LORA-002"):
        one.unmerge(net)
    two.unmerge(net)
    one.unmerge(net)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_a_lora_for_another_network_is_refused_by_name(tmp_path):
    theirs = foreign(tmp_path / "unet")
    adapted(theirs, ATTENTION, tmp_path / "lora")
    net = load_unet(tmp_path / "unet")
    tensors = load_file(tmp_path / "lora" / FILE)
    first = next(name for name in tensors if "lora_A" in name)
    module = first.removesuffix(".lora_A.weight")
    for changed, words in (
        (tensors | {"unet.nowhere.lora_A.weight": torch.zeros(4, 4)}, "1 left over: unet.nowhere"),
        ({name: x for name, x in tensors.items() if name != first}, f"1 without their counterpart: {module}"),
        (tensors | {first: torch.zeros(4, 99)}, f"1 of another shape: {module}"),
        (tensors | {f"{module}.lora_magnitude_vector": torch.zeros(16)}, "1 left over: .*magnitude"),
        ({}, "it holds none"),
    ):
        save_file(changed, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=f"MD-INTEROP-011.*{words}"):
            load_lora(tmp_path / "x.safetensors", net)


def test_parts_for_text_encoders_are_left_out_aloud(tmp_path):
    adapted(foreign(tmp_path / "unet"), ATTENTION, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / FILE) | {"text_encoder.x.lora_A.weight": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="1 tensors of .* text encoder"):
        lora = load_lora(tmp_path / "x.safetensors", load_unet(tmp_path / "unet"))
    assert len(lora.changes) == (len(tensors) - 1) // 2


def test_rank_stabilised_adapters_are_refused(tmp_path):
    net = foreign(tmp_path / "unet")
    net.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, use_rslora=True))
    net.save_lora_adapter(tmp_path / "lora")
    with pytest.raises(InputError, match="MD-INTEROP-012"):
        load_lora(tmp_path / "lora", load_unet(tmp_path / "unet"))

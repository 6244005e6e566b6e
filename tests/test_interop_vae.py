"""Our autoencoders are diffusers' AutoencoderKL and AutoencoderTiny, and TAESD's own files."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from minidiff.errors import CheckpointError, InputError
from minidiff.interop import load_tiny_vae, load_vae, save_vae
from minidiff.interop.folder import named_as_theirs
from minidiff.interop.vae import RULES
from minidiff.nn.tiny_vae import TinyVAE
from minidiff.nn.vae import VAE

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real data, where it exists
TWO = {"block_out_channels": [16, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 8}
TWO |= {"up_block_types": ["UpDecoderBlock2D"] * 2}
FOUR = {"block_out_channels": [32, 64, 64, 64], "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2}
FOUR |= {"up_block_types": ["UpDecoderBlock2D"] * 4}

CONFIGS = {
    "sd1": (FOUR, (32, 48)),
    "no quantisation": (TWO | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}, (16, 16)),
    "no attention": (TWO | {"mid_block_add_attention": False, "in_channels": 4, "out_channels": 4}, (16, 16)),
    "one level": ({"block_out_channels": [32], "norm_num_groups": 4, "layers_per_block": 3}, (8, 8)),
    "odd sizes": (TWO | {"scaling_factor": 0.5, "shift_factor": 0.25}, (13, 19)),
}


def randomise(net: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for name, p in net.named_parameters():
        torch.nn.init.normal_(
            p, mean=float("norm" in name and name.endswith("weight")), std=0.1 if p.ndim == 1 else 0.06
        )
    return net.eval()


def foreign(kind: type, config: dict, folder: Path):
    net = randomise(kind.from_config(config))
    net.save_pretrained(folder)
    return net


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_encodes_and_decodes_as_diffusers_and_round_trips(name, tmp_path, record_property):
    config, size = CONFIGS[name]
    theirs = foreign(AutoencoderKL, config, tmp_path / "theirs")
    ours = load_vae(tmp_path / "theirs")
    images = torch.randn(2, theirs.config.in_channels, *size)
    expected, posterior = theirs.encode(images).latent_dist, ours.encode(images)
    errors = {
        "mean": relative(posterior.mean, expected.mean),
        "logvar": relative(posterior.logvar, expected.logvar),
        "decode": relative(ours.decode(expected.mean), theirs.decode(expected.mean).sample),
        "kl": relative(posterior.kl(), expected.kl()),
    }
    record_property("relative errors", errors)
    assert expected.mean.std() > 1e-2 and max(errors.values()) < 1e-5
    noise = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert relative(posterior.sample(noise[0]), expected.sample(noise[1])) < 1e-5
    assert (ours.scale, ours.shift) == (theirs.config.scaling_factor, theirs.config.shift_factor or 0)

    save_vae(ours, tmp_path / "ours")
    again = AutoencoderKL.from_pretrained(tmp_path / "ours")
    saved, original = again.state_dict(), theirs.state_dict()
    assert saved.keys() == original.keys() and all(torch.equal(saved[x], original[x]) for x in original)
    ours_now, theirs_then = (
        {k: str(v).strip("()[],") for k, v in x.config.items() if k[0] != "_"} for x in (again, theirs)
    )
    assert ours_now == theirs_then
    twice, once = load_vae(tmp_path / "ours").state_dict(), ours.state_dict()
    assert all(torch.equal(twice[x], once[x]) for x in once)


def test_the_vae_of_stable_diffusion_has_our_tensors():
    """At full size, without memory for the numbers: names and shapes."""
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        theirs = AutoencoderKL(block_out_channels=[128, 256, 512, 512], layers_per_block=2, **levels).state_dict()
        ours = VAE()
    named = named_as_theirs(ours.state_dict(), RULES)
    assert {x: y.shape for x, y in named.items()} == {x: y.shape for x, y in theirs.items()}
    assert sum(x.numel() for x in ours.parameters()) == 83_653_863


def test_gradients_are_those_of_diffusers(tmp_path):
    theirs = foreign(AutoencoderKL, TWO, tmp_path)
    ours, images = load_vae(tmp_path), torch.randn(2, 3, 16, 16)
    inputs = [images.clone().requires_grad_(), images.clone().requires_grad_()]
    theirs.decode(theirs.encode(inputs[0]).latent_dist.mean).sample.square().sum().backward()
    ours.decode(ours.encode(inputs[1]).mean).square().sum().backward()
    assert relative(inputs[1].grad, inputs[0].grad) < 1e-4


def test_attention_names_of_2022_are_read(tmp_path):
    foreign(AutoencoderKL, TWO, tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / "new" / WEIGHTS)
    for new, old in names.items():
        tensors = {name.replace(new, old): x for name, x in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    new, old = load_vae(tmp_path / "new").state_dict(), load_vae(tmp_path / "old").state_dict()
    assert all(torch.equal(new[x], old[x]) for x in new)


TINY = {"encoder_block_out_channels": [16] * 4, "decoder_block_out_channels": [16] * 4}
TINY_CONFIGS = {
    "taesd": TINY,
    "taef1": TINY | {"latent_channels": 16, "shift_factor": 0.25, "scaling_factor": 2.0},
    "two levels": {"encoder_block_out_channels": [24] * 2, "decoder_block_out_channels": [24] * 2}
    | {"num_encoder_blocks": [2, 1], "num_decoder_blocks": [1, 3]},
}


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_tiny_encodes_and_decodes_as_diffusers_and_round_trips(name, tmp_path):
    theirs = foreign(AutoencoderTiny, TINY_CONFIGS[name], tmp_path / "theirs")
    ours, images = load_vae(tmp_path / "theirs"), torch.randn(2, 3, 32, 16)
    z = theirs.encode(images).latents
    assert z.std() > 1e-2 and relative(ours.encode(images), z) < 1e-5
    assert relative(ours.decode(z), theirs.decode(z).sample) < 1e-5
    save_vae(ours, tmp_path / "ours")
    again = AutoencoderTiny.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[x], y) for x, y in theirs.state_dict().items())
    assert load_vae(tmp_path / "ours").scale == theirs.config.scaling_factor


def test_taesd_files_and_one_file_are_read(tmp_path):
    """TAESD's author counts the decoder's clamp as layer 0, diffusers does not."""
    theirs = foreign(AutoencoderTiny, TINY, tmp_path / "folder")
    expected = load_vae(tmp_path / "folder").state_dict()
    encoder = {name.removeprefix("layers."): x for name, x in theirs.encoder.state_dict().items()}
    decoder = {name.removeprefix("layers."): x for name, x in theirs.decoder.state_dict().items()}
    decoder = {f"{int(name.split('.')[0]) + 1}.{name.split('.', 1)[1]}": x for name, x in decoder.items()}
    pair = tmp_path / "taesd_encoder.safetensors", tmp_path / "taesd_decoder.safetensors"
    save_file({name: x.half() for name, x in encoder.items()}, pair[0])
    save_file(decoder, pair[1])
    save_file(theirs.state_dict(), tmp_path / "both.safetensors")
    for vae in (load_vae(tmp_path), load_tiny_vae(*pair), load_vae(tmp_path / "both.safetensors")):
        own = vae.state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[x], y) for x, y in expected.items() if x.startswith("decoder"))
        assert all(torch.equal(own[x].half(), y.half()) for x, y in expected.items())


def test_an_autoencoder_with_pool_round_trips_as_a_pair_of_files(tmp_path):
    vae = randomise(TinyVAE(channels=8, latent_channels=32, pool=True))
    save_vae(vae, tmp_path)
    again, images = load_vae(tmp_path), torch.randn(1, 3, 32, 32)
    assert again.pool and torch.equal(again.decode(again.encode(images)), vae.decode(vae.encode(images)))


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="no shared data")
def test_real_taef2_rebuilds_emoji_to_28_decibels(record_property):
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    pictures = []
    for file in sorted((SHARED / "emoji64").glob("*.parquet")):  # one a style
        column = parquet.read_table(file, columns=["image"])["image"]
        rows = column.take(torch.linspace(0, len(column) - 1, 17).long().numpy()).to_pylist()
        pictures += [Image.open(io.BytesIO(row["bytes"])).convert("RGBA") for row in rows]
    pictures = pictures[:100]
    white = [Image.alpha_composite(Image.new("RGBA", x.size, "white"), x).convert("RGB") for x in pictures]
    images = torch.from_numpy(np.stack([np.asarray(x) for x in white])).permute(0, 3, 1, 2) / 127.5 - 1
    vae = load_vae(SHARED / "weights")
    with torch.no_grad():
        z = vae.encode(images)
        rebuilt = vae.decode(z).clamp(-1, 1)
    psnr = -10 * torch.log10(((rebuilt - images) / 2).square().mean((1, 2, 3)))
    record_property("PSNR", psnr.mean().item())
    assert len(images) == 100 and z.shape == (100, 32, 8, 8) and psnr.mean() >= 28


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    foreign(AutoencoderKL, TWO, folder)
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"act_fn": "relu"},
        {"latents_mean": [0.0, 1.0]},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        {"_class_name": "VQModel"},
    ],
)
def test_what_we_cannot_build_is_named(values, good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(InputError, match=f"MD-INTEROP-004.*{next(iter(values))}="):
        load_vae(tmp_path)


def test_bad_folders_are_refused_by_name(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "senseless")
    (folder / "config.json").write_text(json.dumps({"block_out_channels": [16], "norm_num_groups": 5}))
    with pytest.raises(InputError, match="MD-INTEROP-010.*senseless"):
        load_vae(folder)
    folder = shutil.copytree(good, tmp_path / "truncated")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"MD-CKPT-014.*{WEIGHTS}"):
        load_vae(folder)
    folder = shutil.copytree(good, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    with pytest.raises(CheckpointError, match=r"MD-INTEROP-005.*of another shape: \S*conv_out.weight"):
        load_vae(folder)
    with pytest.raises(CheckpointError, match="MD-INTEROP-001"):
        load_vae(tmp_path)


def test_a_file_without_an_autoencoder_is_refused(tmp_path):
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="MD-INTEROP-009.*some.weight"):
        load_vae(tmp_path / "x.safetensors")
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (tmp_path / "x.ckpt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="MD-INTEROP-002.*x.ckpt"):
        load_vae(tmp_path / "x.ckpt")


def test_a_tiny_configuration_without_sense_is_refused(tmp_path):
    foreign(AutoencoderTiny, TINY, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_encoder_blocks": 3}))
    with pytest.raises(InputError, match="MD-INTEROP-013"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_block_out_channels": [16, 16, 16, 32]}))
    with pytest.raises(InputError, match="MD-INTEROP-004.*only one width"):
        load_vae(tmp_path)

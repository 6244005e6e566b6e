"""Whole Stable Diffusion folders: we draw what diffusers' StableDiffusionPipeline draws, and write what it reads."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train
from PIL import Image
from safetensors.torch import load_file, save_file
from test_interop_text import END, PLAIN, PROJECTED, standard_vocabulary
from test_interop_text import folder as write_text
from test_interop_unet import SMALL, randomise
from test_interop_vae import TINY

import minidiff
from minidiff import grids, samplers, viz
from minidiff.errors import CheckpointError, InputError, MinidiffError
from minidiff.interop import load_lora, load_pipeline, save_lora, save_pipeline
from minidiff.nn.lora import fresh
from minidiff.nn.tiny_vae import TinyVAE
from minidiff.nn.vae import VAE
from minidiff.pipeline import ImageNoise

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddim as of old": ("DDIMScheduler", {"clip_sample": True, "steps_offset": 0}),  # the library's pipeline mends both
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
LEVELS = {"block_out_channels": [32, 64], "sample_size": 16, "cross_attention_dim": 32, "layers_per_block": 2}
KL = {"block_out_channels": [16, 32, 32], "norm_num_groups": 8, "down_block_types": ["DownEncoderBlock2D"] * 3}
KL |= {"up_block_types": ["UpDecoderBlock2D"] * 3, "scaling_factor": 0.25}
ATTEND = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
PER_LEVEL = ATTEND | {"attention_head_dim": [2, 4], "use_linear_projection": True}
# the UNet, the autoencoder, the text encoder's padding and its numbers, what the network predicts
FOLDERS = {
    "sd1": ({}, KL, END, {"hidden_act": "quick_gelu", "eos_token_id": 2}, "epsilon"),
    "sd2": (PER_LEVEL, KL, "!", {"hidden_act": "gelu", "num_hidden_layers": 3}, "v_prediction"),
    "taesd": ({}, TINY | {"num_encoder_blocks": [1] * 3, "num_decoder_blocks": [1] * 3}, END, {}, "epsilon"),
}
FOLDERS["taesd"][1].update({f"{part}_block_out_channels": [16] * 3 for part in ("encoder", "decoder")})


def write(place: Path, name: str) -> Path:
    """Has diffusers and transformers write a small folder with random weights."""
    unet, vae, pad, text, predicts = FOLDERS[name]
    write_text(place, PLAIN, pad, standard_vocabulary(), **text)
    kind = diffusers.AutoencoderTiny if name == "taesd" else diffusers.AutoencoderKL
    net = randomise(diffusers.UNet2DConditionModel.from_config(SMALL | LEVELS | unet))
    for p in (net.conv_out.weight, net.conv_out.bias):
        p.data *= 3  # an answer of about unit size, so that latents neither vanish nor explode
    pipe = diffusers.StableDiffusionPipeline(
        unet=net,
        vae=randomise(kind.from_config(vae)),
        scheduler=diffusers.DDIMScheduler(**SD | SCHEDULERS["ddim"][1], prediction_type=predicts),
        text_encoder=transformers.CLIPTextModel.from_pretrained(place / "text_encoder"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(place / "tokenizer"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    kept = {x.name: x.read_bytes() for x in (place / "tokenizer").iterdir()}
    pipe.save_pretrained(place)
    if name == "sd2":  # as published, where only the map of special tokens names the padding
        shutil.rmtree(place / "tokenizer")
        (place / "tokenizer").mkdir()
        for file, content in kept.items():
            (place / "tokenizer" / file).write_bytes(content)
    return place


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name), name) for name in FOLDERS}


@pytest.fixture
def copy(folders, tmp_path):
    """Gives a copy of a folder, to be changed."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / "copy"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def theirs(pipe, prompt: str, *, noise: torch.Tensor, negative: str, steps: int, guidance: float) -> np.ndarray:
    """Returns the library's picture, by a pipeline or by the folder of one."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipe) if isinstance(pipe, Path) else pipe
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": steps, "guidance_scale": guidance, "latents": noise}
    return np.asarray(pipe(prompt, negative_prompt=negative, **how).images[0])


def differences(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Returns the share of pixels that differ by at most one grey level, and by none."""
    assert a.shape == b.shape
    off = np.abs(a.astype(int) - b.astype(int)).max(2)
    return (off <= 1).mean(), (off == 0).mean()


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "name, scheduler",
    [(name, x) for name in ("sd1", "sd2") for x in SCHEDULERS if (name, x) != ("sd2", "ddim as of old")],
)
def test_the_picture_is_diffusers_with_and_without_guidance(copy, name, scheduler, record_property):
    folder = copy(name)
    kind, settings = SCHEDULERS[scheduler]
    settings = SD | {"prediction_type": FOLDERS[name][4]} | settings
    getattr(diffusers, kind)(**settings).save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of clipping, which the pipeline turns off
        pipe = load_pipeline(folder)
    assert pipe.space.shape == (4, 16, 16) and pipe.space.image_size == 64
    prompt, negative = "a photo of an astronaut riding a horse!", "blurry, ugly"
    noise = ImageNoise([3])(torch.empty(1, *pipe.space.shape))
    library = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for guidance in (7.5, 1.0):
        how = {"negative": negative, "guidance": guidance, "steps": 9}
        expected = theirs(library, prompt, noise=noise, **how)
        picture = np.asarray(pipe(prompt, seed=3, **how)[0])
        within, equal = differences(picture, expected)
        record_property(f"guidance {guidance}: pixels within 1/255, equal", (float(within), float(equal)))
        assert ((expected > 0) & (expected < 255)).mean() > 0.5 and expected.std() > 10  # there is something to see
        assert within >= 0.999


def test_the_prompts_of_both_branches_matter(folders):
    pipe = load_pipeline(folders["sd1"])
    how = {"steps": 4, "guidance": 7.5}
    one = pipe("a star", **how)[0]
    assert one == pipe("a star", negative="", **how)[0]
    expected = theirs(folders["sd1"], "a star", noise=ImageNoise([0])(torch.empty(1, 4, 16, 16)), negative="", **how)
    assert differences(np.asarray(one), expected)[0] >= 0.999
    assert one != pipe("a moon", **how)[0] and one != pipe("a star", negative="a moon", **how)[0]


def test_a_folder_is_a_pipeline_like_any_other(folders):
    pipe = minidiff.load(folders["sd1"], device="cpu")
    assert pipe.sampling.steps == 50 and pipe.sampling.guidance == 7.5 and pipe.name == folders["sd1"].name
    states = list(pipe.steps("a star", seed=5, steps=3))
    assert len(states) == 4 and states[0].xt.shape == (4, 16, 16) and states[0].image.size == (64, 64)
    assert states[-1].image == pipe("a star", seed=5, steps=3)[0]
    first, second = pipe("a star", seed=4, n=2, steps=3)
    off = np.abs(np.asarray(second, int) - np.asarray(states[-1].image, int))
    assert off.max() <= 1 and first != second
    other = pipe("a star", seed=5, steps=3, sampler=samplers.dpmpp_2m, grid=grids.log_snr)[0]
    assert other != states[-1].image
    strip = viz.film(states)
    assert strip.width >= 4 * 128 and strip.height >= 3 * 128


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_saved_is_the_same_to_the_bit_and_diffusers_loads_it(folders, tmp_path, name):
    pipe = load_pipeline(folders[name])
    assert isinstance(pipe.space.vae, TinyVAE if name == "taesd" else VAE) and pipe.space.image_size == 64
    save_pipeline(pipe, tmp_path)
    for part, file in (("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        before, after = load_file(folders[name] / part / file), load_file(tmp_path / part / file)
        before = {x.removeprefix("text_model."): y for x, y in before.items()}
        after = {x.removeprefix("text_model."): y for x, y in after.items()}
        assert before.keys() == after.keys() and all(torch.equal(before[x], after[x]) for x in before), part
    again = load_pipeline(tmp_path)
    assert again.text.identity == pipe.text.identity and again.space.state() == pipe.space.state()
    assert again.denoiser.process == pipe.denoiser.process and again.denoiser.objective == pipe.denoiser.objective
    picture = pipe("a star!", steps=4)[0]
    assert again("a star!", steps=4)[0] == picture
    noise = ImageNoise([0])(torch.empty(1, 4, 16, 16))
    expected = theirs(tmp_path, "a star!", noise=noise, negative="", steps=4, guidance=7.5)
    assert differences(np.asarray(picture), expected)[0] >= 0.999


def sample(*arguments: str) -> None:
    """Runs sample.py's main as the command line would, in this process."""
    import sys

    from minidiff.config import CONF, compose

    sys.path.insert(0, str(CONF.parent))
    import sample as script

    script.main.__wrapped__(compose("sample", arguments))
    sys.path.remove(str(CONF.parent))


def test_sample_takes_a_folder_and_a_lora(folders, tmp_path):
    run = [f"run={folders['sd1']}", "prompt=a star", "negative=a moon", "seed=3", "steps=3", "device=cpu"]
    sample(*run, "sampler=dpmpp_2m", "grid=log_snr", "guidance=5.0", f"out={tmp_path / 'one.png'}")
    facts = json.loads(Image.open(tmp_path / "one.png").text["minidiff"])
    assert (facts["sampler"], facts["grid"], facts["guidance"], facts["steps"]) == ("dpmpp_2m", "log_snr", 5, 3)
    assert facts["run"] == folders["sd1"].name and facts["negative"] == "a moon" and facts["lora"] is None
    pipe = load_pipeline(folders["sd1"])
    how = {"seed": 3, "steps": 3, "negative": "a moon"}
    plain = pipe("a star", sampler=samplers.dpmpp_2m, grid=grids.log_snr, guidance=5.0, **how)[0]
    assert Image.open(tmp_path / "one.png").tobytes() == plain.tobytes()

    lora = fresh(pipe.denoiser.net, rank=2)
    for change_ in lora.changes:
        torch.nn.init.normal_(change_.up, std=0.5)
    save_lora(lora, tmp_path / "lora.safetensors")
    sample(*run, f"lora={tmp_path / 'lora.safetensors'}", "lora_scale=0.8", f"out={tmp_path / 'two.png'}")
    before = pipe("a star", **how)[0]
    adapter = load_lora(tmp_path / "lora.safetensors", pipe.denoiser.net)
    with adapter.attached(pipe.denoiser.net, scale=0.8):
        attached = pipe("a star", **how)[0]
    drawn = Image.open(tmp_path / "two.png")
    assert json.loads(drawn.text["minidiff"])["lora_scale"] == 0.8
    assert differences(np.asarray(drawn), np.asarray(attached))[0] >= 0.999
    assert pipe("a star", **how)[0] == before != attached


# --------------------------------------------------------------------------------- what we trained on their latents


@pytest.fixture(scope="module")
def latent_run(folders, tmp_path_factory) -> Path:
    """A run of two updates on the latents of the first folder's autoencoder, prompted through its text encoder."""
    overrides = ["space=latents", f"space.vae={folders['sd1'] / 'vae'}", "space.measured=true", "text=folder"]
    overrides += [f"text.folder={folders['sd1']}", "process=table", "objective=eps", "weighting=uniform", "steps=2"]
    overrides += ["sampler=ddim", "grid=leading", "net.positions=false", "every.preview=2"]
    return train(tmp_path_factory.mktemp("latents"), *overrides)


def test_a_run_on_latents_is_saved_as_stable_diffusion_and_drawn_by_diffusers(latent_run, tmp_path):
    pipe = minidiff.load(latent_run, device="cpu")
    assert pipe.space.shape == (4, 8, 8) and pipe.sampling.threshold == 1
    assert pipe.space.vae.scale != 0.25 and not any(p.requires_grad for p in pipe.space.vae.parameters())
    torch.nn.init.normal_(pipe.denoiser.net.head.weight, std=0.1)  # two updates leave it near zero
    save_pipeline(pipe, tmp_path)
    noise = ImageNoise([0])(torch.empty(1, *pipe.space.shape))
    how = {"steps": 5, "guidance": 3.0}
    expected = theirs(tmp_path, "a red star", noise=noise, negative="", **how)
    assert expected.shape == (32, 32, 3) and expected.std() > 5
    assert differences(np.asarray(pipe("a red star", **how)[0]), expected)[0] >= 0.999


def test_another_autoencoder_than_the_runs_is_refused(latent_run, tmp_path):
    state = json.loads(next(latent_run.glob("checkpoints/*/state.json")).read_text())
    file = Path(state["contract"]["pipeline"]["space"]["vae"]) / WEIGHTS
    original = file.read_bytes()
    try:
        tensors = load_file(file)
        save_file({name: x + 0.01 for name, x in tensors.items()}, file)
        with pytest.raises(CheckpointError, match="MD-SPACE-004"):
            minidiff.load(latent_run)
    finally:
        file.write_bytes(original)


def test_what_has_no_counterpart_is_named_before_anything_is_written(tiny_run, folders, tmp_path):
    with pytest.raises(InputError, match="MD-INTEROP-409.*pixels.*OpenCLIP.*vector.*leading") as error:
        pipe = minidiff.load(tiny_run, device="cpu")
        pipe.sampling = pipe.sampling.but(grid=partial(grids.leading, offset=0))
        save_pipeline(pipe, tmp_path / "out")
    assert "Cosine" in str(error.value) and "positions" in str(error.value)
    assert not (tmp_path / "out").exists()
    pipe = load_pipeline(folders["sd1"])
    pipe.sampling = pipe.sampling.but(threshold=0.99)
    with pytest.raises(InputError, match="low, high or threshold"):
        save_pipeline(pipe, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_spacings_of_a_table_need_a_table(tiny_run):
    with pytest.raises(InputError, match="MD-SAMPLE-005.*Cosine"):
        minidiff.load(tiny_run, device="cpu")("a star", grid=grids.leading)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(copy, part):
    folder = copy("sd1")
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"MD-INTEROP-405.*no {part}"):
        minidiff.load(folder)


def test_a_folder_without_an_index_is_no_pipeline(copy):
    folder = copy("sd1")
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="MD-INTEROP-405.*model_index.json"):
        load_pipeline(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="MD-INTEROP-003.*model_index.json"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", PROJECTED]}, "XL.*coder_2"),
        ({"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "image_encoder='CLIPVision"),
        ({"vae": ["diffusers", "AutoencoderKLTemporalDecoder"]}, "vae='AutoencoderKLTemporal.*AutoencoderTiny"),
        ({"scheduler": ["diffusers", "KDPM2DiscreteScheduler"]}, "scheduler='KDPM2"),
    ],
)
def test_other_classes_are_refused_by_name(copy, values, words):
    folder = copy("sd1")
    change(folder / "model_index.json", **values)
    with pytest.raises(InputError, match=f"MD-INTEROP-406.*{words}"):
        minidiff.load(folder)


def test_a_safety_checker_is_left_out_with_a_warning(copy):
    folder = copy("sd1")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change(
        folder / "model_index.json", safety_checker=checker, feature_extractor=["transformers", "CLIPImageProcessor"]
    )
    with pytest.warns(UserWarning, match="safety checker"):
        load_pipeline(folder)


def test_everything_that_several_parts_ask_for_is_in_one_message(copy):
    folder = copy("sd1")
    change(folder / "unet" / "config.json", act_fn="gelu", dual_cross_attention=True)
    change(folder / "scheduler" / "scheduler_config.json", thresholding=True)
    change(folder / "text_encoder" / "config.json", use_attention_mask=True)
    with pytest.raises(InputError) as error:
        load_pipeline(folder)
    said = str(error.value)
    assert error.value.code == "MD-INTEROP-408" and said.count("\n") == 0
    for word in ("act_fn='gelu'", "dual_cross_attention=True", "thresholding=True", "use_attention_mask=True"):
        assert word in said


def test_parts_that_do_not_go_together_are_named(copy):
    folder = copy("sd1")
    change(folder / "unet" / "config.json", sample_size=None)
    change(folder / "vae" / "config.json", shift_factor=0.5)
    with pytest.raises(InputError, match="MD-INTEROP-407.*sample_size=None.*shift_factor=0.5"):
        load_pipeline(folder)


def damage_pickle(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def damage_cut(folder: Path) -> None:
    file = folder / "vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def damage_text(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")


@pytest.mark.parametrize(
    "damage, code",
    [(damage_pickle, "MD-INTEROP-002"), (damage_cut, "MD-CKPT-014"), (damage_text, "MD-INTEROP-401")],
)
def test_damaged_weights_and_pickles_are_refused(copy, damage, code):
    folder = copy("sd1")
    damage(folder)
    with pytest.raises(MinidiffError) as error:
        minidiff.load(folder)
    assert error.value.code == code

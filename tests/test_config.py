import functools
from collections.abc import Callable

import pytest

from minidiff.config import CONF, SAMPLE_RANGES, TRAIN_RANGES, build, check, compose
from minidiff.errors import InputError
from minidiff.interop import save_vae
from minidiff.nn.tiny_vae import TinyVAE
from minidiff.objective import Objective
from minidiff.process import Cosine, Process
from minidiff.samplers import ddim
from minidiff.space import Latents, Pixels


def test_build_makes_objects_functions_and_plain_values():
    assert build({"_target_": "minidiff.process.Cosine", "s": 0.01}) == Cosine(s=0.01)
    bound = build({"_target_": "minidiff.samplers.ddim", "_partial_": True, "eta": 0.5})
    assert isinstance(bound, functools.partial) and bound.func is ddim and bound.keywords == {"eta": 0.5}
    assert build({"a": [1, {"_target_": "minidiff.process.Cosine"}]}) == {"a": [1, Cosine()]}


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "minidiffusion.evil",
        "minidiff.checkpoint.os.system",  # reached through one of our imports
        "minidiff.checkpoint.Path",
        "minidiff.data.np.load",
        "minidiff.nope.f",
        "minidiff.process.Nope",
        "minidiff.log._append",  # ours, and able to write any file
        "minidiff.checkpoint.prune",
        "minidiff.config.write_yaml",
        "minidiff.data.sources._check_metadata",
        "minidiff.text.clip.open_clip_quietly",
        "minidiff.pipeline.checkpoint.prune",
    ],
)
def test_A9_build_makes_nothing_that_is_not_minidiffs_own(target, tmp_path):
    marker = tmp_path / "executed"
    with pytest.raises(InputError):
        build({"_target_": target, "command": f"touch {marker}"})
    assert not marker.exists()


@pytest.mark.parametrize(
    "node, words",
    [
        ({"_target_": "minidiff.process.Cosine", "z": 1}, "no option 'z'"),
        ({"_target_": "minidiff.process.Cosine", "s": "big"}, "type float"),
        ({"_target_": "minidiff.space.Pixels"}, "needs image_size"),
        ({"_target_": "minidiff.space.Pixels", "image_size": 8, "pach": 2}, "Did you mean 'patch'"),
        ({"_target_": "minidiff.space.Pixels", "image_size": True}, "type int"),
    ],
)
def test_build_checks_names_and_types_of_arguments(node, words):
    with pytest.raises(InputError, match=words):
        build(node)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["optim.lrr=1"], "Unknown key 'optim.lrr'. Did you mean 'optim.lr'"),
        (["text.model=x"], r"'text.model' is an option of text=openclip_b32 \| openclip_h14.*\+text.model="),
        (["net.depth=2"], r"'net.depth' is one of experiments, and not listed.*\+net.depth="),
        (["data=folder", "data.path=x", "data.n=3"], "'data.n' is an option of data=shapes, and not"),
        (["stepz=1"], "Did you mean 'steps'"),
        (["process=cosin"], "no process=cosin.*Did you mean 'cosine'"),
        (["sampler=foo"], "no sampler=foo; the choices are ddim, ddpm"),
        (["data=parquet"], "data.path is not given"),
    ],
)
def test_A1_what_hydra_refuses_comes_back_in_words(overrides, words):
    with pytest.raises(InputError, match=words):
        compose("train", overrides)


def test_A2_all_wrong_scalars_are_listed_at_once():
    values = compose("train", ["steps=0", "batch_size=big", "drop_cond=1.5", "optim.lr=nan", "precision=fp8"])
    with pytest.raises(InputError) as caught:
        check(values, TRAIN_RANGES)
    for key in ("steps=0", "batch_size=big", "drop_cond=1.5", "optim.lr=nan", "precision=fp8"):
        assert key in str(caught.value)
    check(compose("train", []), TRAIN_RANGES)
    with pytest.raises(InputError, match="blur=2 must.*process.middle=1 must.*steps=auto must"):
        check(compose("train", ["blur=2", "process.middle=1", "steps=auto"]), dict(sorted(TRAIN_RANGES.items())))
    check(compose("sample", ["run=x", "prompt=y"]), SAMPLE_RANGES)


@pytest.mark.parametrize("text", ['a "big", red: star (x) [y] {z} = \\ é', "5", "null-ish, true", "a\\"])
def test_prompts_need_no_quotes_inside_quotes(text):
    assert str(compose("sample", ["run=x", f"prompt={text}"])["prompt"]) == text


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


KINDS = {"process": Process, "objective": Objective, "space": (Pixels, Latents)}
KINDS |= dict.fromkeys(["weighting", "sampler", "grid"], Callable)


@pytest.mark.parametrize("group", KINDS)
def test_every_choice_of_every_group_builds(group, tmp_path):
    save_vae(TinyVAE(channels=4), tmp_path)
    needs = {"latents": [f"space.vae={tmp_path}"]}
    for name in choices(group):
        made = build(compose("train", [f"{group}={name}", *needs.get(name, [])])[group])
        assert isinstance(made, KINDS[group]), name


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes_and_says_how_to_run_it(name):
    needs = ["data.path=x"] if name == "emoji" else []
    values = compose("train", [f"experiment={name}", *needs])
    check(values, TRAIN_RANGES)
    header = (CONF / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"python train.py experiment={name}" in header


def test_the_top_level_keys_are_frozen():
    assert set(compose("train", [])) == {
        *("name", "seed", "steps", "batch_size", "accumulate", "image_size", "background", "drop_cond", "blur", "ema"),
        *(
            "guidance",
            "sampling_steps",
            "every",
            "keep",
            "precision",
            "device",
            "compile",
            "workers",
            "resume",
            "debug",
            "deterministic",
            "empty_caption",
            "allow_change",
            "init",
            "max_bad",
            "cache",
        ),
        *(
            "task",
            "data",
            "text",
            "space",
            "net",
            "process",
            "objective",
            "weighting",
            "sampler",
            "grid",
            "optim",
            "log",
        ),
    }

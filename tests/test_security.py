"""Everything that is not the installed package or typed on the command line is data, never code (threats T1 to T18)."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN

import minidiff
from minidiff import checkpoint
from minidiff.config import CONF, build, command, compose, entry
from minidiff.errors import InputError, MinidiffError

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


@pytest.fixture
def conf(tmp_path) -> Path:
    """A copy of conf/ into which somebody else's experiment is put."""
    shutil.copytree(CONF, tmp_path / "conf")
    return tmp_path / "conf"


EVIL = {
    "target": "text: {_target_: os.system, command: touch MARKER}",
    "environment": "name: ${oc.env:SECRET_TOKEN}",
    "nested_environment": "data: {path: ['x', '${oc.env:SECRET_TOKEN}']}",
    "spaced_resolver": "name: ${ oc.decode :'1'}",
    "python_object": "name: !!python/object/apply:os.system ['touch MARKER']",
    "hydra_callback": "hydra: {callbacks: {x: {_target_: os.system, command: touch MARKER}}}",
    "hydra_launcher": "hydra: {launcher: {_target_: os.system}}",
    "hydra_sweeper": "hydra: {sweeper: {_target_: os.system}}",
}


@pytest.mark.parametrize("flags", [[], ["--cfg", "job"], ["--multirun"]], ids=["plain", "cfg", "multirun"])
@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
def test_R8_A9_T3_T4_somebody_elses_experiment_runs_nothing_and_reads_no_secret(
    evil, flags, conf, tmp_path, monkeypatch
):
    marker = tmp_path / "marker"
    header = "# @package _global_\n"
    (conf / "experiment" / "theirs.yaml").write_text(header + evil.replace("MARKER", str(marker)) + "\n")
    monkeypatch.setenv("SECRET_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=theirs", *flags])
    with pytest.raises(InputError, match="MD-CONF-00[167]") as refused:
        for values in command._jobs("train", conf):
            build(values["text"])
        assert flags == ["--cfg", "job"]  # which prints a configuration, and builds nothing of it
        raise InputError("MD-CONF-001", "")
    assert not marker.exists() and TOKEN not in str(refused.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"conf", "runs", "multirun"}


@pytest.mark.parametrize("flag", ["--config-dir=/tmp", "--experimental-rerun", "--config-path=x", "--run"])
def test_T3_flags_that_load_foreign_configurations_are_not_offered(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", flag])
    with pytest.raises(SystemExit) as leaving:
        entry("train")(lambda values: None)()
    assert leaving.value.code == 2 and "MD-CONF-009" in capsys.readouterr().err


@pytest.mark.parametrize(
    "evil",
    [
        {"_target_": "os.system", "command": "touch MARKER"},
        {"_target_": "minidiff.log._append", "file": "MARKER", "text": "x"},
        {"_target_": "minidiff.config.write_yaml", "values": {}, "file": "MARKER"},
        {"_target_": "minidiff.tensor_files.write_tensors", "file": "MARKER", "tensors": {}},
        {"_target_": "minidiff.interop.save_unet", "net": {}, "folder": "MARKER"},
        {"_target_": "minidiff.text.TextEncoder", "model": "minidiff-tiny", "pretrained": "PICKLE"},
        {"_target_": "minidiff.text.tiny", "weights": "PICKLE"},
    ],
    ids=lambda node: node["_target_"],
)
def test_R8_E12_T3_a_recipe_in_a_checkpoint_runs_nothing_and_writes_nothing(evil, tiny_run, tmp_path):
    import pickle

    from test_tensor_files import Bomb

    marker, weights = tmp_path / "marker", tmp_path / "weights.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARKER", str(marker))
        weights.write_bytes(pickle.dumps(Bomb()))
    saved = checkpoint.load(checkpoint.latest(tiny_run / "checkpoints"), ["ema"])
    written = json.dumps(evil).replace("MARKER", str(marker)).replace("PICKLE", str(weights))
    saved.state["contract"]["pipeline"]["text"] = json.loads(written)
    theirs = checkpoint.save(tmp_path / "theirs" / "checkpoints", 4, saved.tensors, saved.state)
    for path in (theirs, tmp_path / "theirs"):
        with pytest.raises(MinidiffError):
            minidiff.load(path, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../evil", "a/b", "/tmp/x", "..", ".", "", "a\nb", "x" * 201, "a b\0"])
def test_T6_a_run_cannot_leave_its_folder_by_its_name(name, tmp_path):
    with pytest.raises(InputError, match="MD-CONF-008"):
        values = compose("train", TINY_RUN) | {"name": name}
        import train as script

        script.train(values)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def strange_pictures(tiny_run, tmp_path_factory):
    """Pictures of prompts that would be dangerous as paths, in HTML or in a shell: {prompt: file}."""
    sys.path.insert(0, str(ROOT))
    import sample

    pictures = {}
    prompts = [
        "../../x",
        "<script>alert(1)</script>",
        "a\0b",
        "x" * 300,
        "🙂",
        "$(touch y); `z`",
        "-rf",
        "\u202egnp.exe",
    ]
    for i, prompt in enumerate(prompts):
        out = tmp_path_factory.mktemp("pictures") / str(i)
        options = [f"run={tiny_run}", "steps=1", f"out={out}", "device=cpu"]
        sample.main.__wrapped__(compose("sample", options) | {"prompt": prompt})
        pictures[prompt] = next(out.rglob("*.png"))
        assert len(list(out.parent.rglob("*"))) == 2  # the folder and one picture, nothing elsewhere
    return pictures


def test_G8_T8_a_prompt_never_becomes_a_path(strange_pictures):
    for prompt, file in strange_pictures.items():
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,59}_0\.png", file.name), (prompt, file.name)


def test_G8_T9_metadata_is_short_ascii_and_gives_the_prompt_back(strange_pictures, tmp_path):
    from PIL import Image

    sys.path.insert(0, str(ROOT))
    import sample

    for prompt, file in strange_pictures.items():
        text = Image.open(file).text
        assert list(text) == ["minidiff"] and text["minidiff"].isascii()
        assert json.loads(text["minidiff"])["prompt"] == prompt
    many = [(Image.new("RGB", (8, 8)), {"prompt": "x" * 9000, "seed": i}) for i in range(4)]
    sample.write(many, str(tmp_path / "sheet.png"), tmp_path)
    assert len(Image.open(tmp_path / "sheet.png").text["minidiff"]) <= 16_384


def test_T17_every_picture_says_that_a_model_made_it(strange_pictures, tmp_path):
    from PIL import Image

    sys.path.insert(0, str(ROOT))
    import sample

    term = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    for file in strange_pictures.values():
        assert json.loads(Image.open(file).text["minidiff"])["digitalSourceType"] == term
    facts = sample.MADE_BY_A_MODEL | {"prompt": "x" * 20_000, "seed": 0}
    sample.write([(Image.new("RGB", (8, 8)), facts)] * 3, str(tmp_path / "sheet.png"), tmp_path)
    assert term in Image.open(tmp_path / "sheet.png").text["minidiff"]  # also where what follows was cut off


MODELS = sorted({file.relative_to(ROOT / "data").parts[0] for file in (ROOT / "data").rglob("*.safetensors")})


@pytest.mark.parametrize("folder", MODELS)
def test_T17_bundled_weights_have_an_honest_card(folder):
    card = (ROOT / "data" / folder / "README.md").read_text(encoding="utf-8")
    for part in ("**Made by** `python train.py", "**Measured**: see `docs/results.md`", "**Data**", "**Use**"):
        assert part in card, part
    assert "**Limits**" in card and "Licence: MIT" in card
    for manifest in (ROOT / "data" / folder).rglob("MANIFEST.json"):
        assert f"({json.loads(manifest.read_text())['step']} updates" in card
    if folder == "shapes_run":
        weights = minidiff.load(ROOT / "data" / folder, device="cpu").denoiser.net.parameters()
        assert f"{sum(p.numel() for p in weights) / 1e6:.2f} M parameters" in card


def test_T12_training_and_sampling_neither_listen_nor_call_anybody(tmp_path, no_network):
    from conftest import train

    run = train(tmp_path, "steps=1")
    assert minidiff.load(run, device="cpu")("a star", steps=1)[0].size == (32, 32)
    assert no_network == []
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("127.0.0.1", 9))
    assert no_network  # it would have been noticed


def test_T10_tokens_reach_no_file_of_a_run_and_no_error(tmp_path, capsys, monkeypatch):
    secret = f"https://me:{TOKEN}@host.org/{TOKEN}"
    values = compose("train", [*TINY_RUN, "steps=1"])
    values["log"]["note"] = secret
    monkeypatch.chdir(tmp_path)
    sys.path.insert(0, str(ROOT))
    import train as script

    script.train(values)
    run = tmp_path / "runs" / "shapes"
    written = [file for file in run.rglob("*") if file.is_file()]
    assert len(written) > 8
    for file in written:
        assert TOKEN.encode() not in file.read_bytes(), file
    assert "***" in (run / "config.yaml").read_text()

    def fails(values):
        raise InputError("MD-CONF-005", f"cannot read {secret}")

    monkeypatch.setattr(command, "_jobs", lambda *_: [{}])
    with pytest.raises(SystemExit):
        entry("train")(fails)()
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err and "***" in shown.err


def test_T16_sizes_that_no_machine_has_are_refused_before_anything_is_allocated():
    from minidiff.config import TRAIN_RANGES, check

    values = compose("train", ["image_size=100000", "batch_size=1000000000", "keep=0", "sampling_steps=0"])
    with pytest.raises(InputError) as e:
        check(values, TRAIN_RANGES)
    for key in ("image_size=100000", "batch_size=1000000000", "keep=0", "sampling_steps=0"):
        assert key in str(e.value)


def test_T13_the_ecosystem_is_not_needed_to_load_and_sample(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert minidiff.load(tiny_run, device="cpu")("a star", steps=1)[0].size == (32, 32)


def test_T1_saved_files_hold_nothing_that_could_be_unpickled(tiny_run):
    for file in (f for f in tiny_run.rglob("*") if f.is_file()):
        assert file.suffix in {".json", ".jsonl", ".csv", ".txt", ".yaml", ".png", ".safetensors", ""}, file
        if file.suffix != ".png":
            assert not file.read_bytes().startswith((b"\x80", b"PK\x03\x04")), file


def test_E14_a_bf16_file_from_elsewhere_loads_on_a_cpu(tmp_path):
    place = checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(3, dtype=torch.bfloat16)}}, {})
    w = checkpoint.load(place, ["model"]).tensors["model"]["w"]
    assert w.device.type == "cpu" and w.dtype == torch.bfloat16

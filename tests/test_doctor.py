import io
import json
import shutil
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image
from test_data import png

from minidiff import checkpoint
from minidiff.doctor import environment
from minidiff.doctor.__main__ import main


def test_A10_a_sound_machine_has_no_problems(capsys):
    assert main([]) in (0, 6)  # the disk of whoever runs this may be full
    shown = capsys.readouterr().out
    assert "ok       torch " in shown and "hydra-core" in shown and "device" in shown


def test_A10_mismatched_libraries_a_full_disk_and_an_old_python_are_problems(monkeypatch):
    def broken(name):
        raise RuntimeError("no operator torchvision::nms") if name == "torchvision" else ImportError("gone")

    list(environment.examine())  # imports what it needs, while imports and Python are what they are
    monkeypatch.setattr(environment.importlib, "import_module", broken)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    monkeypatch.setattr(environment.sys, "version_info", (3, 14, 0))
    bad = "\n".join(finding.text for finding in environment.examine() if not finding.good)
    for words in (
        "3.11 to 3.13",
        "torchvision does not go with the torch",
        "pip install",
        "datasets cannot be imported",
    ):
        assert words in bad
    assert "0.0 GiB free in ." in bad and "--shm-size" in bad


@pytest.fixture
def dirty(tmp_path):
    """40 rows: one broken, ten without caption, half of the others the same picture."""
    images = [{"bytes": png((i, i, i) if i % 2 else (7, 7, 7), (40, 40)), "path": None} for i in range(40)]
    images[3] = {"bytes": b"rubbish", "path": None}
    table = {"image": images, "captions": [None] * 10 + [f"a {i}" for i in range(30)]}
    rows = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_C10_C9_dirty_data_are_described_and_shown(dirty, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data=parquet", f"data.path={dirty}", "image_size=64"]) == 3
    shown = capsys.readouterr().out
    for words in ("cannot be read, such as row", "have no caption", "smaller than image_size=64", "copies of another"):
        assert any(line.startswith("PROBLEM") and words in line for line in shown.splitlines()), (words, shown)
    Image.open(tmp_path / "doctor_data.png").verify()


@pytest.mark.parametrize("copies, shared, code", [(0, 0, 0), (1, 0, 0), (2, 0, 3), (0, 3, 3)])
def test_C10_copies_above_one_in_a_hundred_and_any_overlap_are_problems(
    copies, shared, code, tmp_path, monkeypatch, capsys
):
    """100 rows to train on, `copies` of them copies of the first; 20 to validate, `shared` of them seen in training."""
    levels = [0 if 0 < i <= copies else i for i in range(100)] + [50 + i if i < shared else 120 + i for i in range(20)]
    images = [{"bytes": png((level,) * 3, (40, 40)), "path": None} for level in levels]
    for i in range(100, 120):  # the same pixels in another format are the same picture
        file = io.BytesIO()
        Image.new("RGB", (40, 40), (levels[i],) * 3).save(file, "BMP")
        images[i] = {"bytes": file.getvalue(), "path": None}
    captions = [["grey", f"level {i}"] if i < 3 else [f"level {i}"] for i in range(120)]
    table = {"image": images, "captions": captions, "s": ["train"] * 100 + ["test"] * 20}
    rows = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    assert main(["data=parquet", f"data.path={tmp_path}/rows.parquet", "data.split_column=s"]) == code
    said = capsys.readouterr().out.splitlines()
    for words, n, problem in (("are copies of another one", copies, copies > 1), ("of the validation", shared, shared)):
        (line,) = [line for line in said if words in line]
        assert line.startswith("PROBLEM" if problem else "ok") and f" {n} of " in line
    assert [line for line in said if "captions repeat another row's 2 times; 3 of 100: 'grey'" in line]


def test_C10_a_look_at_some_rows_says_at_how_many(dirty, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minidiff.doctor.data.LIMIT", 12)
    main(["data=parquet", f"data.path={dirty}"])
    shown = capsys.readouterr().out
    assert "of the validation are in the first 12 rows to train on" in shown and "of 12 have no caption" in shown


@pytest.mark.usefixtures("without_shape_checks")
def test_A10_a_run_is_looked_over(tiny_run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    assert main([f"run={copy}"]) == 0
    shown = capsys.readouterr().out
    for words in ("is whole", "x0 from", "one batch, 60 updates", "alpha/sigma", "with an exact denoiser", "averaged"):
        assert sum(line.startswith("ok") and words in line for line in shown.splitlines()) == 1, (words, shown)
    newest = checkpoint.latest(copy / "checkpoints")
    saved = checkpoint.load(newest, ["model", "ema", "optimizer"])
    checkpoint.save(copy / "checkpoints", 4, saved.tensors, saved.state | {"ema_updates": 0})
    with open(copy / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": float("nan")}) + "\n")
    assert main([f"run={copy}"]) == 4
    shown = capsys.readouterr().out
    assert "PROBLEM  100.0% of the averaged weights are still the random initial ones" in shown
    assert "1 not finite (first: 5)" in shown
    (newest / "ema.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning):
        assert main([f"run={copy}"]) == 4
    assert capsys.readouterr().out.count("is whole") == 1


@pytest.mark.parametrize("arguments", [["run"], ["run=x", "data=shapes"]])
def test_A1_the_doctor_says_how_it_is_asked(arguments, capsys):
    assert main(arguments) == 2 and "python -m minidiff.doctor" in capsys.readouterr().err

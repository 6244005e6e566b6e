"""The two scripts as a user runs them."""

import io
import json
import runpy
import subprocess
import sys
import traceback
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from conftest import TINY_RUN, train
from PIL import Image

from minidiff.config import compose
from minidiff.errors import MachineError

ROOT = Path(__file__).resolve().parents[1]


def process(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a script in a process of its own, as a shell does; most of its time goes into imports."""
    command = [sys.executable, str(ROOT / name), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def script(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a script as `process` does, but in this one."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        chdir(cwd),
        mock.patch.object(sys, "argv", [str(ROOT / name), *arguments]),
        mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
    ):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except Exception:  # the interpreter would print it
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_everything(tiny_run):
    names = {p.name for p in tiny_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "metrics.csv", "log.txt", "samples", "checkpoints"} <= names
    assert (tiny_run / "checkpoints" / "LATEST").read_text().strip() == "step_00000004"
    assert [line["step"] for line in lines(tiny_run)] == [1, 2, 3, 4]
    last = lines(tiny_run)[-1]
    assert {"loss", "val_loss", "val_loss_ema", "lr", "grad_norm", "images_per_s"} <= last.keys()
    assert sorted(p.name for p in (tiny_run / "samples").iterdir()) == ["step_00000000.png", "step_00000004.png"]
    Image.open(tiny_run / "samples" / "step_00000004.png").verify()


def test_running_again_goes_on_and_equals_an_uninterrupted_run(tmp_path):
    whole = train(tmp_path / "whole", "steps=4")
    # the same schedule, cut after two updates
    parts = train(tmp_path / "parts", "steps=4", "every.save=2")
    newest = parts / "checkpoints" / "step_00000004"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    again = train(tmp_path / "parts", "steps=4")
    import safetensors.torch as st

    for part in ("model", "ema", "optimizer"):
        a, b = (st.load_file(run / "checkpoints" / "step_00000004" / f"{part}.safetensors") for run in (whole, again))
        assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a), part
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(again)]


def test_a_finished_run_says_so_and_does_nothing(tiny_run, capsys):
    before = (tiny_run / "metrics.jsonl").read_text()
    train(tiny_run.parents[1])
    assert "trained to step 4 already" in capsys.readouterr().out
    assert (tiny_run / "metrics.jsonl").read_text() == before


def test_contrastive_pretraining_runs_and_its_weights_condition_a_run(tmp_path):
    no_net = [x for x in TINY_RUN if not x.startswith("net.")]
    clip = train(tmp_path, "experiment=clip_shapes", base=no_net)
    assert (clip / "samples" / "step_00000004.png").is_file()
    weights = clip / "checkpoints" / "step_00000004" / "ema.safetensors"
    run = train(tmp_path, f"text.weights={weights}")
    import minidiff

    assert minidiff.load(run).text.identity != minidiff.load(train(tmp_path / "bundled")).text.identity


@pytest.mark.parametrize(
    "objective", ["eps weighting=uniform", "v", "flow process=flow", "edm process=edm weighting=uniform"]
)
def test_every_objective_trains(tmp_path, objective):
    run = train(tmp_path, *f"objective={objective} steps=2 every.preview=2".split())
    assert all(0 < line["loss"] < 100 for line in lines(run))


def test_sample_writes_pictures_that_say_how_they_were_made(tiny_run, tmp_path):
    out = tmp_path / "one.png"
    done = process(
        "sample.py", f"run={tiny_run}", "prompt=a zebra, large", "seed=0", "steps=2", f"out={out}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "'zebra'" in done.stdout
    facts = json.loads(Image.open(out).text["minidiff"])
    assert facts["prompt"] == "a zebra, large" and facts["seed"] == 0 and facts["steps"] == 2
    assert {"sampler", "grid", "guidance", "run", "minidiff", "weights", "negative"} <= facts.keys()
    import minidiff

    again = minidiff.load(tiny_run, device="cpu")(facts["prompt"], seed=facts["seed"], steps=facts["steps"])[0]
    assert again.tobytes() == Image.open(out).tobytes()


def test_R7_a_picture_is_a_function_of_prompt_seed_and_settings(tiny_run, tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    import sample

    prompts = ["a red star", "two blue rings", "a star", "a large green cross"]
    for name, order in (("a", prompts), ("b", prompts[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n".join(order))
    how = [f"run={tiny_run}", "steps=3", "n=2", "seed=5", "guidance=2.0", "sampler=ddpm", "device=cpu"]
    monkeypatch.chdir(tmp_path)
    for out in ("once", "again"):
        sample.main.__wrapped__(compose("sample", [*how, "prompts=a.txt", f"out={out}"]))
        torch.manual_seed(len(out))  # nobody's global state matters
    alone = script("sample.py", *how, "prompts=b.txt", "out=alone", "batch_size=1", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    files = sorted(p.name for p in Path("once").iterdir())
    assert len(files) == 8
    for name in files:
        assert Path("once", name).read_bytes() == Path("again", name).read_bytes()
        one, other = (np.asarray(Image.open(Path(out, name))).astype(int) for out in ("once", "alone"))
        # sums in another order may differ in the last bit, and that one grey level in a few thousand
        assert np.abs(one - other).max() <= 1 and (one != other).mean() < 1e-2
    assert len({Path("once", name).read_bytes() for name in files}) == 8


def test_F12_out_of_memory_while_pictures_are_drawn_is_said_in_words(tiny_run, tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT))
    import torch

    import sample
    from minidiff.pipeline import Pipeline

    def too_many(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pipeline, "sample", too_many)
    values = compose("sample", [f"run={tiny_run}", "prompt=x", "batch_size=7", f"out={tmp_path / 'p'}", "device=cpu"])
    with pytest.raises(MachineError, match="MD-ENV-006.*batch_size=7 .*32×32.*smaller.*guidance=1.*device=cpu") as e:
        sample.main.__wrapped__(values)
    assert e.value.exit_code == 6 and not (tmp_path / "p").exists()


def test_G1_prompt_files_with_blank_lines_bom_and_crlf(tiny_run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa star\r\n\r\n../../x <b>\r\n".encode())
    done = script("sample.py", f"run={tiny_run}", "prompts=prompts.txt", "n=2", "steps=2", "out=pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "a-star_0.png",
        "a-star_1.png",
        "x-b_0.png",
        "x-b_1.png",
    ]


@pytest.mark.parametrize(
    "name, arguments, code, words",
    [
        ("train.py", ["optim.lrr=1"], 2, "optim.lr"),
        ("train.py", [*TINY_RUN, "batch_size=big"], 2, "batch_size=big must be a whole number"),
        ("train.py", [*TINY_RUN, "image_size=50"], 2, "48 and 52"),
        ("train.py", [*TINY_RUN, "resume=runs/x/step_999"], 4, "step_999"),
        ("sample.py", ["run=runs/none", "prompt=x"], 4, "runs/none does not exist"),
        ("sample.py", ["run=runs/none"], 2, "prompt="),
        ("sample.py", ["run=runs/none", "prompt=x", "sampler=foo"], 2, "the choices are ddim"),
    ],
)
def test_bad_input_is_one_paragraph_and_an_exit_code(name, arguments, code, words, tmp_path):
    done = script(name, *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_process_says_the_same(tmp_path):
    one, other = (run("train.py", "optim.lrr=1", cwd=tmp_path) for run in (process, script))
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


def test_debug_shows_the_traceback(tmp_path):
    done = process("train.py", "debug=true", "image_size=50", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" in done.stderr


@pytest.mark.parametrize("command", [["train.py", "--help"], ["sample.py", "--help"]])
def test_help_and_import_stay_light(command, tmp_path):
    heavy = ["torch", "datasets", "open_clip", "wandb", "matplotlib", "accelerate"]
    code = f"import runpy, sys; sys.argv = {command!r}; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"try: runpy.run_path({str(ROOT / command[0])!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += f"print('HEAVY', [m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
    assert "python" in done.stdout and "guidance" in done.stdout

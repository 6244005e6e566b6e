"""A run that was stopped and went on is the run that was never stopped, bit for bit."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import train

from minidiff import checkpoint, fit
from minidiff.errors import CheckpointError, InputError, MachineError

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # trains some hundred times
FAST = ["every.preview=100", "every.validate=100", "every.save=100", "keep=100", "data.n=24"]  # 3 updates an epoch


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stop_after(monkeypatch, step: int, name: str = "SIGUSR1") -> list[list[int]]:
    """Sends this process a signal while it works on update `step` + 1's data; returns the list that collects the sample
    numbers of every update.
    """
    seen: list[list[int]] = []
    original = fit._backward

    def watched(model, loss, batches, accelerator):
        def noted():
            for batch in batches:
                seen[-1].extend(batch.index)
                yield batch

        seen.append([])
        if len(seen) == step:
            os.kill(os.getpid(), getattr(signal, name))
        return original(model, loss, noted(), accelerator)

    monkeypatch.setattr(fit, "_backward", watched)
    return seen


def interrupted(monkeypatch, folder: Path, cuts: list[int], *overrides: str) -> tuple[Path, list[list[int]]]:
    """Trains with a stop after each number of updates in `cuts`, counted from the last stop, and then to the end."""
    samples = []
    for cut in cuts:
        with monkeypatch.context() as patch:
            seen = stop_after(patch, cut)
            with pytest.raises(SystemExit) as stopped:
                train(folder, *FAST, *overrides)
            assert stopped.value.code == 0 and len(seen) == cut
            samples += seen
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 10**6)
        run = train(folder, *FAST, *overrides)
        samples += seen
    return run, samples


def require_equal(a: Path, b: Path, step: int) -> None:
    one, two = (checkpoint.load(x / "checkpoints" / f"step_{step:08d}", ["model", "ema", "optimizer"]) for x in (a, b))
    for part, named in one.tensors.items():
        assert named.keys() == two.tensors[part].keys()
        for name, x in named.items():
            assert torch.equal(x, two.tensors[part][name]), f"{part}: {name}"
    assert one.state["samples_seen"] == two.state["samples_seen"]
    for key in ("loss", "grad_norm", "lr"):
        assert [line[key] for line in lines(a)] == [line[key] for line in lines(b)]


MATRIX = {
    "mid_epoch": ([4], []),
    "epoch_end": ([3], []),
    "after_two_epochs": ([6], []),
    "in_warm_up": ([1], []),
    "adamw": ([4], ["optim=adamw"]),
    "accumulation_3": ([4], ["accumulate=3", "batch_size=12"]),
    "three_resumes": ([1, 1, 3], []),
    "two_workers": ([2, 2], ["workers=2"]),
    "bf16": ([2], ["precision=bf16"]),
    "v_flow": ([2], ["objective=flow", "process=flow"]),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Trains without a stop, once for every set of overrides."""

    @functools.cache
    def run(*overrides: str) -> tuple[Path, list[list[int]]]:
        with pytest.MonkeyPatch.context() as patch:
            return interrupted(patch, tmp_path_factory.mktemp("whole"), [], *overrides)

    return run


@pytest.mark.parametrize("cuts, overrides", MATRIX.values(), ids=MATRIX.keys())
def test_E5_E6_R2_resume_matrix(cuts, overrides, uninterrupted, tmp_path, monkeypatch):
    whole, all_samples = uninterrupted("steps=7", *(x for x in overrides if not x.startswith("workers=")))
    parts, samples = interrupted(monkeypatch, tmp_path / "parts", cuts, "steps=7", *overrides)
    require_equal(whole, parts, 7)
    assert samples == all_samples
    size = checkpoint.load(whole / "checkpoints" / "step_00000007", []).state["samples_seen"] // 7
    assert [i for update in samples for i in update] == list(range(7 * size))


def test_D6_resume_with_another_number_of_workers_or_micro_batches(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", *FAST, "steps=5")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            train(tmp_path / "parts", *FAST, "steps=5", "workers=2")
    parts = train(tmp_path / "parts", *FAST, "steps=5", "workers=1")
    require_equal(whole, parts, 5)


def test_R3_every_image_is_used_once_per_epoch_whatever_the_interruptions(tmp_path, monkeypatch):
    rows = []
    original = fit._backward

    def watched(*arguments):
        loss, used, skipped = original(*arguments)
        rows.extend(used)
        return loss, used, skipped

    monkeypatch.setattr(fit, "_backward", watched)
    interrupted(monkeypatch, tmp_path, [2, 3], "steps=9")
    for epoch in range(3):
        assert sorted(rows[24 * epoch : 24 * epoch + 24]) == list(range(24))


# ---------------------------------------------------------------------------------------------------- another run


@pytest.fixture
def half(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            train(tmp_path, *FAST, "steps=4")
    return tmp_path


@pytest.mark.parametrize(
    "change, words",
    [
        ("batch_size=12", "MD-CKPT-026.*batch_size was 8 and is 12"),
        ("seed=1", "MD-CKPT-026.*seed was 0 and is 1"),
        ("data.n=25", "MD-CKPT-026.*the training data were 24 rows .* and are 25 rows"),
        ("objective=v", "MD-CKPT-026.*objective._target_"),
        ("net.channels=[16,48]", "MD-CKPT-008.*of another shape: down.1"),
        ("optim=adamw", "MD-CKPT-011"),
    ],
)
def test_A7_a_run_that_is_not_the_same_any_more_is_refused(half, change, words):
    before = sorted(half.rglob("*"))
    with pytest.raises(CheckpointError, match=words):
        train(half, *FAST, "steps=4", change)
    assert sorted(half.rglob("*")) == before


def test_A7_what_may_change_is_said(half, capsys):
    train(half, *FAST, "steps=6", "optim.lr=1e-3")
    shown = capsys.readouterr().out
    assert "changed since the checkpoint: optim.lr was 0.0025 and is 0.001" in shown
    assert "changed since the checkpoint: steps was 4 and is 6" in shown


def test_A7_allow_change_goes_on_from_the_first_sample_not_seen(half, monkeypatch, capsys):
    seen = stop_after(monkeypatch, 10**6)
    run = train(half, *FAST, "steps=4", "batch_size=12", "allow_change=true")
    assert seen == [list(range(16, 28)), list(range(28, 40))]
    assert checkpoint.load(run / "checkpoints" / "step_00000004", []).state["samples_seen"] == 40
    assert "batch_size was 8 and is 12" in capsys.readouterr().out


def test_A6_an_empty_folder_is_a_fresh_start_and_says_so(tmp_path, capsys):
    train(tmp_path, *FAST, "steps=1")
    assert "no checkpoint found, starting at step 0" in capsys.readouterr().out


def test_E3_damage_everywhere_is_never_a_silent_fresh_start(half):
    (only,) = (half / "runs" / "shapes" / "checkpoints").glob("step_*")
    (only / "state.json").write_text("{}")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="MD-CKPT-025.*step_00000002.*resume=none"):
        train(half, *FAST, "steps=4")
    train(half, *FAST, "steps=1", "resume=none")


def test_E3_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path):
    whole = train(tmp_path / "whole", *FAST, "steps=4", "every.save=2")
    run = tmp_path / "again" / "runs" / "shapes"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / "step_00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="model.safetensors: size .* using step_00000002|using step_00000002"):
        train(tmp_path / "again", *FAST, "steps=4", "every.save=2")
    require_equal(whole, run, 4)
    newest.write_bytes(b"")
    with pytest.raises(CheckpointError, match="MD-CKPT-004"):
        train(tmp_path / "again", *FAST, "steps=4", f"resume={newest.parent}")


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_R4_one_byte_that_changed_is_found_named_and_the_run_goes_on_from_the_one_before(name, two_saved, capsys):
    whole, run = two_saved
    newest = run / "checkpoints" / "step_00000004"
    data = bytearray((newest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"MD-CKPT-004.*{name}: its sha256.*earlier checkpoint.*resume=auto"):
        train(run.parents[1], *FAST, "steps=4", "every.save=2", f"resume={newest}")
    with pytest.warns(UserWarning, match=f"(?s){name}: its sha256.*using step_00000002"):
        train(run.parents[1], *FAST, "steps=4", "every.save=2")
    assert "going on from runs/shapes/checkpoints/step_00000002" in capsys.readouterr().out
    require_equal(whole, run, 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), *FAST, "steps=4", "every.save=2")


@pytest.fixture
def two_saved(trained, tmp_path) -> tuple[Path, Path]:
    """A run with checkpoints at steps 2 and 4, and a copy of it to break."""
    return trained, Path(shutil.copytree(trained, tmp_path / "runs" / "shapes"))


def half_way(run: Path, change) -> None:
    """Leaves the checkpoint of step 2 alone in a run, with what `change(tensors, state)` makes of it."""
    folder = run / "checkpoints"
    saved = checkpoint.load(folder / "step_00000002", ["model", "ema", "optimizer"])
    change(saved.tensors, saved.state)
    shutil.rmtree(folder)
    checkpoint.save(folder, 2, saved.tensors, saved.state)


def test_E13_a_run_from_before_there_were_certain_options_goes_on_exactly(two_saved, capsys):
    whole, run = two_saved

    def older(tensors, state):
        for key in ("deterministic", "empty_caption", "allow_change", "max_bad", "init"):
            del state["config"][key]
        del state["contract"]["space"]

    half_way(run, older)
    train(run.parents[1], *FAST, "steps=4", "every.save=2")
    assert "changed since the checkpoint: empty_caption was None and is unconditional" in capsys.readouterr().out
    require_equal(whole, run, 4)


def test_E13_a_run_of_another_schema_is_refused_by_its_version_and_not_begun_anew(two_saved, monkeypatch):
    _, run = two_saved
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA", 0)
        for step in (2, 4):
            place = run / "checkpoints" / f"step_{step:08d}"
            manifest = json.loads((place / "MANIFEST.json").read_text())
            (place / "MANIFEST.json").write_text(checkpoint._manifest(step, manifest["files"]))
    with (
        pytest.warns(UserWarning, match="MD-CKPT-005.*schema version 0, and this minidiff reads version 1"),
        pytest.raises(CheckpointError, match="MD-CKPT-025.*another version of minidiff") as e,
    ):
        train(run.parents[1], *FAST, "steps=6")
    assert e.value.exit_code == 4
    with pytest.raises(CheckpointError, match="MD-CKPT-005.*schema version 0"):
        train(run.parents[1], *FAST, "steps=6", f"resume={place}")


def test_E14_a_run_of_a_gpu_goes_on_on_a_cpu(two_saved, capsys):
    whole, run = two_saved

    def on_a_gpu(tensors, state):
        state["config"] |= {"device": "cuda", "precision": "fp16", "compile": True}
        state["scaler"] = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
        state["scaler"] |= {"_growth_tracker": 3}
        for name in list(tensors["model"]):
            tensors["model"][f"_orig_mod.{name}"] = tensors["model"].pop(name)
        for group in state["optimizer_groups"]:
            group["lr"] = 123.0  # a schedule's, which the update's number gives anew

    half_way(run, on_a_gpu)
    train(run.parents[1], *FAST, "steps=4", "every.save=2")
    assert "changed since the checkpoint: precision was fp16 and is fp32" in capsys.readouterr().out
    require_equal(whole, run, 4)  # random numbers belong to samples, and no device keeps any


def test_E14_bf16_weights_sample_on_a_cpu(trained, tmp_path):
    import minidiff

    saved = checkpoint.load(trained / "checkpoints" / "step_00000004", ["ema"])
    small = {name: x.bfloat16() for name, x in saved.tensors["ema"].items()}
    place = checkpoint.save(tmp_path, 4, {"ema": small}, saved.state)
    pipe = minidiff.load(place, device="cpu")
    assert {p.dtype for p in pipe.denoiser.parameters()} == {torch.float32}
    difference = pipe.sample(["a star"], [0]) - minidiff.load(trained, device="cpu").sample(["a star"], [0])
    assert 0 < difference.abs().max() < 0.2


# ---------------------------------------------------------------------------------------------------- fp16


@pytest.fixture
def scaled(monkeypatch):
    """Has accelerate train as in fp16 on a GPU, with a scaler that changes its scale every few updates."""
    from minidiff import run

    original = run.open_accelerator

    def opened(*arguments):
        accelerator, name = original(*arguments)
        accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**30, backoff_factor=2.0**-9, growth_factor=2.0**6, growth_interval=2
        )
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator, name

    monkeypatch.setattr(run, "open_accelerator", opened)


def test_F4_with_a_scaler_a_run_that_was_stopped_goes_on_exactly(scaled, tmp_path, monkeypatch):
    options = ["steps=9", "optim=adamw", "every.log=1"]
    whole, _ = interrupted(monkeypatch, tmp_path / "whole", [], *options)
    parts, _ = interrupted(monkeypatch, tmp_path / "parts", [3, 3], *options)
    require_equal(whole, parts, 9)
    one, two = (checkpoint.load(run / "checkpoints" / "step_00000009", []).state for run in (whole, parts))
    assert one["scaler"] == two["scaler"] and one["ema_updates"] == two["ema_updates"]
    assert one["scaler"]["scale"] != 2.0**30 and one["scaler"].keys() >= {"_growth_tracker", "growth_interval"}
    left_out = lines(whole)[-1]["left_out"]  # overflows: the scaler's step and the average's were both left out
    assert left_out >= 1 and one["ema_updates"] == 9 - left_out and one["samples_seen"] == 9 * 8


@pytest.mark.parametrize("entry", ["optimizer_groups", "ema_updates", "samples_seen"])
def test_E8_a_missing_entry_is_named_and_the_weights_can_begin_a_new_run(half, entry, monkeypatch):
    folder = half / "runs" / "shapes" / "checkpoints"
    saved = checkpoint.load(folder / "step_00000002", ["model", "ema", "optimizer"])
    del saved.state[entry]
    checkpoint.save(folder, 3, saved.tensors, saved.state)
    with pytest.raises(CheckpointError, match=f"MD-CKPT-012.*'{entry}'.*init="):
        train(half, *FAST, "steps=4")
    new = train(half, *FAST, "steps=1", "name=new", f"init={folder / 'step_00000003'}", "optim.lr=1e-12")
    begun = checkpoint.load(new / "checkpoints" / "step_00000001", ["model"]).tensors["model"]
    for name, x in saved.tensors["ema"].items():
        torch.testing.assert_close(begun[name], x)


def test_A8_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    from minidiff.interrupt import lock

    with lock(tmp_path / "runs" / "shapes"), pytest.raises(InputError, match=f"MD-RUN-001.*process {os.getpid()}"):
        train(tmp_path, *FAST, "steps=1")
    train(tmp_path, *FAST, "steps=1")


# ---------------------------------------------------------------------------------------------------- disks


def test_E2_a_full_disk_is_a_warning_once_and_ends_the_run_the_second_time(tmp_path, monkeypatch, capsys):
    import resource

    train(tmp_path, *FAST, "steps=5", "every.save=1", "net.channels=[16,32]", "resume=none", "name=whole")
    original, calls = checkpoint.save, []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(folder, step, *arguments, **options):
        calls.append(step)
        full = step in full_at
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # a file may not grow beyond this
        try:
            return original(folder, step, *arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint, "save", on_a_full_disk)
    full_at = {2, 4}
    run = train(tmp_path, *FAST, "steps=5", "every.save=1")
    assert calls == [1, 2, 3, 4, 5] and capsys.readouterr().out.count("Training goes on") == 2
    assert checkpoint.latest(run / "checkpoints").name == "step_00000005"
    require_equal(tmp_path / "runs" / "whole", run, 5)

    full_at = {2, 3}
    with pytest.raises(MachineError, match="MD-CKPT-009.*step_00000003"):
        train(tmp_path, *FAST, "steps=5", "every.save=1", "name=second")
    folder = tmp_path / "runs" / "second" / "checkpoints"
    assert checkpoint.latest(folder).name == "step_00000001" and not list(folder.glob(".tmp-*"))

    full_at = {5}
    with pytest.raises(MachineError, match="MD-CKPT-009.*step_00000005"):  # the end of a run is not lost with a warning
        train(tmp_path, *FAST, "steps=5", "every.save=1", "name=third")

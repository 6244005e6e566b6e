"""Signals: an update is never cut in half, what was learned is saved, and the exit code says who asked."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, train

from minidiff import checkpoint, fit
from minidiff.interrupt import Interruption

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # trains dozens of times
FAST = ["every.preview=2", "every.validate=100", "every.save=2", "steps=6", "data.n=24"]


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def during(monkeypatch, where: str, name: str, at: int) -> None:
    """Sends the signal at the beginning of the `at`-th call of an update, a preview or a save."""
    from minidiff.tasks.diffusion import TextToImage

    place = {"update": (fit, "_backward"), "preview": (TextToImage, "preview"), "save": (checkpoint, "save")}[where]
    original, calls = getattr(*place), []

    def sending(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            send(name)
        return original(*arguments, **options)

    monkeypatch.setattr(*place, sending)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 0)])
@pytest.mark.parametrize("where, at, step", [("update", 3, 3), ("preview", 2, 2), ("save", 1, 3)])
def test_E11_R5_a_signal_ends_the_run_after_one_save(name, code, where, at, step, tmp_path, monkeypatch, capsys):
    during(monkeypatch, where, name, at)
    before = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, *FAST)
    assert stopped.value.code == code
    newest = checkpoint.latest(tmp_path / "runs" / "shapes" / "checkpoints")
    assert newest.name == f"step_{step:08d}"
    shown = capsys.readouterr().out
    assert f"stopped by {name} after step {step}" in shown and "python train.py" in shown
    assert {x: signal.getsignal(x) for x in before} == before


def test_R5_a_second_ctrl_c_quits_at_once_and_harms_no_checkpoint(tmp_path, monkeypatch):
    original, calls = checkpoint.write_tensors, []

    def in_the_middle_of_the_second_save(file, tensors):
        calls.append(file)
        if len(calls) == 5:
            send("SIGINT")
            send("SIGINT")
        return original(file, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", in_the_middle_of_the_second_save)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *FAST)
    folder = tmp_path / "runs" / "shapes" / "checkpoints"
    assert [p.name for p in folder.iterdir() if p.name != "LATEST"] == ["step_00000002"]
    checkpoint.verify(folder / "step_00000002")
    monkeypatch.undo()
    train(tmp_path, *FAST)  # the run's lock is free, too


def test_E11_handlers_that_were_there_are_called_and_come_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("mine"))
    try:
        with Interruption() as stop:
            send("SIGTERM")
            send("SIGTERM")
            assert stop.signal == "SIGTERM" and stop.exit_code == 143
        assert heard == ["mine", "mine"]
        send("SIGTERM")
        assert len(heard) == 3
    finally:
        signal.signal(signal.SIGTERM, before)


def test_E11_a_signal_that_comes_while_the_processes_agree_is_heard_at_the_next_update():
    class Together:
        num_processes, device = 2, torch.device("cpu")

        def gather(self, mine):
            """The other process says nothing; this one hears its signal when it has spoken itself."""
            if not heard:
                heard.append("SIGUSR1")
                send("SIGUSR1")
            return torch.cat([mine, torch.zeros_like(mine)])

    heard = []
    with Interruption() as stop:
        assert [stop.requested(Together()), stop.requested(Together())] == [False, True]
    assert stop.signal == "SIGUSR1"


def test_E11_training_works_outside_the_main_thread(tmp_path):
    """A notebook server or a test runner may train in a thread, where Python allows no signal handlers."""
    inside = []

    def work():
        with Interruption() as stop:
            inside.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [None]


def start(cwd: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *TINY_RUN, *arguments]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(path: Path, child: subprocess.Popen) -> None:
    for _ in range(12_000):
        if path.exists():
            return
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


def test_E11_ctrl_c_in_a_terminal_reaches_workers_too_and_the_run_is_saved(tmp_path):
    """A terminal sends Ctrl-C to all processes of the job at once."""
    child = start(tmp_path, "steps=100000", "every.save=3", "every.preview=1000000", "workers=2")
    folder = tmp_path / "runs" / "shapes" / "checkpoints"
    wait_for(folder / "step_00000003", child)
    os.killpg(child.pid, signal.SIGINT)
    shown, _ = child.communicate(timeout=120)
    assert child.returncode == 130, shown
    assert "Traceback" not in shown and "stopped by SIGINT after step" in shown
    assert "python train.py steps=4 " in shown and "steps=100000" in shown.split("To go on:")[1]
    assert f"after step {int(checkpoint.latest(folder).name[5:])}," in shown
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(child.pid, 0)


def test_E1_R1_kill_9_in_the_middle_of_training_then_resume_is_as_if_nothing_had_happened(tmp_path):
    from test_resume import require_equal

    options = ["steps=20", "every.save=1", "keep=3", "every.preview=1000", "every.validate=1000"]
    child = start(tmp_path / ".", *options, "name=killed")
    wait_for(tmp_path / "runs" / "killed" / "checkpoints" / "step_00000003", child)
    child.kill()
    child.communicate()
    left = checkpoint.latest(tmp_path / "runs" / "killed" / "checkpoints")
    assert left is not None and int(left.name[5:]) < 20
    killed = train(tmp_path, *options, "name=killed")
    require_equal(train(tmp_path, *options, "name=whole"), killed, 20)

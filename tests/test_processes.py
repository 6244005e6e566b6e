"""Several processes (gloo, on a CPU): the same run, divided."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, train

from minidiff import checkpoint
from minidiff.cond import Cond
from minidiff.tensor_files import read_tensors, write_tensors

pytestmark = pytest.mark.slow
OPTIONS = [
    "steps=3",
    "batch_size=12",
    "every.preview=3",
    "every.validate=3",
    "every.save=3",
    "optim=adamw",
    "data.n=24",
]
BIN = Path(sys.executable).parent


def launch(cwd: Path, *arguments: str, launcher: str = "torchrun") -> subprocess.Popen:
    command = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"],
        "accelerate": [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
        + ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "--num_cpu_threads_per_process=1"],
    }[launcher]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *TINY_RUN, *OPTIONS, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(child: subprocess.Popen, timeout: float = 240) -> str:
    try:
        return child.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        import psutil

        for one in [*psutil.Process(child.pid).children(recursive=True), child]:  # each is in a session of its own
            one.kill()
        raise AssertionError("it hangs: " + child.communicate()[0]) from None


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def require_close(one: Path, two: Path, step: int = 3) -> None:
    """Averages of halves differ from averages of wholes in the last bits, and AdamW carries that into the weights."""
    a, b = (checkpoint.load(x / "checkpoints" / f"step_{step:08d}", ["model", "ema"]) for x in (one, two))
    for part in a.tensors:
        for name, x in a.tensors[part].items():
            torch.testing.assert_close(x, b.tensors[part][name], rtol=0, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")
    for x, y in zip(lines(one), lines(two), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("launcher, accumulate", [("torchrun", 1), ("accelerate", 3)])
def test_F7_R10_two_processes_make_the_updates_of_one(launcher, accumulate, tmp_path):
    one = train(tmp_path / "one", *OPTIONS, f"accumulate={accumulate}")
    child = launch(tmp_path, f"accumulate={accumulate}", launcher=launcher)
    shown = finish(child)
    assert child.returncode == 0, shown
    two = tmp_path / "runs" / "shapes"
    require_close(one, two)
    # only the first process writes and speaks
    assert shown.count("step 3/3") == 1 and shown.count("no checkpoint found") == 1 and "2 process(es)" in shown
    assert len(list((two / "samples").iterdir())) == 2


def test_E7_a_run_goes_on_with_another_number_of_processes(tmp_path):
    whole = train(tmp_path / "whole", *OPTIONS, "every.save=1", "keep=9")
    again = tmp_path / "runs" / "shapes"
    shutil.copytree(whole, again)
    for step in (2, 3):
        shutil.rmtree(again / "checkpoints" / f"step_{step:08d}")
    child = launch(tmp_path, "every.save=1", "keep=9")
    shown = finish(child)
    assert child.returncode == 0 and "going on from" in shown, shown
    require_close(whole, again)


class LearnedNull(torch.nn.Module):
    """A network with a null embedding of its own, as a run that trains its text encoder would have."""

    def __init__(self) -> None:
        super().__init__()
        self.null, self.out = torch.nn.Parameter(torch.ones(1, 4)), torch.nn.Linear(4, 1)

    def forward(self, vector, keep):
        return self.out(Cond(vector=vector).where(keep, Cond(vector=self.null)).vector)


def learn_null(rank: int, folder: str) -> None:
    """Two updates in which process 0 drops no caption and process 1 drops all of them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(LearnedNull())
    for _ in range(2):
        model.zero_grad()
        model(torch.full((3, 4), 2.0), torch.full((3,), rank == 0)).square().mean().backward()
    write_tensors(f"{folder}/{rank}.safetensors", {n: p.grad for n, p in model.module.named_parameters()})
    torch.distributed.destroy_process_group()


def test_F8_processes_that_drop_other_captions_do_not_wait_for_one_another(tmp_path):
    torch.multiprocessing.spawn(learn_null, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    one = LearnedNull()
    one(torch.full((6, 4), 2.0), torch.tensor([True] * 3 + [False] * 3)).square().mean().backward()
    for rank in (0, 1):
        grads = read_tensors(tmp_path / f"{rank}.safetensors")
        for name, p in one.named_parameters():
            torch.testing.assert_close(grads[name], p.grad)
    assert one.null.grad.abs().min() > 0


def test_T14_processes_of_one_machine_listen_to_it_alone(tmp_path):
    import psutil

    child = launch(tmp_path, "steps=100000", "every.save=2", "every.preview=1000000", "every.validate=1000000")
    wait_for(tmp_path / "runs" / "shapes" / "checkpoints" / "step_00000002", child)
    ranks = ranks_of(child)
    sockets = [c for pid in ranks.values() for c in psutil.Process(pid).net_connections("inet")]
    for pid in ranks.values():  # which torchrun gave sessions of their own
        os.kill(pid, signal.SIGKILL)
    finish(child, timeout=120)
    listening = {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN}
    assert len(ranks) == 2 and listening and listening <= {"127.0.0.1", "::1"}


def wait_for(path: Path, child: subprocess.Popen) -> None:
    for _ in range(3000):
        if path.exists():
            return
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def ranks_of(child: subprocess.Popen) -> dict[int, int]:
    """Returns {rank: process id} of the launched training processes."""
    import psutil

    return {
        int(p.environ()["RANK"]): p.pid
        for p in psutil.Process(child.pid).children(recursive=True)
        if "RANK" in p.environ() and any(x.endswith("train.py") for x in p.cmdline())
    }


def test_F9_a_process_that_dies_ends_the_others_in_words_and_the_checkpoint_is_whole(tmp_path):
    child = launch(tmp_path, "steps=100000", "every.save=2", "every.preview=1000000", "every.validate=1000000")
    folder = tmp_path / "runs" / "shapes" / "checkpoints"
    wait_for(folder / "step_00000002", child)
    os.kill(ranks_of(child)[1], signal.SIGKILL)
    shown = finish(child, timeout=120)
    assert child.returncode != 0
    assert "MD-RUN-002" in shown or "stopped by SIGTERM" in shown, shown
    assert checkpoint.latest(folder) is not None and not list(folder.glob("step_*.old"))


def test_E11_all_processes_stop_after_the_same_update(tmp_path):
    child = launch(tmp_path, "steps=100000", "every.save=2", "every.preview=1000000", "every.validate=1000000")
    folder = tmp_path / "runs" / "shapes" / "checkpoints"
    wait_for(folder / "step_00000002", child)
    os.kill(ranks_of(child)[1], signal.SIGUSR1)  # only one of them hears it
    shown = finish(child, timeout=120)
    assert child.returncode == 0, shown
    assert shown.count("stopped by SIGUSR1 after step") == 1
    assert f"after step {int(checkpoint.latest(folder).name[5:])}," in shown


def stream(folder: Path) -> list[str]:
    """Writes four parquet files; returns the options that train on them as a stream."""
    from test_streaming import files

    options = [f"data.path={files(folder)}", "data=parquet", "data.streaming=true", "data.buffer_size=4"]
    return [*options, "image_size=16", "name=stream"]


def launch_stream(cwd: Path, *arguments: str) -> subprocess.Popen:
    keys = tuple(f"{x.split('=')[0]}=" for x in arguments)
    options = [x for x in TINY_RUN + OPTIONS if not x.startswith(("data.", *keys))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *options, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_D7_two_processes_share_a_stream_and_go_on_with_it(tmp_path):
    options = stream(tmp_path)
    child = launch_stream(tmp_path, *options)
    shown = finish(child)
    assert child.returncode == 0, shown
    folder = tmp_path / "runs" / "stream" / "checkpoints"
    saved = checkpoint.load(checkpoint.latest(folder), []).state
    assert [len(one) for one in saved["stream"]] == [1, 1] and saved["samples_seen"] == 36
    child = launch_stream(tmp_path, *options, "steps=5")
    shown = finish(child)
    assert child.returncode == 0 and "approximate: up to 8 rows" in shown, shown
    assert checkpoint.load(checkpoint.latest(folder), []).state["samples_seen"] == 60


def test_D4_when_one_process_loses_its_stream_all_save_and_end(tmp_path):
    child = launch_stream(tmp_path, *stream(tmp_path), "steps=100000", "every.save=2", "every.preview=1000000")
    folder = tmp_path / "runs" / "stream" / "checkpoints"
    wait_for(folder / "step_00000002", child)
    (tmp_path / "3.parquet").unlink()  # one of the processes asks for it in the next pass
    shown = finish(child, timeout=120)
    assert child.returncode != 0 and "MD-DATA-019" in shown and "FileNotFoundError" in shown, shown
    assert checkpoint.latest(folder).name > "step_00000002"

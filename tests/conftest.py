"""What several rooms' tests share: a run of the shapes world that is tiny enough to train in seconds."""

import copy
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for one another are slow on a busy machine
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
)  # of child processes

TINY_RUN = ["steps=4", "batch_size=8", "data.n=64", "data.validation=16", "net.channels=[16,32]"]
TINY_RUN += ["net.attend=[false,true]", "net.groups=4", "sampling_steps=2"]
TINY_RUN += ["every.log=1", "every.preview=4", "every.validate=2", "every.save=2"]
TINY_RUN += ["compile=false", "precision=fp32", "device=cpu", "workers=0", "cache=none"]


@functools.cache
def composed(*overrides: str) -> dict:
    """The configuration of a training, which Hydra takes a good part of a second to compose."""
    from minidiff.config import compose

    return compose("train", overrides)


def train(folder: Path, *overrides: str, base: Sequence[str] = TINY_RUN) -> Path:
    """Trains inside `folder` as `python train.py` would, in this process; returns the run folder."""
    from minidiff.config import CONF

    sys.path.insert(0, str(CONF.parent))
    import train as script

    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        values = copy.deepcopy(composed(*base, *overrides))
        script.train(values)
    finally:
        os.chdir(before)
        sys.path.remove(str(CONF.parent))
    return folder / "runs" / values["name"]


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """Computes as a user does, without the checks of shapes. For tests that call the same small functions thousands
    of times, where checking would take most of the time; the same functions are checked where other tests call them.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_network(monkeypatch) -> list[str]:
    """Collects every attempt to look up or to reach another machine, or to be reached; each of them fails."""
    import socket

    tried: list[str] = []

    def refuse(what: str):
        def attempt(*arguments, **_):
            tried.append(f"{what} {arguments[-1]!r}")
            raise OSError("there is no network")

        return attempt

    for name in ("connect", "connect_ex", "bind", "listen", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse(name))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    return tried


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("tiny"))

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minidiff import machine
from minidiff.errors import MachineError, NumericsError
from minidiff.machine import failures_in_words, require_equal_weights

CPU = torch.device("cpu")


def test_a_network_that_cannot_be_compiled_stays_eager_and_says_so(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long trace")

    net = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, "compile", broken)
    said = machine.compile_network(net, True, CPU)
    assert said == "eager (PyTorch cannot compile here: RuntimeError: no C++ compiler)"
    assert net(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("wanted", ["auto", False])
def test_a_cpu_compiles_only_when_asked(wanted, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: pytest.fail("compiled"))
    assert machine.compile_network(torch.nn.Linear(2, 2), wanted, CPU) == "eager"


def test_F10_weights_that_differ_between_processes_are_named_before_anything_is_saved():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))

    def everyone(sums):
        other = sums.clone()
        other[0, 2] += 1e-3
        return torch.cat([sums, other])

    alike = SimpleNamespace(num_processes=2, gather=lambda sums: torch.cat([sums, sums]))
    require_equal_weights(model, alike)
    with pytest.raises(NumericsError, match="MD-NUM-002.*1.weight"):
        require_equal_weights(model, SimpleNamespace(num_processes=2, gather=everyone))


def test_F12_running_out_of_memory_names_three_things_to_change():
    with (
        pytest.raises(MachineError, match="MD-ENV-004.*batch_size=64.*image_size=32.*accumulate=2.*bf16.*smaller") as e,
        failures_in_words(64, 32, torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert e.value.exit_code == 6


def test_F9_a_lost_process_is_said_in_words_and_other_errors_stay(monkeypatch):
    with pytest.raises(RuntimeError, match="^Connection closed"), failures_in_words(1, 1, torch.device("cpu")):
        raise RuntimeError("Connection closed by peer")  # a single process has no peers: not ours to explain
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(MachineError, match="MD-RUN-002.*process 1"), failures_in_words(1, 1, torch.device("cpu")):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="^shape"), failures_in_words(1, 1, torch.device("cpu")):
        raise RuntimeError("shape mismatch")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_memory_that_is_kept_is_not_asked_for_again():
    code = """
import resource, sys, torch
from minidiff.machine import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory(torch.device("cpu")) and not keep_memory(torch.device("meta"))
x = torch.ones(16 * 2**18)  # 16 MiB, 4096 pages
for _ in range(3):
    (x + 1).exp()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    (x + 1).exp()  # two blocks at once are more than is kept for nothing
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = {"capture_output": True, "text": True, "check": True}
    pages = {how: int(subprocess.run([sys.executable, "-c", code, how], **run).stdout) for how in ("keep", "as it is")}
    assert pages["keep"] < pages["as it is"] / 4  # at first it still looks for places

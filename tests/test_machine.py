from types import SimpleNamespace

import pytest
import torch

from minidiff import machine
from minidiff.errors import InputError, MachineError, NumericsError
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


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_weights_that_a_launcher_would_divide_are_refused(kind, monkeypatch):
    import accelerate

    divided = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: divided)
    with pytest.raises(InputError, match=f"MD-ENV-006.*{kind}.*torchrun"):
        machine.open_accelerator("cpu", "fp32", 1)

import pytest
import torch

from minidiff import machine

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

import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_RUN
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidiff import machine
from minidiff.config import CONF, build, compose
from minidiff.data import Batch
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
    with pytest.raises(InputError, match=f"MD-ENV-007.*{kind}.*torchrun"):
        machine.open_accelerator("cpu", "fp32", 1)


@pytest.mark.parametrize(
    "ranks, here, chosen, expected",
    [("2", "2", None, "lo"), ("16", "8", None, None), ("1", "1", None, None), (None, None, None, None)]
    + [("2", "2", "eth7", "eth7")],
    ids=["one_machine", "two_machines", "one_process", "no_launcher", "chosen_by_the_user"],
)
def test_T14_processes_of_one_machine_talk_over_its_loopback(ranks, here, chosen, expected, monkeypatch):
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name, value in zip(names, (ranks, here, chosen, chosen), strict=True):
        monkeypatch.setenv(name, value or "")  # so that it is put back, whatever happens to it
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(machine.socket, "if_nameindex", lambda: [(1, "eth0"), (2, "lo"), (3, "docker0")])
    machine.stay_on_this_machine()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == os.environ.get("NCCL_SOCKET_IFNAME") == expected


def test_T14_the_documents_warn_of_open_networks():
    for page in ("docs/scale.md", "SECURITY.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert "authenticated" in text and "private network" in text, page


def test_F11_deterministic_algorithms_are_demanded_for_the_run_alone(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with machine.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(ZeroDivisionError), machine.deterministic(True):
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------------------------------------------- Apple's GPUs


class NoFloat64(TorchDispatchMode):
    """Makes the `meta` device stand for one without float64: such a tensor on it raises, as on Apple's GPUs.

    What leaves the device are ones, so that programs can go on.
    """

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = isinstance(args[0], torch.Tensor) and args[0].device.type == "meta" if args else False
        if there and f.overloadpacket is torch.ops.aten._local_scalar_dense:
            return 1.0
        if there and f.overloadpacket is torch.ops.aten._to_copy and kwargs.get("device") == CPU:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = f(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (x.device.type, x.dtype) == ("meta", torch.float64):
                raise TypeError(f"{f}: the device has no float64")
        return out


def test_the_device_without_float64_is_strict():
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device="meta") * torch.ones(2, dtype=torch.float64, device="meta")
    with NoFloat64():
        x = torch.ones(2, device="meta") * torch.tensor(2.0, dtype=torch.float64)  # a number on the CPU: allowed there
        assert x.dtype == torch.float32 and x.sum().item() == 1.0


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which `meta` has none of


class Echo(torch.nn.Linear):
    """A network that costs nothing, for what goes on around it."""

    def prepare(self, cond):
        return cond

    def forward(self, x, tau, cond):
        return x * self.bias[0] + tau.reshape(-1, 1, 1, 1) + cond.vector.mean()


def test_A11_nothing_puts_float64_on_the_device(no_autocast):
    from minidiff.ema import EMA

    task = build(compose("train", TINY_RUN)["task"])
    batch = Batch(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), ["a star", "", "a ring", "a star"], [0, 1, 2, 3], [])
    with NoFloat64():
        task.to(torch.device("meta"))
        value, _ = task.loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        EMA(task.model, 0.99).update(task.model)
    task.model = Echo(1, 1, device="meta")

    def sample(**how):
        how |= {"steps": 3, "low": 0.1, "high": 0.9, "rescale": 0.5, "threshold": 0.9, "guidance": 2.0}
        with NoFloat64():
            assert task.pipeline.sample(["a star", "a ring"], [0, 1], **how).shape == (2, 3, 32, 32)

    for name in sorted(file.stem for file in (CONF / "sampler").glob("*.yaml")):
        sample(sampler=build(compose("train", [f"sampler={name}"])["sampler"]))
    for name in sorted(file.stem for file in (CONF / "process").glob("*.yaml")):
        task.pipeline.denoiser.process = build(compose("train", [f"process={name}"])["process"])
        sample()
        with NoFloat64():
            task.loss(batch)
            task.validate([batch])


def test_A11_measuring_latents_puts_no_float64_on_the_device(no_autocast):
    from minidiff.nn.vae import VAE
    from minidiff.space import Latents

    space = Latents(VAE(channels=(4, 4), layers=1, groups=2), 16, measured=True)
    with NoFloat64(), pytest.raises(NumericsError, match="MD-SPACE-003"):  # ones, which have no variance
        space.to("meta").measure([torch.zeros(2, 3, 16, 16, device="meta")])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_memory_that_is_kept_is_not_asked_for_again():
    code = """
import resource, sys, torch
from minidiff.machine import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory(torch.device("cpu")) and not keep_memory(torch.device("meta"))
x = torch.ones(64 * 2**18)  # 64 MiB: above every threshold that glibc moves by itself
for round in range(2):  # in the first, it looks for places
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        (x + 1).exp()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = {"capture_output": True, "text": True, "check": True}
    pages = {how: int(subprocess.run([sys.executable, "-c", code, how], **run).stdout) for how in ("keep", "as it is")}
    assert pages["keep"] < pages["as it is"] / 4


def test_on_cuda_cudnns_attention_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", (wanted := []).append)
    for device in ("cpu", "cuda"):
        machine.avoid_broken_kernels(torch.device(device))
    assert wanted == [False]


def test_bf16_is_chosen_only_where_the_hardware_multiplies_it(monkeypatch):
    """A T4 (which Colab lends) imitates bfloat16 and so does a CPU with AVX2 alone: PyTorch says yes, and crawls."""

    def with_emulation(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", with_emulation)
    assert machine.resolve_precision("auto", torch.device("cuda")) == "fp32"
    assert machine.resolve_precision("bf16", torch.device("cuda")) == "bf16"  # who asks for it gets it

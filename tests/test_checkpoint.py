import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff import checkpoint, tensor_files
from minidiff.checkpoint import latest, load, prune, remove_leftovers, save, verify
from minidiff.errors import CheckpointError, MachineError, NumericsError
from minidiff.state import flatten_optimizer, unflatten_optimizer

FILES = ["MANIFEST.json", "ema.safetensors", "model.safetensors", "state.json"]


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"net.weight": torch.full((4, 3), value), "net.bias": torch.arange(3.0)},
        "ema": {"net.weight": torch.full((4, 3), value / 2), "net.bias": torch.zeros(3)},
    }


def write(folder: Path, *steps: int) -> list[Path]:
    return [save(folder, step, tensors(step), {"seed": 0}) for step in steps]


def test_round_trip_is_bit_exact(tmp_path):
    torch.manual_seed(0)
    odd = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "half": torch.randn(2).half(),
        "int": torch.arange(4),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 2),
        "subnormal": torch.tensor([1e-45, -0.0]),
        "transposed": torch.randn(3, 4).T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    state = {"lr": 0.1 + 0.2, "rng": [2**64 - 1, 0], "text": "ä\n", "best": None, "last": [1e-320, 5]}
    place = save(tmp_path, 12, {"model": odd, "none": {}}, state)
    assert place == tmp_path / "step_00000012" and (tmp_path / "LATEST").read_text() == "step_00000012\n"
    back = load(place, ["model", "none"])
    assert back.step == 12 and back.state == state and back.tensors["none"] == {}
    for name, x in odd.items():
        y = back.tensors["model"][name]
        assert y.dtype == x.dtype and y.shape == x.shape
        assert y.contiguous().view(-1).view(torch.uint8).equal(x.contiguous().view(-1).view(torch.uint8))


def flip(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [flip, lambda d: d[: len(d) // 2], lambda d: d + b"tail", lambda d: b"", lambda d: b"\xff" * len(d), None],
    ids=["E4_flipped_bit", "E3_truncated", "E3_extra_tail", "E3_empty", "E3_garbage", "E3_missing_file"],
)
def test_damaged_file_is_refused_by_name_and_the_one_before_is_taken(tmp_path, name, damage):
    good, bad = write(tmp_path, 1000, 1200)
    file = bad / name
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"MD-CKPT-00[24].*{name}"):
        load(bad, ["model", "ema"])
    with pytest.warns(UserWarning, match=rf"(?s)step_00001200.*{name}.*using step_00001000"):
        assert latest(tmp_path) == good


def test_E4_every_single_byte_of_a_checkpoint_is_covered(tmp_path):
    (place,) = write(tmp_path, 1)
    for name in FILES:
        data = (place / name).read_bytes()
        for at in range(len(data)):
            (place / name).write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(CheckpointError, match="MD-CKPT-00[45]"):
                verify(place)
        (place / name).write_bytes(data)
    assert verify(place) == 1


def test_only_the_parts_asked_for_are_hashed(tmp_path):
    (place,) = write(tmp_path, 5)
    (place / "model.safetensors").write_bytes(flip((place / "model.safetensors").read_bytes()))
    assert load(place, ["ema"]).tensors["ema"]["net.weight"][0, 0] == 2.5
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load(place, ["model"])


def test_E3_all_damaged_is_none_with_a_warning_and_an_empty_folder_is_none_without(tmp_path, recwarn):
    assert latest(tmp_path / "nothing") is None and not recwarn
    (place,) = write(tmp_path, 1)
    (place / "state.json").unlink()
    with pytest.warns(UserWarning, match="state.json is missing"):
        assert latest(tmp_path) is None


def test_A5_a_checkpoint_that_is_not_there_lists_those_that_are(tmp_path):
    write(tmp_path, 10, 20)
    with pytest.raises(CheckpointError, match="MD-CKPT-001.*step_00000099 does not exist.*step_00000020"):
        load(tmp_path / "step_00000099", ["model"])


def test_E8_a_missing_part_is_named(tmp_path):
    (place,) = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="MD-CKPT-006.*no optimizer.*ema, model"):
        load(place, ["model", "optimizer"])


@pytest.mark.parametrize("text", ["[]", "3", '{"schema": 1}', "[" * 10**5, '{"schema":1,"step":1,"files":[]}'])
def test_E12_a_foreign_manifest_is_refused(tmp_path, text):
    (place,) = write(tmp_path, 1)
    (place / "MANIFEST.json").write_text(text)
    with pytest.raises(CheckpointError, match="MD-CKPT-004.*MANIFEST.json"):
        verify(place)


def test_E12_a_manifest_cannot_point_outside_its_folder(tmp_path):
    (place,) = write(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    listed = {"../secret": checkpoint._identity(tmp_path / "secret")}
    (place / "MANIFEST.json").write_text(checkpoint._manifest(1, listed))
    with pytest.raises(CheckpointError, match="MD-CKPT-004.*secret"):
        verify(place)


def test_E13_another_schema_is_refused_by_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SCHEMA", 7)
    (place,) = write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="MD-CKPT-005.*version 7.*reads version 1"):
        load(place, ["model"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_E15_a_tensor_that_is_not_finite_is_refused_at_save_and_at_load(tmp_path, value, monkeypatch):
    (good,) = write(tmp_path, 1)
    broken = tensors() | {"ema": {"fine": torch.ones(1), "net.weight": torch.tensor([1.0, value])}}
    with pytest.raises(NumericsError, match="MD-CKPT-010.*ema.safetensors: net.weight"):
        save(tmp_path, 2, broken, {})
    assert sorted(x.name for x in tmp_path.iterdir()) == ["LATEST", good.name]
    with monkeypatch.context() as m:
        m.setattr(tensor_files, "_not_finite", lambda tensors: None)
        bad = save(tmp_path, 3, broken, {})
    with pytest.raises(CheckpointError, match="MD-CKPT-007.*net.weight"):
        load(bad, ["ema"])


@pytest.mark.parametrize("call", range(9))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["E2", "E1"])
def test_E1_E2_a_save_that_fails_at_any_stage_leaves_the_previous_one(tmp_path, monkeypatch, call, error):
    (good,) = write(tmp_path, 1)
    count = iter(range(100))

    def failing(real):
        def stage(*arguments):
            if next(count) == call:
                raise error
            return real(*arguments)

        return stage

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    stages = 6  # four files, the folder, and the rename that makes it count
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MachineError):
        save(tmp_path, 2, tensors(2), {})
    monkeypatch.undo()
    found = latest(tmp_path)
    assert found == (good if call < stages else tmp_path / "step_00000002")
    back = load(found, ["model"])
    assert torch.equal(back.tensors["model"]["net.weight"], tensors(back.step)["model"]["net.weight"])
    assert write(tmp_path, 1, 2)[-1] == latest(tmp_path)  # and saving works again
    assert not list(tmp_path.glob(".tmp-step*"))


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
from minidiff.checkpoint import save

def tensors(value):
    return {"model": {"w": torch.full((64,), float(value))}}

def kill_at(call):
    count = iter(range(1000))
    def wrap(real, after):
        def stage(*a, **k):
            now = next(count) == call
            if now and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*a, **k)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return stage
    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, wrap(getattr(os, name), after=call % 2))

root = Path(sys.argv[1])
for again in (0, 1):  # a new step, and the same step written once more
    for call in range(20):
        folder = root / f"{again}-{call:02d}"
        save(folder, 1, tensors(1), {})
        child = os.fork()
        if child == 0:
            kill_at(call)
            save(folder, 1 if again else 2, tensors(2), {}, keep_last=1)
            os._exit(0)
        os.waitpid(child, 0)
"""


def test_E1_SIGKILL_at_every_stage_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], check=True, timeout=300)
    values = []
    for folder in sorted(tmp_path.iterdir()):
        found = latest(folder)  # a warning here would be an error: half a checkpoint is never even looked at
        x = load(found, ["model"]).tensors["model"]["w"]
        assert x.unique().numel() == 1
        values.append(x[0].item())
        remove_leftovers(folder)
        assert not list(folder.glob(".tmp-*"))
        assert latest(folder) is not None
    assert len(values) == 40 and set(values) == {1.0, 2.0}


def test_E1_a_half_written_temporary_folder_is_ignored_and_removed_at_the_next_save(tmp_path):
    (good,) = write(tmp_path, 1)
    shutil.copytree(good, tmp_path / ".tmp-step_00000002-123")
    assert latest(tmp_path) == good
    write(tmp_path, 3)
    assert not list(tmp_path.glob(".tmp-*"))


def test_E2_a_path_that_cannot_be_written_is_said_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="MD-CKPT-009.*Free"):
        save(tmp_path / "file" / "checkpoints", 1, tensors(), {})


def test_E10_numeric_order_and_strangers(tmp_path):
    places = write(tmp_path, 1000, 999, 99_999_999, 123_456_789)
    for name in ("step_best", "step_00009999x", "other"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) == places[3]
    shutil.rmtree(places[3])
    shutil.rmtree(places[2])
    assert latest(tmp_path).name == "step_00001000"


def test_the_same_step_again_replaces_the_first(tmp_path):
    write(tmp_path, 7)
    again = save(tmp_path, 7, tensors(5), {"second": True})
    assert load(again, []).state == {"second": True}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["LATEST", "step_00000007"]


def test_E10_keep_last_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step, tensors(), {}, keep_last=2)
    assert [x.name for x in sorted(tmp_path.glob("step_*"))] == ["step_00000010", "step_00000011"]


@pytest.mark.parametrize("damage", [flip, lambda data: data[:-1]], ids=["flipped", "short"])
def test_E10_keep_last_never_deletes_the_only_valid_one(tmp_path, damage):
    good, *bad = write(tmp_path, 1, 2, 3)
    for place in bad:
        (place / "model.safetensors").write_bytes(damage((place / "model.safetensors").read_bytes()))
    prune(tmp_path, 2)
    prune(tmp_path, 1)
    with pytest.warns(UserWarning, match="using step_00000001"):
        assert latest(tmp_path) == good


def test_E10_a_deletion_that_fails_is_a_warning(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match="could not delete.*step_00000001.*read-only"):
        place = save(tmp_path, 2, tensors(), {}, keep_last=1)
    assert latest(tmp_path) == place


def small_training() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.Linear(2, 2))  # the last is never used
    decayed = [x for x in model.parameters() if x.ndim > 1]
    plain = [x for x in model.parameters() if x.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 0.3}]
    return model, torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model[:3](x).square().mean().backward()
    optimizer.step()


def test_E5_optimizer_round_trip_then_a_step_is_bitwise_equal(tmp_path):
    model, optimizer = small_training()
    for seed in range(3):
        train(model, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 1 / 3
    flat, groups = flatten_optimizer(optimizer, model)
    assert {"0.weight/exp_avg", "0.weight/exp_avg_sq", "2.bias/step"} <= flat.keys()
    assert not any(name.startswith("3.") for name in flat)
    place = save(tmp_path, 3, {"model": model.state_dict(), "optimizer": flat}, {"groups": groups})

    back = load(place, ["model", "optimizer"])
    other, fresh = small_training()
    other.load_state_dict(back.tensors["model"])
    state = unflatten_optimizer(fresh, other, back.tensors["optimizer"], back.state["groups"])
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]  # betas are a tuple again
    fresh.load_state_dict(state)
    train(model, optimizer, 9)
    train(other, fresh, 9)
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)
    flat, again = flatten_optimizer(optimizer, model)[0], flatten_optimizer(fresh, other)[0]
    assert all(torch.equal(x, again[name]) for name, x in flat.items()) and flat.keys() == again.keys()


def test_optimizer_state_of_another_model_is_refused_by_name():
    model, optimizer = small_training()
    train(model, optimizer, 0)
    flat, groups = flatten_optimizer(optimizer, model)
    json.dumps(groups)
    with pytest.raises(CheckpointError, match="MD-CKPT-011.*grouped"):
        unflatten_optimizer(optimizer, model, flat, groups[::-1])
    with pytest.raises(CheckpointError, match="MD-CKPT-011.*9.weight/step"):
        unflatten_optimizer(optimizer, model, {"9.weight/step": torch.tensor(1.0)}, groups)
    with pytest.raises(CheckpointError, match=r"MD-CKPT-011.*0.weight/exp_avg \[1\]"):
        unflatten_optimizer(optimizer, model, flat | {"0.weight/exp_avg": torch.ones(1)}, groups)

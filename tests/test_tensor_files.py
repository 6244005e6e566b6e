import os
import pickle
import zipfile

import pytest
import torch

from minidiff.checkpoint import load, save
from minidiff.errors import CheckpointError
from minidiff.state import plain_name
from minidiff.tensor_files import read_tensors, write_tensors


def test_tied_weights_can_be_written(tmp_path):
    x = torch.randn(3)
    write_tensors(tmp_path / "a.safetensors", {"a": x, "b": x})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["b"], x)


def test_E9_prefixes_never_reach_a_file_and_are_stripped_when_read(tmp_path):
    from safetensors.torch import save_file

    place = save(tmp_path, 1, {"model": {"module._orig_mod.net.0._orig_mod.weight": torch.ones(1)}}, {})
    with open(place / "model.safetensors", "rb") as f:
        assert b"_orig_mod" not in f.read()
    save_file({"_orig_mod.module.net.weight": torch.ones(1)}, tmp_path / "foreign.safetensors")
    assert list(read_tensors(tmp_path / "foreign.safetensors")) == ["net.weight"]
    assert plain_name("my_module.weight") == "my_module.weight"
    assert plain_name("net.module.weight") == "net.module.weight"


def test_E2_a_folder_that_is_not_there_is_said_by_the_system_and_not_by_safetensors(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_tensors(tmp_path / "missing" / "model.safetensors", {"x": torch.ones(1)})


def test_A5_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="MD-CKPT-013.*model.safetensors does not exist"):
        read_tensors(tmp_path / "model.safetensors")


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['MARKER']}",)


def test_R8_E12_T1_pickles_are_refused_in_words_and_never_run(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setenv("MARKER", str(marker))
    bomb = pickle.dumps(Bomb())
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "model.pt").write_bytes(bomb)
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(bomb)
    zipped = tmp_path / "zipped.safetensors"
    with zipfile.ZipFile(zipped, "w") as z:
        z.writestr("archive/data.pkl", bomb)
    for read in (lambda: load(folder, ["model"]), lambda: load(folder / "model.pt", ["model"])):
        with pytest.raises(CheckpointError, match="MD-CKPT-003.*pickle.*safetensors"):
            read()
    for file in (folder / "model.pt", disguised, zipped):
        with pytest.raises(CheckpointError, match="MD-CKPT-003.*pickle.*safetensors"):
            read_tensors(file)
    assert not marker.exists()


def disguises(bomb: object) -> dict[str, bytes]:
    """Pickles as they have passed scanners: old protocols, odd headers, archives that are broken or of another kind."""
    import bz2
    import gzip
    import io

    plain, archive = pickle.dumps(bomb), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("archive/data.pkl", plain)
    zipped = archive.getvalue()
    return {
        "protocol 0": pickle.dumps(bomb, protocol=0),
        "a harmless pickle first": pickle.dumps({}) + plain,
        "a broken checksum": zipped[:14] + b"\0\0\0\0" + zipped[18:],
        "encrypted, it says": zipped[:6] + b"\1\0" + zipped[8:],
        "gzip": gzip.compress(plain),
        "bzip2": bz2.compress(plain),
        "tar": b"data.pkl".ljust(257, b"\0") + b"ustar\x0000" + plain,
        "behind a header of safetensors": (2).to_bytes(8, "little") + b"{}" + plain,
        "as an array": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(128)
        + plain,
    }


@pytest.mark.parametrize("disguise", disguises(None))
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model"])
def test_T2_a_pickle_that_no_scanner_knows_is_refused_like_any_other(disguise, name, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setenv("MARKER", str(marker))
    file = tmp_path / name
    file.write_bytes(disguises(Bomb())[disguise])
    with pytest.raises(CheckpointError, match="MD-CKPT-0(03|14)"):
        read_tensors(file)
    with pytest.raises(CheckpointError, match="MD-CKPT-00[123]"):
        load(file, ["model"])
    assert not marker.exists()


@pytest.mark.parametrize("header", [2**63, 10**9, 100, 0])
def test_E12_safetensors_header_bomb_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(header.to_bytes(8, "little") + b"{" * 50)
    with pytest.raises(CheckpointError, match="MD-CKPT-014.*model.safetensors"):
        read_tensors(file)

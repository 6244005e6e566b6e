"""What keeps the house in order: one door per heavy library, no pickle, no private code in notebooks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted((ROOT / "minidiff").rglob("*.py"))
SCRIPTS = [*ROOMS, ROOT / "train.py", ROOT / "sample.py"]
DOORS = {
    "open_clip": {"text"},
    "datasets": {"data/sources"},
    "wandb": {"log"},
    "hydra": {"config/command"},
    "omegaconf": {"config/command"},
    "matplotlib": {"viz"},
    "safetensors": {"checkpoint"},
    "accelerate": {"machine"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("library", DOORS)
def test_each_heavy_library_has_one_door(library):
    users = {
        file.relative_to(ROOT / "minidiff").with_suffix("").as_posix() for file in ROOMS if library in imports(file)
    }
    assert users == DOORS[library]


def calls(file: Path) -> set[str]:
    """Returns the calls of a file as they are written, and keyword arguments as name=value."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
            found |= {f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords}
    return found


def test_T1_nothing_is_ever_unpickled():
    forbidden = {"pickle.load", "pickle.loads", "torch.load", "eval", "exec", "np.load"}
    forbidden |= {"weights_only=False", "allow_pickle=True", "trust_remote_code=True"}
    for file in SCRIPTS:
        assert not calls(file) & forbidden, file


def test_no_room_hides_its_annotations():
    for file in ROOMS:  # jaxtyping's checks need real annotations
        assert "from __future__ import annotations" not in file.read_text(), file


def test_error_codes_are_unique_to_one_message():
    where: dict[str, set[str]] = {}
    for file in SCRIPTS:
        for code in re.findall(r'"(MD-[A-Z]+-\d+)"', file.read_text()):
            where.setdefault(code, set()).add(file.name)
    assert {code: files for code, files in where.items() if len(files) > 1} == {}


def test_every_error_code_is_documented():
    raised = {code for file in SCRIPTS for code in re.findall(r'"(MD-[A-Z]+-\d+)"', file.read_text())}
    listed = set(re.findall(r"^\| (MD-[A-Z]+-\d+) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))
    assert raised == listed

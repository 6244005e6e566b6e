"""What keeps the house in order: one door per heavy library, no pickle, no private code in notebooks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted((ROOT / "minidiff").rglob("*.py"))
DOORS = {
    "open_clip": {"text"},
    "datasets": {"data"},
    "wandb": {"log"},
    "hydra": {"config"},
    "omegaconf": {"config"},
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
    users = {file.relative_to(ROOT / "minidiff").with_suffix("").as_posix() for file in ROOMS if library in imports(file)}
    assert users == DOORS[library]


def test_T1_nothing_is_ever_unpickled():
    forbidden = re.compile(r"\bpickle\b.*\bload|torch\.load\(|weights_only\s*=\s*False|allow_pickle\s*=\s*True|\beval\(|\bexec\(")
    for file in [*ROOMS, ROOT / "train.py", ROOT / "sample.py"]:
        hits = [line for line in file.read_text().splitlines() if forbidden.search(line) and not line.strip().endswith(".eval()")]
        assert not [h for h in hits if not re.search(r"\.eval\(\)", h)], file


def test_no_room_hides_its_annotations():
    for file in ROOMS:  # jaxtyping's checks need real annotations
        assert "from __future__ import annotations" not in file.read_text(), file


def test_error_codes_are_unique_to_one_message():
    where: dict[str, set[str]] = {}
    for file in [*ROOMS, ROOT / "train.py", ROOT / "sample.py"]:
        for code in re.findall(r'"(MD-[A-Z]+-\d+)"', file.read_text()):
            where.setdefault(code, set()).add(file.name)
    assert {code: files for code, files in where.items() if len(files) > 1} == {}

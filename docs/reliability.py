"""Writes docs/reliability.md from the names of the tests: `python docs/reliability.py`.

A test proves the rows whose ids stand in its name (`test_E5_resume_matrix`) or in the ids of its parameters.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INTRO = """# What has been tried to break it

Written by `python docs/reliability.py` from the names of the tests; `pytest -k E5` runs those of a row.

Not promised: bit-for-bit resuming across versions of PyTorch or across devices, or on a GPU (`deterministic=true` asks
for it; no GPU was at hand).

| id | what happens | what comes of it | tests |
|---|---|---|---|
"""


REST = """
What does not apply, or is not built:

| id | what happens | why there is no test |
|---|---|---|
"""


def proofs() -> dict[str, list[str]]:
    """Returns the tests of each row, as file::test."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        block = re.split(r"(?=^@pytest|^def test_|^[A-Z_]+ = )", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        ids: list[str] = []
        for part in block:
            name = re.match(r"def (test_\w+)", part)
            if name is None:  # a decorator or a table of cases: its ids belong to the test that follows
                ids += re.findall(r"\"([A-GRT]\d+)(?:_\w+)?\"", part)
                continue
            for row in dict.fromkeys([*re.findall(r"_([A-GRT]\d+)(?=_|$)", name[1]), *ids]):
                found.setdefault(row, []).append(f"{file.name}::{name[1]}")
            ids = []
    return found


def page() -> str:
    """Returns the page; raises KeyError for a row without a test, unless it says by a minus that it has none."""
    tests, text, rest = proofs(), INTRO, REST
    for line in (ROOT / "docs" / "reliability_rows.txt").read_text(encoding="utf-8").splitlines():
        row, happens, comes = line.split("|")
        if row.startswith("-"):
            rest += f"| {row[1:]} | {happens} | {comes} |\n"
            continue
        named = "<br>".join(f"`{name}`" for name in tests[row])
        text += f"| {row} | {happens} | {comes} | {named} |\n"
    return text + rest


if __name__ == "__main__":
    (ROOT / "docs" / "reliability.md").write_text(page(), encoding="utf-8")

"""What keeps the house in order: one door per heavy library, no pickle, no private code in notebooks."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted((ROOT / "minidiff").rglob("*.py"))
SCRIPTS = [*ROOMS, ROOT / "train.py", ROOT / "sample.py"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOORS = {
    "open_clip": {"text/clip", "text/tower"},
    "datasets": {"data/source", "data/sources", "data/divide"},
    "wandb": {"log"},
    "hydra": {"config/command"},
    "omegaconf": {"config/command"},
    "matplotlib": {"viz"},
    "safetensors": {"tensor_files"},
    "accelerate": {"machine"},
}


DEPENDENCIES = {
    re.match(r"[\w-]+", line)[0].lower()
    for part in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in part
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
    forbidden = {"pickle.load", "pickle.loads", "torch.load", "eval", "exec", "np.load", "os.system", "__import__"}
    forbidden |= {"weights_only=False", "allow_pickle=True", "trust_remote_code=True", "shell=True"}
    forbidden |= {"hydra.utils.instantiate", "instantiate", "yaml.load", "OmegaConf.register_new_resolver"}
    for file in SCRIPTS:
        assert not calls(file) & forbidden, file
        assert not imports(file) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "subprocess"}, file


def test_T2_no_scanner_is_relied_on():
    """Scanners of pickles have been outwitted time and again; here no pickle is judged, all are refused."""
    scanners = {"picklescan", "modelscan", "fickling", "pickletools"}
    for file in SCRIPTS:
        assert not imports(file) & scanners, file
    assert not [x for x in DEPENDENCIES if x in scanners]


SERVERS = {"gradio", "streamlit", "flask", "fastapi", "uvicorn", "aiohttp", "tornado", "bottle", "http", "socketserver"}
SERVERS |= {"xmlrpc", "websockets", "asyncio"}


def test_T12_there_is_no_demo_server():
    for file in SCRIPTS:
        assert not imports(file) & SERVERS, file
        listening = {name for name in calls(file) if re.search(r"\.(bind|listen|serve_forever|launch)$", name)}
        assert not listening, (file, listening)
    assert DEPENDENCIES and not [x for x in DEPENDENCIES if x in SERVERS]


def test_T14_no_remote_procedure_calls():
    for file in SCRIPTS:
        assert "distributed.rpc" not in file.read_text(), file


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRIVATE = {
    "a token": r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|[0-9a-f]{40})\b",
    "a password in an address": r"://[^/\s:@]+:[^/\s@]+@",
    "an absolute path": r"(?<![\w.:/])(/(home|root|Users|tmp|mnt|work|content|opt)/|[A-Z]:\\\\)",
    "a download that is run": r"(curl|wget)[^\n]*\|\s*(ba|z)?sh|^\s*[!%].*(curl|wget|pip)\b",
}


def private(text: str) -> list[str]:
    return [what for what, pattern in PRIVATE.items() if re.search(pattern, text, re.MULTILINE)]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_T15_notebooks_hold_no_outputs_tokens_or_paths_of_their_author(file):
    notebook = json.loads(file.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert cell["cell_type"] != "code" or (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
        assert not cell["metadata"] and not cell.get("attachments") and not private("".join(cell["source"])), cell["id"]
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize(
    "text, what",
    [
        ("login('hf_AbCdEfGhIjKlMnOpQrStUvWx')", "a token"),
        ("key = '" + "0123456789abcdef" * 2 + "01234567'", "a token"),
        ("git clone https://me:secret@host.org/x", "a password in an address"),
        ("minidiff.load('/home/ada/runs/x')", "an absolute path"),
        ("open('C:\\\\Users\\\\ada')", "an absolute path"),
        ("!curl https://x.org/install | sh", "a download that is run"),
        ("%pip install x", "a download that is run"),
        ("minidiff.load(minidiff.bundled('shapes_run')) # a/home/b, https://x.org/home/y", None),
    ],
)
def test_T15_what_the_notebooks_are_searched_for_would_be_found(text, what):
    assert private(text) == ([what] if what else [])


def test_T7_pillow_keeps_its_guards():
    for file in SCRIPTS:
        text = file.read_text()
        assert "LOAD_TRUNCATED_IMAGES" not in text and "MAX_IMAGE_PIXELS" not in text, file
        for call in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) == "Image.open":
                assert "formats" in {k.arg for k in call.keywords}, file


def test_T10_no_option_holds_a_key():
    for file in (ROOT / "conf").rglob("*.yaml"):
        for line in file.read_text().splitlines():
            assert not re.match(r"\s*\w*(token|api_key|password|secret)\w*\s*:", line), (file, line)
            assert "${oc." not in line, (file, line)


def test_T11_importing_minidiff_does_nothing_else():
    """No network, no files, no heavy libraries: what an import does cannot be refused."""
    code = "import sys; before = set(sys.modules); import minidiff; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "minidiff" in done.stdout and "torch" not in done.stdout and "socket" not in done.stdout


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


def test_the_reliability_page_is_what_the_tests_say():
    code = "import reliability; print(reliability.page(), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "reliability.md").read_text(), "run `python docs/reliability.py`"

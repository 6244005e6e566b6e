"""The ecosystem's folder: `config.json` says what a model is, safetensors hold its weights, under diffusers' names.

    folder/  config.json  diffusion_pytorch_model.safetensors          (or shards and their .safetensors.index.json)

Nothing here knows a particular model. A model brings a table of `Rules` that turn its own tensor names into theirs,
where `[a b]` in a name says that our one tensor is their two, one below the other (our fused projections).
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.errors import CheckpointError, InputError, MachineError
from minidiff.state import plain_name
from minidiff.tensor_files import read_metadata, read_tensors, write_tensors

Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]  # regular expression, replacement; applied in order

_CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_VARIANTS = (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_config(folder: str | Path, model: str, defaults: Mapping, accepted: Mapping[str, tuple]) -> dict:
    """Returns `config.json` of a diffusers `model` (its class name) with `defaults` for what it leaves out.

    `accepted` lists the values of options that we do not vary. Raises `InputError` that names every other value, and
    `CheckpointError` for a file that is missing or damaged.
    """
    config, file = _read(Path(folder)), Path(folder) / _CONFIG
    flaws = []
    if config.get("_class_name", model) != model:
        flaws.append(f"_class_name={config['_class_name']!r} (only {model!r} is read here)")
    for key, values in accepted.items():
        value = config.get(key, values[0])
        if not all(x in values for x in listed(value)):
            flaws.append(f"{key}={value!r} (only {' or '.join(repr(x) for x in values)})")
    require_supported(flaws, file)
    known = {*defaults, *accepted}
    if unknown := [key for key, x in config.items() if key not in known and key[0] != "_" and x not in (None, False)]:
        warnings.warn(f"{file} has options that minidiff does not know and ignores: {', '.join(unknown)}", stacklevel=3)
    return {**defaults, **config}


def read_class(folder: str | Path) -> str | None:
    """Returns the diffusers class that `config.json` names, if it names one."""
    return _read(Path(folder)).get("_class_name")


def read_object(file: Path) -> dict:
    """Returns the JSON object in a file that is there; raises `CheckpointError` if it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, str(error)) from error
    return found


def require_supported(flaws: Sequence[str], file: Path) -> None:
    """Raises one `InputError` that names all values (`flaws`) of a configuration that we cannot build."""
    if flaws:
        raise InputError(
            "MD-INTEROP-004",
            f"{file} describes a model that minidiff cannot build: {'; '.join(flaws)}. The weights would load into a "
            "network that computes something else, so nothing was loaded. Use a checkpoint of the Stable Diffusion 1 "
            "or 2 family (or its VAE), or open this one with diffusers.",
        )


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Returns all tensors of a folder by their names there, floating-point numbers as float32.

    Raises `CheckpointError` for a folder without safetensors, and for a file that is damaged or a pickle.
    """
    folder = Path(folder)
    tensors = {}
    for file in _weight_files(folder):
        tensors |= read_file(file)
    return tensors


def read_file(file: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of one safetensors file, floating-point numbers as float32, in memory of their own.

    Raises `CheckpointError` for a file that is missing, damaged, or a pickle. Files that minidiff wrote carry a
    checksum, which is verified; those of others have none, and then only what breaks the format can be noticed.
    """
    file = Path(file)
    if file.suffix in _PICKLES:
        raise _pickle(file)
    try:
        tensors = read_tensors(file)
        expected = read_metadata(file).get("sha256")
    except OSError as error:
        raise damaged(file, f"it cannot be read: {error}") from error
    if expected is not None and expected != _checksum(tensors):
        raise damaged(file, "its tensors do not have the sha256 they were written with")
    return {name: x.to(torch.float32, copy=True) if x.is_floating_point() else x.clone() for name, x in tensors.items()}


def write(
    folder: str | Path,
    files: Mapping[str, Mapping[str, Tensor]],
    config: Mapping | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes safetensors `files` (tensors by name, by name of file, `metadata` in their headers) and `config.json`.

    Each is written beside its place and then renamed; the weights carry a checksum in their header. Raises
    `NumericsError` if a tensor is not finite and `MachineError` if the disk refuses.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            _write_file(folder / name, tensors, metadata or {})
            (folder / f"{name}.index.json").unlink(missing_ok=True)  # of shards that were here before
        if config is not None:
            (folder / f".tmp-{_CONFIG}").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
            os.replace(folder / f".tmp-{_CONFIG}", folder / _CONFIG)
    except OSError as error:
        raise MachineError(
            "MD-INTEROP-008",
            f"Cannot write the model to {folder}: {error}. Free some disk space, or check the permissions of {folder}.",
        ) from error


def translate(name: str, rules: Rules) -> tuple[str, ...]:
    """Returns the name(s) in the ecosystem of our tensor `name`; several if ours is theirs fused."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    fused = re.search(r"\[(.*)\]", name)
    return (name,) if fused is None else tuple(name.replace(fused[0], part) for part in fused[1].split())


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], rules: Rules, source: str | Path) -> None:
    """Gives `model` (which may be on the meta device) the weights `tensors`, which are named as in the ecosystem.

    Raises `CheckpointError` with the first five names of each kind if tensors are missing, left over or misshapen.
    """
    own = model.state_dict()
    names = {name: translate(name, rules) for name in own}
    # The shape of one of their tensors: ours, or an equal share of its rows.
    shapes = {
        part: (own[name].shape[0] // len(parts), *own[name].shape[1:])
        for name, parts in names.items()
        for part in parts
    }
    reshaped = [x for x in shapes if x in tensors and tuple(tensors[x].shape) != shapes[x]]
    differences = {
        "missing": [x for x in shapes if x not in tensors],
        "left over": [x for x in tensors if x not in shapes],
        "of another shape": [f"{x} {[*tensors[x].shape]} (not {[*shapes[x]]})" for x in reshaped],
    }
    if found := [f"{len(x)} {kind}: {', '.join(x[:5])}" for kind, x in differences.items() if x]:
        raise CheckpointError(
            "MD-INTEROP-005",
            f"The weights in {source} are not those of the model that its configuration describes "
            f"({'; '.join(found)}). Take all files from the same place, and copy or download them again.",
        )
    fused = {name: _join([tensors[part] for part in parts]) for name, parts in names.items()}
    model.load_state_dict(fused, assign=True)


def named_as_theirs(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Returns our tensors under the ecosystem's names, fused ones taken apart."""
    theirs = {}
    for name, x in tensors.items():
        parts = translate(plain_name(name), rules)  # torch.compile puts its own word before the names
        theirs |= dict(zip(parts, x.chunk(len(parts)), strict=True))
    return theirs


def same(values: Iterable) -> object:
    """Returns the one value of all, or else the list: as configurations write options that may differ per level."""
    values = list(values)
    return values[0] if all(x == values[0] for x in values) else values


def listed(value: object) -> list:
    """Returns the values of an option that is one value or a list: the other way round than `same`."""
    return value if isinstance(value, list) else [value]


def damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError("MD-INTEROP-003", f"{file} is damaged ({why}). Copy or download it again.")


def _write_file(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    try:
        write_tensors(temporary, tensors, {"format": "pt", "sha256": _checksum(tensors), **metadata})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _read(folder: Path) -> dict:
    if not (folder / _CONFIG).is_file():
        raise _missing(folder, f"it has no {_CONFIG}")
    return read_object(folder / _CONFIG)


def _weight_files(folder: Path) -> list[Path]:
    if there := [folder / name for name in _VARIANTS if (folder / name).is_file()]:
        return there[:1]
    if not (index := folder / f"{WEIGHTS}.index.json").is_file():
        if pickles := sorted(x for x in folder.glob("*") if x.suffix in _PICKLES):
            raise _pickle(pickles[0])
        raise _missing(folder, f"it has neither {WEIGHTS} nor {index.name}")
    try:
        shards = {str(x) for x in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(index, f"it lists no shards: {error!r}") from error
    if outside := [x for x in shards if Path(x).name != x]:
        raise damaged(index, f"it names a file outside its folder: {outside[0]}")
    if absent := sorted(x for x in shards if not (folder / x).is_file()):
        raise _missing(folder, f"{index.name} lists {', '.join(absent)}, and it is not there")
    return [folder / x for x in sorted(shards)]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _missing(folder: Path, why: str) -> CheckpointError:
    there = ", ".join(sorted(x.name for x in folder.glob("*"))[:10]) or "nothing"
    return CheckpointError(
        "MD-INTEROP-001",
        f"{folder} is not a model folder in the layout of diffusers: {why}. There is: {there}. In a pipeline's folder, "
        "name the part (unet, vae).",
    )


def _pickle(file: Path) -> CheckpointError:
    return CheckpointError(
        "MD-INTEROP-002",
        f"{file} is a pickle, and loading a pickle can run any code hidden in it, so minidiff reads safetensors only. "
        f'Convert it without running that code: python -c "import torch; from safetensors.torch import save_file; '
        f"w = torch.load('{file}', weights_only=True, map_location='cpu'); "
        f"save_file({{k: v.clone() for k, v in w.items()}}, '{file.with_suffix('.safetensors')}')\"",
    )

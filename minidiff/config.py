"""Configuration: the only door to Hydra, and `build`, which turns a piece of configuration into an object.

`train.py` and `sample.py` compose a configuration from conf/ and the command line; nothing behind them sees it.
A node with a `_target_` names a function or class of minidiff and its arguments. Configurations travel inside
checkpoints, so they are data: `build` checks where the resolved object really lives, and refuses what is not
minidiff's own.
"""

import functools
import importlib
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType

from minidiff.errors import InputError, MinidiffError, did_you_mean

CONF = Path(__file__).resolve().parents[1] / "conf"  # of a checkout
TEXTS = ("prompt", "negative", "out", "run", "prompts", "name", "resume", "data.path", "lora")
TEXTS += ("space.vae", "text.folder")  # free text on the command line

# The scalars that every training understands: type, and the range that makes sense.
TRAIN_RANGES = {
    "seed": (int, 0, 2**63 - 1),
    "steps": (int, 1, 10**9),
    "batch_size": (int, 1, 10**6),
    "accumulate": (int, 1, 10**6),
    "image_size": (int, 1, 4096),
    "drop_cond": (float, 0.0, 1.0),
    "ema": (float, 0.0, 0.999999),
    "every.log": (int, 1, 10**9),
    "every.preview": (int, 1, 10**9),
    "every.save": (int, 1, 10**9),
    "every.validate": (int, 1, 10**9),
    "optim.lr": (float, 1e-12, 100.0),
    "optim.clip": (float, 1e-12, 1e12),
    "optim.warmup": (int, 0, 10**9),
    "optim.weight_decay": (float, 0.0, 10.0),
}
SAMPLE_RANGES = {"n": (int, 1, 100_000), "seed": (int, 0, 2**63 - 1), "lora_scale": (float, -100.0, 100.0)}
CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "compile": ("auto", True, False),
    "weights": ("ema", "raw"),
}


def build(node: Mapping | list | object) -> object:
    """Returns what a node describes: an object for `{_target_: minidiff.…, …}`, else the plain value, recursively.

    `_partial_: true` gives the function with these arguments bound. Raises InputError for an unknown or foreign target
    (MD-CONF-001, -002), an unknown or missing argument (-003) or one of the wrong type (-004).
    """
    if isinstance(node, list | tuple):
        return [build(x) for x in node]
    if not isinstance(node, Mapping):
        return node
    values = {str(key): build(value) for key, value in node.items() if key not in ("_target_", "_partial_")}
    if "_target_" not in node:
        return values
    target = _locate(str(node["_target_"]))
    partial = bool(node.get("_partial_", False))
    _check_arguments(target, values, partial)
    return functools.partial(target, **values) if partial else target(**values)


def _locate(path: str) -> Callable:
    """Imports `minidiff.room.name` and makes sure that what it finds was defined in minidiff."""
    module_name, _, name = path.rpartition(".")
    if module_name.split(".")[0] != "minidiff":
        raise InputError(
            "MD-CONF-001",
            f"The configuration asks to build '{path}', which is not part of minidiff. Configurations may name only "
            "minidiff's own functions and classes, because one that came with somebody's checkpoint could "
            "otherwise run any code.",
        )
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            "MD-CONF-002", f"The configuration asks to build '{path}', which does not exist: {error}."
        ) from error
    if not callable(target) or getattr(target, "__module__", "").split(".")[0] != "minidiff":
        raise InputError(
            "MD-CONF-001",
            f"The configuration asks to build '{path}', which minidiff only borrows from elsewhere; it must be "
            "minidiff's own.",
        )
    return target


def _check_arguments(target: Callable, values: Mapping[str, object], partial: bool) -> None:
    signature, name = inspect.signature(target), f"{target.__module__}.{target.__name__}"
    for key, value in values.items():
        if key not in signature.parameters:
            known = list(signature.parameters)
            raise InputError(
                "MD-CONF-003",
                f"{name} has no option '{key}'; its options are {', '.join(known)}.{did_you_mean(key, known)}",
            )
        if not _fits(value, signature.parameters[key].annotation):
            wanted = signature.parameters[key].annotation
            wanted = getattr(wanted, "__name__", str(wanted))
            raise InputError("MD-CONF-004", f"{name} wants {key} to be of type {wanted}, and {key}={value!r} is not.")
    missing = [k for k, p in signature.parameters.items() if p.default is p.empty and k not in values]
    if missing and not partial:
        raise InputError(
            "MD-CONF-003",
            f"{name} needs {', '.join(missing)}, which the configuration does not give (a null or empty group?).",
        )


def _fits(value: object, annotation: object) -> bool:
    """Whether a plain value fits a plain annotation; what is not plain (tensors, callables, …) is left to the code."""
    if typing.get_origin(annotation) in (UnionType, typing.Union):
        return any(_fits(value, option) for option in typing.get_args(annotation))
    if annotation is type(None):
        return value is None
    if inspect.isclass(typing.get_origin(annotation)) and issubclass(typing.get_origin(annotation), Sequence):
        element = (*typing.get_args(annotation), object)[0]
        return isinstance(value, list | tuple) and all(_fits(x, element) for x in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool):
        return isinstance(value, annotation)
    return value is not None or not inspect.isclass(annotation)


def check(values: Mapping, ranges: Mapping[str, tuple]) -> None:
    """Checks the scalars of a configuration all at once; raises InputError (MD-CONF-005) that lists every problem."""
    problems = []
    for key, (kind, low, high) in ranges.items():
        value = functools.reduce(
            lambda node, part: node.get(part) if isinstance(node, Mapping) else None, key.split("."), values
        )
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (kind is float and isinstance(value, float) and math.isfinite(value))
        if value is not None and not (number and low <= value <= high):
            words = "a whole number" if kind is int else "a number"
            problems.append(f"{key}={value} must be {words} from {low} to {high}")
    for key, options in CHOICES.items():
        if key in values and values[key] not in options:
            problems.append(f"{key}={values[key]} must be one of {', '.join(str(o).lower() for o in options)}")
    if problems:
        raise InputError(
            "MD-CONF-005", "; ".join(problems) + ". Correct the command line or the experiment's file in conf/."
        )


def compose(config_name: str, overrides: Sequence[str], conf: Path = CONF) -> dict:
    """Returns conf/`config_name`.yaml with overrides as the command line writes them, as plain values.

    For notebooks and tests; the scripts use `entry`. Raises InputError (MD-CONF-006) for what Hydra refuses.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            return OmegaConf.to_container(
                hydra.compose(config_name, _quoted(overrides)), resolve=True, throw_on_missing=True
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError("MD-CONF-006", _reword(error, conf, config_name)) from error


def entry(config_name: str) -> Callable:
    """Makes `main(values: dict)` the entry point of a script: composes conf/`config_name`.yaml with the command line.

    A failure that a user can act on is one paragraph and an exit code; `debug=true` shows the traceback instead.
    """

    def decorate(main: Callable[[dict], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            import hydra
            from hydra.errors import HydraException
            from omegaconf import OmegaConf
            from omegaconf.errors import OmegaConfBaseException

            conf = Path(inspect.getfile(main)).resolve().parent / "conf"
            sys.argv[1:] = _quoted(sys.argv[1:])
            os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach us, who word them

            jobs: list[dict] = []

            @hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)
            def composed(cfg: object) -> None:
                jobs.append(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))

            try:
                composed()
                for values in jobs:  # outside of Hydra, which would print its own remarks on our errors
                    main(values)
            except (MinidiffError, HydraException, OmegaConfBaseException) as error:
                if any(re.fullmatch(r"\+*debug=true", x, re.IGNORECASE) for x in sys.argv):
                    raise
                if not isinstance(error, MinidiffError):
                    error = InputError("MD-CONF-006", _reword(error, conf, config_name))
                print(error, file=sys.stderr)
                sys.exit(error.exit_code)

        return run

    return decorate


def _quoted(arguments: Sequence[str]) -> list[str]:
    """Puts free text in the quotes that Hydra's grammar wants around commas, colons, brackets and the like."""

    def quote(argument: str) -> str:
        key, equals, value = argument.partition("=")
        if not equals or key not in TEXTS or value in ("", "null") or value[0] in "\"'":
            return argument
        # backslashes count only before a quote, the closing one included
        escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ("\\" + m[2] if m[2] else ""), value)
        return f'{key}="{escaped}"'

    return [quote(x) for x in arguments]


def write_yaml(values: Mapping, file: Path) -> None:
    """Keeps a configuration beside what it made."""
    from omegaconf import OmegaConf

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(values))), encoding="utf-8")


def _reword(error: Exception, conf: Path, config_name: str) -> str:
    """Turns Hydra's message into one paragraph, with a suggestion for a key that does not exist."""
    from omegaconf import OmegaConf

    text = " ".join(str(x) for x in (error, error.__cause__) if x is not None and str(x))
    text = re.sub(r"\s+", " ", text).strip()
    if mandatory := re.search(r"Missing mandatory value.*full_key: ([\w.]+)", text):
        return f"{mandatory[1]} is not given, and it has no default. Add {mandatory[1]}=… to the command line."
    missing = re.search(r"Could not override '([\w./@]+)'|Key '([\w.]+)' is not in struct", text)
    group = re.search(r"Could not find '(\w+)/([\w-]+)'", text)
    if group:
        options = sorted(p.stem for p in (conf / group[1]).glob("*.yaml"))
        return (
            f"There is no {group[1]}={group[2]}; the choices are {', '.join(options)}.{did_you_mean(group[2], options)}"
        )
    if missing:
        key = missing[1] or missing[2]
        known = set()
        for file in conf.rglob("*.yaml"):
            package = "" if file.parent in (conf, conf / "experiment") else f"{file.parent.name}."
            known |= {package + k for k in _leaves(OmegaConf.to_container(OmegaConf.load(file), resolve=False))}
        groups = {p.name for p in conf.iterdir() if p.is_dir()}
        return (
            f"Unknown key '{key}'.{did_you_mean(key, sorted(known | groups))} "
            f"`python {config_name}.py --help` lists the options."
        )
    return f"The configuration cannot be composed: {text}"


def _leaves(node: object, prefix: str = "") -> list[str]:
    if not isinstance(node, Mapping):
        return [prefix.rstrip(".")]
    return [
        leaf
        for key, value in node.items()
        if key not in ("_target_", "defaults")
        for leaf in _leaves(value, f"{prefix}{key}.")
    ]

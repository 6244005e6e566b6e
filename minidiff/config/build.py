"""Configuration → objects. A node with a `_target_` names a function or class of minidiff and its arguments; `build`
checks where the resolved object really lives, and refuses what is not minidiff's own.
"""

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import UnionType

from minidiff.errors import InputError, did_you_mean

# The rooms whose functions and classes a configuration may name. They compute or read; none of them writes or deletes.
ROOMS = ("tasks", "pipeline", "nn", "process", "objective", "samplers", "grids", "guidance", "space", "text", "data")
ROOMS += ("optim",)
READERS = ("interop", "load_")  # a room that also writes, and how the names of those begin that only read


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
    if not _may_build(module_name, name):
        raise InputError("MD-CONF-001", _foreign(path))
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            "MD-CONF-002", f"The configuration asks to build '{path}', which does not exist: {error}."
        ) from error
    # what it was defined as counts: our rooms import from elsewhere
    if not callable(target) or not _may_build(getattr(target, "__module__", ""), getattr(target, "__name__", "_")):
        raise InputError("MD-CONF-001", _foreign(path))
    return target


def _may_build(module: str, name: str) -> bool:
    package, room = (*module.split("."), "")[:2]
    reads = room in ROOMS or (room == READERS[0] and name.startswith(READERS[1]))
    return package == "minidiff" and reads and not name.startswith("_")


def _foreign(path: str) -> str:
    return (
        f"The configuration asks to build '{path}'. Configurations may name only what is defined in minidiff's rooms "
        f"{', '.join(ROOMS)}, because one that came with somebody's checkpoint could otherwise run any code or "
        "overwrite any file."
    )


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

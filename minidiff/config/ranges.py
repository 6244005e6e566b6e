"""What the scalars of a configuration may be."""

import functools
import math
import re
from collections.abc import Mapping

from minidiff.errors import InputError

# The scalars that every training understands: type, and the range that makes sense.
TRAIN_RANGES = {
    "seed": (int, 0, 2**63 - 1),
    "steps": (int, 1, 10**9),
    "batch_size": (int, 1, 10**6),
    "accumulate": (int, 1, 10**6),
    "image_size": (int, 1, 4096),
    "drop_cond": (float, 0.0, 1.0),
    "blur": (float, 0.0, 1.0),
    "ema": (float, 0.0, 0.999999),
    "process.middle": (float, 0.0, 0.99),
    "max_bad": (float, 0.0, 1.0),
    "keep": (int, 1, 10**6),
    "sampling_steps": (int, 1, 10_000),
    "every.log": (int, 1, 10**9),
    "every.preview": (int, 1, 10**9),
    "every.save": (int, 1, 10**9),
    "every.validate": (int, 1, 10**9),
    "optim.lr": (float, 1e-12, 100.0),
    "optim.clip": (float, 1e-12, 1e12),
    "optim.warmup": (int, 0, 10**9),
    "optim.weight_decay": (float, 0.0, 10.0),
}
SAMPLE_RANGES = {
    "n": (int, 1, 100_000),
    "seed": (int, 0, 2**63 - 1),
    "candidates": (int, 1, 10_000),
    "strength": (float, 0.0, 1.0),
    "lora_scale": (float, -100.0, 100.0),
}
AUTO = ("blur",)  # numbers that may also be left to us
CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "compile": ("auto", True, False),
    "deterministic": (True, False),
    "empty_caption": ("unconditional", "drop", "raise"),
    "weights": ("ema", "raw"),
    "optim.decay": ("cosine", "linear"),
}


def check(values: Mapping, ranges: Mapping[str, tuple]) -> None:
    """Checks the scalars of a configuration all at once; raises InputError (MD-CONF-005) that lists every problem."""
    problems = []
    for key, (kind, low, high) in ranges.items():
        value = _value(values, key)
        if key in AUTO and value == "auto":
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (kind is float and isinstance(value, float) and math.isfinite(value))
        if value is not None and not (number and low <= value <= high):
            words = "a whole number" if kind is int else "a number"
            problems.append(f"{key}={value} must be {words} from {low} to {high}")
    for key, options in CHOICES.items():
        value = _value(values, key, missing=options[0])
        if value not in options:
            problems.append(f"{key}={value} must be one of {', '.join(str(o).lower() for o in options)}")
    if problems:
        raise InputError(
            "MD-CONF-005", "; ".join(problems) + ". Correct the command line or the experiment's file in conf/."
        )


def _value(values: Mapping, key: str, missing: object = None) -> object:
    """Returns the value at a dotted key, or `missing` where there is none."""
    return functools.reduce(
        lambda node, part: node.get(part, missing) if isinstance(node, Mapping) else missing, key.split("."), values
    )


def check_name(name: str) -> None:
    """Raises InputError (MD-CONF-008) unless runs/`name` is a folder directly inside runs/."""
    if not re.fullmatch(r"[\w.+=-]+", name) or name.strip(".") == "" or len(name) > 200:
        raise InputError(
            "MD-CONF-008",
            f"name={name!r} is not a name for a run. Its folder is runs/NAME: use letters, digits, '-', '_' and '.'.",
        )

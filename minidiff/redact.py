"""Keeps tokens, keys and passwords out of everything that a run writes, prints or sends."""

import re
from collections.abc import Mapping

_SECRETS = [
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***"),
    (re.compile(r"\b(gh[opsu]_|github_pat_|sk-|wandb_v1_)[\w-]{16,}"), r"\1***"),
    # 40 hexadecimal digits alone may well be a commit; after one of these words they are a W&B key
    (re.compile(r"(?i)((?:keys?|token|login|password|secret|wandb)\b.{0,20}?)\b[0-9a-f]{40}\b"), r"\1***"),
    (re.compile(r"://[^/\s\"'<>]+@"), "://***@"),
    (re.compile(r"\bBearer\s+[\w.~+/=-]{6,}|(?i:\bbearer)\s+(?=\S*\d)[\w.~+/=-]{16,}"), "Bearer ***"),
]


def redact(text: str) -> str:
    """Returns `text` with tokens, keys and passwords replaced by ***."""
    for secret, stars in _SECRETS:
        text = secret.sub(stars, text)
    return text


def redact_values(node: object) -> object:
    """Returns plain nested values, such as a configuration, with every text in them redacted."""
    if isinstance(node, Mapping):
        return {redact(str(key)): redact_values(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [redact_values(value) for value in node]
    return redact(node) if isinstance(node, str) else node

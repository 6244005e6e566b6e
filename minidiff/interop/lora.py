"""LoRA files of the ecosystem ⇄ our adapters.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight         (down; lora_B is up)

The same numbers are published under several spellings: peft's (above; diffusers writes it, with or without `unet.`),
two older ones of diffusers, and kohya-ss' (underscores for dots). All are read, peft's is written.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from minidiff.errors import CheckpointError, InputError
from minidiff.interop.folder import damaged, read_file, translate, write
from minidiff.interop.unet import RULES
from minidiff.nn.lora import LoRA, LowRank
from minidiff.nn.unet import UNet
from minidiff.tensor_files import read_metadata

FILE = "pytorch_lora_weights.safetensors"
SPELLINGS = (
    (r"^unet\.", ""),
    (r"\.processor\.", "."),
    (r"\.to_out_lora\.(down|up)\.weight$", r".to_out.0.\1"),
    (r"\.(to_[qkv])_lora\.(down|up)\.weight$", r".\1.\2"),
    (r"\.lora\.(down|up)\.weight$", r".\1"),
    (r"\.lora_(down|up)\.weight$", r".\1"),
    (r"\.lora_A(\.default)?\.weight$", ".down"),
    (r"\.lora_B(\.default)?\.weight$", ".up"),
)
_METADATA = "lora_adapter_metadata"  # diffusers' name for peft's configuration in the header of the file


def load_lora(path: str | Path, net: UNet) -> LoRA:
    """Returns the adapter in a file (or a folder with `pytorch_lora_weights.safetensors`) for `net`, on the CPU.

    Text-encoder parts are left out, with a warning. Raises `CheckpointError` that names the first five tensors of each
    kind that do not belong to `net`, have another shape, or lack their counterpart.
    """
    file = _file(Path(path))
    tensors, config = read_file(file), _peft_config(file)
    if others := [name for name in tensors if name.startswith(("text_encoder", "te_", "lora_te"))]:
        warnings.warn(f"{len(others)} tensors of {file} are for a text encoder and were left out", stacklevel=2)
    places = _places(net)
    aliases = {f"lora_unet_{module.replace('.', '_')}": module for module in places}
    found: dict[str, dict[str, Tensor]] = {}
    left_over = []
    for name in tensors.keys() - others:
        module, _, kind = _spell(name).rpartition(".")
        module = aliases.get(module, module)
        if module not in places or kind not in ("down", "up", "alpha"):
            left_over.append(name)
        else:
            found.setdefault(module, {})[kind] = tensors[name]
    _require_whole(file, net, found, places, sorted(left_over))
    changes = []
    for module, (layer, part, parts) in places.items():
        if module in found:
            down, up = found[module]["down"], found[module]["up"]
            shape = net.get_submodule(layer).weight.shape[1:]
            alpha = float(found[module]["alpha"]) if "alpha" in found[module] else _alpha(config, module)
            down, up = down.reshape(len(down), *shape), up.reshape(len(up), len(down), *[1] * (len(shape) - 1))
            changes.append(LowRank(down, up, layer=layer, part=part, parts=parts, alpha=alpha))
    return LoRA(changes)


def save_lora(lora: LoRA, path: str | Path) -> None:
    """Writes the adapter to a file or into a folder; `load_lora` and diffusers' `load_lora_weights` can read it.

    Where alpha is not the rank, the header says so in peft's terms, as diffusers does.
    """
    path = Path(path)
    folder, name = (path.parent, path.name) if path.suffix == ".safetensors" else (path, FILE)
    modules = {_module(change): change for change in lora.changes}
    tensors = {}
    for module, change in modules.items():
        tensors |= {f"unet.{module}.lora_A.weight": change.down, f"unet.{module}.lora_B.weight": change.up}
    metadata = {}
    if any(change.alpha != change.rank for change in modules.values()):
        config = {
            "r": lora.changes[0].rank,
            "lora_alpha": lora.changes[0].alpha,
            "rank_pattern": {f"^{module}": change.rank for module, change in modules.items()},
            "alpha_pattern": {f"^{module}": change.alpha for module, change in modules.items()},
            "target_modules": list(modules),
        }
        metadata[_METADATA] = json.dumps({f"unet.{key}": value for key, value in config.items()})
    write(folder, {name: tensors}, metadata=metadata)


def _places(net: UNet) -> dict[str, tuple[str, int, int]]:
    """Returns, for every matrix by its name in the ecosystem: our layer, the part of it, and how many it has."""
    places = {}
    for name, weight in net.named_parameters():
        if name.endswith(".weight") and weight.ndim > 1:
            modules = [x.removesuffix(".weight") for x in translate(name, RULES)]
            places |= {x: (name.removesuffix(".weight"), i, len(modules)) for i, x in enumerate(modules)}
    return places


def _module(change: LowRank) -> str:
    return translate(f"{change.layer}.weight", RULES)[change.part].removesuffix(".weight")


def _spell(name: str) -> str:
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _peft_config(file: Path) -> dict:
    """Returns the configuration of peft in the header of a file, or an empty one."""
    try:
        values = json.loads(read_metadata(file).get(_METADATA, "{}"))
        config = {key.removeprefix("unet."): x for key, x in values.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(file, f"its header's {_METADATA} cannot be read: {error}") from error
    if config.get("use_rslora"):
        raise InputError(
            "MD-INTEROP-012",
            f"{file} was trained with use_rslora=true, which divides alpha by the root of the rank "
            "(Kalajdzievski 2023); minidiff reads ordinary LoRA only. Merge it into its base model with peft, and load "
            "that.",
        )
    return config


def _alpha(config: Mapping, module: str) -> float | None:
    """Returns the alpha that peft's configuration gives a module, by its name or the end of it; None: the rank."""
    patterns = {pattern.lstrip("^"): x for pattern, x in (config.get("alpha_pattern") or {}).items()}
    named = [x for pattern, x in patterns.items() if f".{module}".endswith(f".{pattern}")]
    value = named[0] if named else config.get("lora_alpha")
    return None if value is None else float(value)


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _require_whole(
    file: Path,
    net: UNet,
    found: Mapping[str, Mapping[str, Tensor]],
    places: Mapping[str, tuple[str, int, int]],
    left_over: Sequence[str],
) -> None:
    reshaped = []
    for module, x in found.items():
        layer, _, parts = places[module]
        weight = net.get_submodule(layer).weight
        if "down" in x and "up" in x:
            ours = (len(weight) // parts, weight[0].numel())
            theirs = (len(x["up"]), x["down"][0].numel())
            if ours != theirs or x["up"][0].numel() != len(x["down"]):
                reshaped.append(f"{module} {[*theirs]} (not {[*ours]})")
    differences = {
        "left over": left_over,
        "without their counterpart": [module for module, x in found.items() if not {"down", "up"} <= x.keys()],
        "of another shape": reshaped,
    }
    flaws = [f"{len(x)} {kind}: {', '.join(x[:5])}" for kind, x in differences.items() if x]
    if flaws or not found:
        raise CheckpointError(
            "MD-INTEROP-011",
            f"{file} is not a LoRA for this UNet ({'; '.join(flaws) or 'it holds none'}). It was made for another base "
            "model (Stable Diffusion 1, 2 and XL differ), or is another kind of adapter (DoRA, LoKr, LoHa). Use the "
            "base model that its page names.",
        )

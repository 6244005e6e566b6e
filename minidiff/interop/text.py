"""Text towers of Stable Diffusion's folders ↔ `minidiff.text.Tower`.

    FOLDER/text_encoder/   config.json, model.safetensors      CLIPTextModel or CLIPTextModelWithProjection
    FOLDER/tokenizer/      vocab.json, merges.txt (or tokenizer.json), tokenizer_config.json

Stable Diffusion 1 ships OpenAI's CLIP ViT-L/14 (quick GELU, padded with the end token). Stable Diffusion 2 ships
OpenCLIP's ViT-H/14 (exact GELU, padded with "!") and uses its layer before the last: the folder simply has 23 of
the 24 layers, and the final norm after them.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minidiff.errors import InputError
from minidiff.tensor_files import read_tensors, write_tensors
from minidiff.text import Tower, TowerShape, TowerTokenizer

ENCODER, TOKENIZER, WEIGHTS = "text_encoder", "tokenizer", "model.safetensors"
PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
# What a config that does not say so means, as in transformers' CLIPTextConfig.
DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "architectures": [PLAIN],
    "use_attention_mask": False,  # diffusers' pipelines hide the padding if a config has this
}
# Modules of the transformer, theirs and ours, and of each layer, with weight and bias; attention goes apart.
OUTSIDE = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
INSIDE = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def load_text(folder: str | Path, *, pooled: bool = True) -> Tower:
    """Reads the text tower and the tokenizer of a folder in diffusers' layout (the one that holds `text_encoder`).

    Without `pooled` it gives tokens only, which is all that Stable Diffusion 1 and 2 listen to.
    Raises `InputError` if a file is missing or no JSON (MD-INTEROP-401), for a tower of another kind (-402), for
    weights that are not the config's (-403), and for a tokenizer without the tokens it needs (-404), and
    `CheckpointError` for a damaged file of weights. Nothing is unpickled.
    """
    folder = Path(folder)
    shape = _shape(folder / ENCODER / "config.json")
    tower = Tower(shape, _tokenizer(folder / TOKENIZER, shape), pooled=pooled)
    file = folder / ENCODER / WEIGHTS
    if not file.is_file():
        raise InputError(
            "MD-INTEROP-401",
            f"{file} does not exist, so the text encoder has no weights. minidiff reads only safetensors: a .bin "
            "beside it is a pickle and can run any code. Take the folder's safetensors variant, and download it whole.",
        )
    tower.load_weights(_ours(file, read_tensors(file), tower.weights, shape))
    return tower


def save_text(tower: Tower, folder: str | Path) -> None:
    """Writes a tower and its tokenizer so that transformers loads them; weights are float32."""
    folder, shape = Path(folder), tower.shape
    for part in (ENCODER, TOKENIZER):
        (folder / part).mkdir(parents=True, exist_ok=True)
    vocabulary = tower.tokenizer.vocabulary
    config = {
        "architectures": [PLAIN if shape.projection is None else PROJECTED],
        "model_type": "clip_text_model",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "max_position_embeddings": shape.length,
        "vocab_size": shape.vocabulary,
        "projection_dim": shape.projection or shape.width,
        "hidden_act": next(name for name, quick in ACTIVATIONS.items() if quick == shape.quick_gelu),
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary[tower.tokenizer.start],
        "eos_token_id": vocabulary[tower.tokenizer.end],
        "pad_token_id": vocabulary[tower.tokenizer.pad],
    }
    special = {"bos_token": tower.tokenizer.start, "eos_token": tower.tokenizer.end, "unk_token": tower.tokenizer.end}
    special["pad_token"] = tower.tokenizer.pad
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tower.tokenizer.length} | special
    _write(folder / ENCODER / "config.json", config)
    _write(folder / TOKENIZER / "vocab.json", vocabulary)
    _write(folder / TOKENIZER / "tokenizer_config.json", settings)
    _write(folder / TOKENIZER / "special_tokens_map.json", special)
    merges = "".join(f"{first} {second}\n" for first, second in tower.tokenizer.merges)
    (folder / TOKENIZER / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8", newline="\n")
    write_tensors(folder / ENCODER / WEIGHTS, _theirs(tower.weights, shape))


# ------------------------------------------------------------------------------------------------- weights


def _names(layers: int) -> dict[str, str]:
    """Returns our name of every tensor that only changes its name, by theirs."""
    names = dict(OUTSIDE)
    for i in range(layers):
        for theirs, ours in INSIDE.items():
            for kind in ("weight", "bias"):
                names[f"encoder.layers.{i}.{theirs}.{kind}"] = f"transformer.resblocks.{i}.{ours}.{kind}"
    return names


def _attention(layers: int) -> dict[str, list[str]]:
    """Returns their queries, keys and values by our tensor, which holds all three, one above the other."""
    return {
        f"transformer.resblocks.{i}.attn.in_proj_{kind}": [f"encoder.layers.{i}.{x}.{kind}" for x in QUERY_KEY_VALUE]
        for i in range(layers)
        for kind in ("weight", "bias")
    }


def _ours(file: Path, saved: Mapping[str, Tensor], model: Mapping[str, Tensor], shape: TowerShape) -> dict[str, Tensor]:
    given = {name.removeprefix("text_model."): x.float() for name, x in saved.items()}
    given.pop("embeddings.position_ids", None)  # 0 … 76, in older files
    names, attention = _names(shape.layers), _attention(shape.layers)
    wanted = [*names, *(name for parts in attention.values() for name in parts)]
    if shape.projection is not None:
        wanted.append("text_projection.weight")
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        raise _misfit(file, f"missing: {_some(missing)}; not in the config: {_some(unknown)}")
    tensors = {ours: given[theirs] for theirs, ours in names.items()}
    tensors |= {ours: torch.cat([given[name] for name in parts]) for ours, parts in attention.items()}
    if shape.projection is not None:
        tensors["text_projection"] = given["text_projection.weight"].T
    if wrong := [name for name, x in tensors.items() if x.shape != model[name].shape]:
        found = [f"{name} {[*tensors[name].shape]} instead of {[*model[name].shape]}" for name in wrong]
        raise _misfit(file, f"other shapes: {_some(found)}")
    return tensors


def _theirs(tensors: Mapping[str, Tensor], shape: TowerShape) -> dict[str, Tensor]:
    saved = {f"text_model.{theirs}": tensors[ours] for theirs, ours in _names(shape.layers).items()}
    for ours, parts in _attention(shape.layers).items():
        saved |= {f"text_model.{name}": x for name, x in zip(parts, tensors[ours].chunk(3), strict=True)}
    if shape.projection is not None:
        saved["text_projection.weight"] = tensors["text_projection"].T
    return saved


def _misfit(file: Path, why: str) -> InputError:
    return InputError(
        "MD-INTEROP-403",
        f"The weights in {file} are not those of the config.json beside it ({why}). One of the two belongs to another "
        "text encoder; copy both from the same place.",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


# ------------------------------------------------------------------------------------------- config and tokenizer


def _shape(file: Path) -> TowerShape:
    config = DEFAULTS | _read(file)
    kind = (config["architectures"] or [PLAIN])[0]
    problems = {
        "architectures": kind not in (PLAIN, PROJECTED),
        "hidden_act": config["hidden_act"] not in ACTIVATIONS,
        "layer_norm_eps": config["layer_norm_eps"] != 1e-5,
        "use_attention_mask": bool(config["use_attention_mask"]),
    }
    if any(problems.values()):
        named = ", ".join(f"{key}={config[key]!r}" for key, wrong in problems.items() if wrong)
        raise InputError(
            "MD-INTEROP-402",
            f"{file} describes a text encoder that minidiff does not have: {named}. It reads {PLAIN} and {PROJECTED} "
            f"with hidden_act {' or '.join(ACTIVATIONS)} and layer_norm_eps 1e-05, as Stable Diffusion 1 and 2 have.",
        )
    return TowerShape(
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        length=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
        projection=config["projection_dim"] if kind == PROJECTED else None,
        quick_gelu=ACTIVATIONS[config["hidden_act"]],
    )


def _tokenizer(folder: Path, shape: TowerShape) -> TowerTokenizer:
    settings = _read(folder / "tokenizer_config.json")
    if (folder / "vocab.json").is_file():
        vocabulary = _read(folder / "vocab.json")
        lines = _text(folder / "merges.txt", str.splitlines)
        merges = [line.split() for line in lines if line and not line.startswith("#version")]
    else:  # what newer transformers write instead
        model = _read(folder / "tokenizer.json").get("model", {})
        vocabulary, merges = model.get("vocab", {}), model.get("merges", [])
        merges = [pair.split() if isinstance(pair, str) else pair for pair in merges]
    # An older folder's map of special tokens has the last word: only there does Stable Diffusion 2 name its padding.
    if (folder / "special_tokens_map.json").is_file() and "added_tokens_decoder" not in settings:
        settings |= _read(folder / "special_tokens_map.json")
    pad = settings.get("pad_token", TowerTokenizer.end)
    pad = pad["content"] if isinstance(pad, Mapping) else pad
    special = (TowerTokenizer.start, TowerTokenizer.end, pad)
    if any(x not in vocabulary for x in special) or max(vocabulary.values()) >= shape.vocabulary:
        raise InputError(
            "MD-INTEROP-404",
            f"The vocabulary in {folder} does not go with the text encoder: it must hold "
            f"{', '.join(map(str, special))} and no id above {shape.vocabulary - 1} (it has {len(vocabulary)} pieces). "
            "Copy text_encoder and tokenizer from the same place.",
        )
    # A caption is never longer than the positions that there are embeddings for.
    length = min(settings.get("model_max_length", shape.length), shape.length)
    return TowerTokenizer(vocabulary, [tuple(pair) for pair in merges], pad=pad, length=length)


def _read(file: Path) -> dict:
    found = _text(file, json.loads)
    if not isinstance(found, dict):
        raise InputError("MD-INTEROP-401", f"{file} holds no JSON object. Copy or download the folder again.")
    return found


def _text(file: Path, parse: Callable) -> object:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "MD-INTEROP-401",
            f"{file} cannot be read ({error}). Name the folder that holds `{ENCODER}` and `{TOKENIZER}`, downloaded "
            "whole.",
        ) from error


def _write(file: Path, values: Mapping) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")

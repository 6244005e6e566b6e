"""State as named tensors: one flat `name -> tensor` for a model, its average and its optimizer.

Names are the model's own. Wrappers prefix them, `module.` (DistributedDataParallel) and `_orig_mod.`
(torch.compile), and a checkpoint that kept those could only be loaded into a model wrapped the same way.
PyTorch keys an optimizer's state by position, so that a reordered model would silently take another
parameter's moments; here it is keyed by name.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minidiff.errors import CheckpointError


def plain_name(name: str) -> str:
    """Returns a tensor's name without the prefixes of wrappers, nested ones included."""
    return re.sub(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)_orig_mod\.", "", name)


def require_fit(what: str, saved: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` with the first five differences unless both hold the same names and shapes."""
    reshaped = [name for name, x in model.items() if name in saved and saved[name].shape != x.shape]
    differences = {
        "missing": [name for name in model if name not in saved],
        "unexpected": [name for name in saved if name not in model],
        "of another shape": [f"{x} {[*saved[x].shape]} (the model's is {[*model[x].shape]})" for x in reshaped],
    }
    if found := [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in differences.items() if names]:
        raise CheckpointError(
            "MD-CKPT-008",
            f"The saved {what} are those of another model ({'; '.join(found)}). Build the model from the "
            f"run's own config.yaml, or train under another name.",
        )


def flatten_optimizer(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], list[dict]]:
    """Returns the state as `parameter/slot` -> tensor, and the groups as plain values for JSON.

    AdamW's slots are exp_avg, exp_avg_sq and step; a group names its parameters.
    """
    state, names = optimizer.state_dict(), _parameter_names(optimizer, model)
    tensors = {f"{names[i]}/{slot}": x for i, slots in state["state"].items() for slot, x in slots.items()}
    return tensors, [group | {"params": [names[i] for i in group["params"]]} for group in state["param_groups"]]


def unflatten_optimizer(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], groups: Sequence[Mapping]
) -> dict:
    """Returns what `flatten_optimizer` took apart, for `optimizer.load_state_dict`.

    Raises `CheckpointError` if parameters, their shapes or their grouping differ from the optimizer's.
    """
    names, own = _parameter_names(optimizer, model), optimizer.state_dict()["param_groups"]
    parameters = {plain_name(name): x for name, x in model.named_parameters()}
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name, slot = key.rsplit("/", 1)
        if name not in index or x.ndim and x.shape != parameters[name].shape:
            raise _other_optimizer(f"{key} {[*x.shape]} has no place in it")
        state.setdefault(index[name], {})[slot] = x
    if [group["params"] for group in groups] != [[names[i] for i in group["params"]] for group in own]:
        raise _other_optimizer("its parameters are grouped or ordered differently")
    restored = []
    for saved, live in zip(groups, own, strict=True):
        # JSON knows no tuples: AdamW's betas come back as a list
        plain = {key: tuple(x) if isinstance(live.get(key), tuple) else x for key, x in saved.items()}
        restored.append(plain | {"params": live["params"]})
    return {"state": state, "param_groups": restored}


def _parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Returns the names of the optimizer's parameters in the order in which its state_dict counts them."""
    names = {id(x): plain_name(name) for name, x in model.named_parameters()}
    return [names[id(x)] for group in optimizer.param_groups for x in group["params"]]


def _other_optimizer(why: str) -> CheckpointError:
    return CheckpointError(
        "MD-CKPT-011",
        f"The saved optimizer state does not belong to this model and optimizer ({why}). Build both from the "
        f"run's own config.yaml, or start a new run from the weights alone.",
    )


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies saved weights into a model; raises CheckpointError (MD-CKPT-008) if they are another model's."""
    own = model.state_dict()
    require_fit("weights", saved=tensors, model={plain_name(name): x for name, x in own.items()})
    model.load_state_dict({name: tensors[plain_name(name)] for name in own})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Returns 16 hexadecimal digits that change with any name or bit of the tensors: which frozen network this is."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        raw = value.detach().cpu().contiguous()
        digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.ndim else str(raw).encode())
    return digest.hexdigest()[:16]

"""`scheduler_config.json` ↔ process, objective, sampler and grid.

What the ecosystem calls a scheduler is four of our ideas in one class: the table of noise levels the network was
trained on (process), what it predicts (objective), how to solve (sampler) and where to stop (grid). Each class of
the library has habits that its file does not mention; they are the `Family` table below.
"""

import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff import samplers
from minidiff.errors import InputError
from minidiff.grids import karras, leading, linspace, trailing
from minidiff.objective import X0, Eps, Objective, V
from minidiff.process import Table
from minidiff.samplers import State

FILE = "scheduler_config.json"
OBJECTIVES = {"epsilon": Eps(), "v_prediction": V(), "sample": X0()}
SPACINGS = {"leading": leading, "linspace": linspace, "trailing": trailing}


class Scheduler(NamedTuple):
    """A scheduler, taken apart."""

    process: Table
    objective: Objective
    sampler: Callable  # of minidiff.samplers
    grid: Callable  # (process, steps) -> times
    clip: bool  # x0_hat is kept in [-1, 1], as for models of pixels


class Family(NamedTuple):
    """What classes of the library have in common besides their file."""

    whole: bool  # linspace meets whole timesteps
    spare: bool  # the table is divided for one step more, and the cleanest entry left out
    levels: bool  # it thinks in Karras' sigma: zero terminal SNR stops at 2**-24 instead of 0
    end: tuple[str, object]  # the setting, and its value, that ends a walk at entry 0 instead of the data


# What a file that does not say so means, and the values that minidiff can take up ("…": any value does).
ANY = ("…",)
COMMON = {
    "num_train_timesteps": (1000, ANY),
    "beta_start": (0.0001, ANY),
    "beta_end": (0.02, ANY),
    "beta_schedule": ("linear", ("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": (None, ANY),
    "prediction_type": ("epsilon", tuple(OBJECTIVES)),
    "timestep_spacing": ("linspace", tuple(SPACINGS)),
    "steps_offset": (0, ANY),
    "rescale_betas_zero_snr": (False, (False, True)),
}
UNCHANGED = {key: (False, (False,)) for key in ("use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")}
CLIPPED = {"clip_sample": (True, (True, False)), "clip_sample_range": (1.0, (1.0,)), "thresholding": (False, (False,))}
SIGMAS = UNCHANGED | {
    "use_karras_sigmas": (False, (False, True)),
    "final_sigmas_type": ("zero", ("zero", "sigma_min")),
    "sigma_min": (None, (None,)),
    "sigma_max": (None, (None,)),
}
MULTISTEP = SIGMAS | {
    "solver_order": (2, (2,)),
    "lower_order_final": (True, (True,)),
    "thresholding": (False, (False,)),
    "use_dynamic_shifting": (False, (False,)),
}
SETTINGS = {
    "DDIMScheduler": COMMON
    | CLIPPED
    | {"timestep_spacing": ("leading", tuple(SPACINGS)), "set_alpha_to_one": (True, (True, False))},
    "DDPMScheduler": COMMON
    | CLIPPED
    | {
        "timestep_spacing": ("leading", tuple(SPACINGS)),
        "variance_type": ("fixed_small", ("fixed_small", "fixed_small_log")),  # two spellings of one variance
    },
    "PNDMScheduler": COMMON
    | {
        "timestep_spacing": ("leading", tuple(SPACINGS)),
        "set_alpha_to_one": (False, (True, False)),
        "prediction_type": ("epsilon", ("epsilon", "v_prediction")),
        "rescale_betas_zero_snr": (False, (False,)),
    },
    "EulerDiscreteScheduler": COMMON
    | SIGMAS
    | {"interpolation_type": ("linear", ("linear",)), "timestep_type": ("discrete", ("discrete",))},
    "EulerAncestralDiscreteScheduler": COMMON | {"prediction_type": ("epsilon", ("epsilon", "v_prediction"))},
    "HeunDiscreteScheduler": COMMON
    | UNCHANGED
    | {
        "beta_start": (0.00085, ANY),
        "beta_end": (0.012, ANY),
        "rescale_betas_zero_snr": (False, (False,)),
        "use_karras_sigmas": (False, (False, True)),
        "clip_sample": (False, (True, False)),
        "clip_sample_range": (1.0, (1.0,)),
    },
    "DPMSolverMultistepScheduler": COMMON
    | MULTISTEP
    | {
        "algorithm_type": ("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++")),
        "solver_type": ("midpoint", ("midpoint", "logrho", "bh1", "bh2")),  # the library takes all four as midpoint
        "euler_at_final": (False, (False,)),
        "use_lu_lambdas": (False, (False,)),
        "lambda_min_clipped": (-float("inf"), (-float("inf"),)),
        "variance_type": (None, (None,)),
    },
    "UniPCMultistepScheduler": COMMON
    | MULTISTEP
    | {
        "solver_type": ("bh2", ("bh2", "midpoint", "heun", "logrho")),  # likewise bh2
        "predict_x0": (True, (True,)),
        "disable_corrector": ([], ([],)),
        "solver_p": (None, (None,)),
    },
}
STEPS = Family(whole=True, spare=False, levels=False, end=("set_alpha_to_one", False))
KARRAS = Family(whole=False, spare=False, levels=True, end=("final_sigmas_type", "sigma_min"))
LAMBDA = Family(whole=True, spare=True, levels=True, end=("final_sigmas_type", "sigma_min"))
# (class, algorithm_type where there is a choice) → family and sampler
SOLVERS = {
    ("DDIMScheduler", None): (STEPS, samplers.ddim),
    ("DDPMScheduler", None): (STEPS, samplers.ddpm),
    ("PNDMScheduler", None): (STEPS, samplers.ddim),
    ("EulerDiscreteScheduler", None): (KARRAS, samplers.euler),
    ("EulerAncestralDiscreteScheduler", None): (KARRAS, samplers.euler_ancestral),
    ("HeunDiscreteScheduler", None): (KARRAS, samplers.heun),
    ("DPMSolverMultistepScheduler", "dpmsolver++"): (LAMBDA, samplers.dpmpp_2m),
    ("DPMSolverMultistepScheduler", "sde-dpmsolver++"): (LAMBDA, samplers.dpmpp_2m_sde),
    ("UniPCMultistepScheduler", None): (LAMBDA, samplers.unipc),
}


def leaping_ddim(
    denoise: Callable,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " n"],
    process: Table,
    randn_like: Callable,
    *,
    eta: float = 0.0,
) -> Iterator[State]:
    """DDIM as the library walks it where the spacing is not leading: by N // n entries, whatever is visited next.

    20 steps with linspace go from entry 999 to 949, and on from 946 as if they had come there. Raises `InputError`
    (MD-INTEROP-305) for a grid whose steps are not equal: a leap would miss its next time by far.
    """
    steps = times[:-1].diff().abs()
    if len(steps) and steps.max() - steps.min() > 2.5 / process.n:  # whole entries differ by rounding
        raise InputError(
            "MD-INTEROP-305",
            "This folder's DDIM goes down in equal steps, and the chosen grid does not. Choose another sampler with "
            "that grid, such as sampler=ddim or dpmpp_2m, or leave the grid as the folder has it.",
        )
    leap = process.n // (len(times) - 1) / process.n
    for t in times[:-1]:
        s = t - leap
        reached = s if s > process.t_min / 2 else times[-1]  # a leap beyond entry 0 ends the walk
        state, after = samplers.ddim(denoise, x, torch.stack([t, reached]), process, randn_like, eta=eta)
        yield state
        x = after.xt
    yield State(times[-1], x, x, state.eps_hat)


def load_scheduler(folder: str | Path) -> Scheduler:
    """Reads a folder's scheduler_config.json; a warning says where minidiff walks another way than the library.

    Raises `InputError` if the file cannot be read (MD-INTEROP-301), for a class of schedulers that minidiff does not
    have (-302), and for settings that it cannot take up, all of them at once (-303).
    """
    file = Path(folder) / FILE
    said = _read(file)
    name = str(said.get("_class_name"))
    if name not in SETTINGS:
        raise InputError(
            "MD-INTEROP-302",
            f"{file} names the scheduler {name}, which minidiff does not have. It knows {', '.join(SETTINGS)}. Put one "
            "of these into _class_name: a scheduler is no part of the trained weights, and the same noise schedule "
            "(beta_…, prediction_type) works with each of them.",
        )
    settings = SETTINGS[name]
    config = {key: said.get(key, default) for key, (default, _) in settings.items()}
    _check(file, name, config)
    if name == "PNDMScheduler":
        warnings.warn(
            f"{file} names PNDM, which minidiff does not have: it samples with ddim, along the same noise schedule and "
            "timesteps. Pictures differ slightly; more steps, or sampler=dpmpp_2m, make up for it.",
            stacklevel=2,
        )
    if name == "DDIMScheduler" and config["clip_sample"]:
        warnings.warn(
            f"{file} asks for clip_sample: minidiff recomputes eps_hat from the clipped x0_hat, which the library's "
            "DDIM does only with use_clipped_model_output=True.",
            stacklevel=2,
        )
    return _scheduler(name, config)


def save_scheduler(scheduler: Scheduler, folder: str | Path) -> None:
    """Writes scheduler_config.json so that the library walks the same states; raises as `describe` does."""
    text = json.dumps(describe(scheduler), indent=2) + "\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / FILE).write_text(text, encoding="utf-8")


def describe(scheduler: Scheduler) -> dict:
    """Returns the configuration with which a class of the library walks the same states.

    Raises `InputError` (MD-INTEROP-304) if none of its classes does.
    """
    solver, grid = _plain(scheduler.sampler), _plain(scheduler.grid)
    table = scheduler.process
    for (name, algorithm), (family, sampler) in SOLVERS.items():
        if (
            sampler is not (samplers.ddim if solver[0] is leaping_ddim else solver[0])
            or name == "PNDMScheduler"
            or not isinstance(table, Table)
        ):
            continue
        config = {key: default for key, (default, _) in SETTINGS[name].items()}
        given = not isinstance(table.betas, str)
        changes = {
            "num_train_timesteps": table.n,
            "beta_start": table.beta_start,
            "beta_end": table.beta_end,
            "beta_schedule": "linear" if given else table.betas,
            "trained_betas": list(table.betas) if given else None,
            "rescale_betas_zero_snr": table.zero_terminal_snr,
            "prediction_type": next((key for key, o in OBJECTIVES.items() if o == scheduler.objective), None),
            "timestep_spacing": next((key for key, f in SPACINGS.items() if f is grid[0]), "linspace"),
            "steps_offset": grid[1].get("offset", 0),
            "use_karras_sigmas": grid[0] is karras,
            "clip_sample": scheduler.clip,
            "algorithm_type": algorithm,
        } | ({family.end[0]: family.end[1]} if grid[1].get("end") == 0 else {})
        config |= {key: value for key, value in changes.items() if key in config}
        # Whatever the class cannot express has been lost by now, and shows in what would be read back.
        if _problems(name, config) == [] and same(_scheduler(name, config), scheduler):
            return {"_class_name": name} | config
    raise InputError(
        "MD-INTEROP-304",
        f"No scheduler of the ecosystem samples as {solver[0].__name__} with {grid[0].__name__} from {table} and the "
        f"objective {type(scheduler.objective).__name__} do. It needs a Table, one of eps, v and x0, and the grid that "
        "goes with the sampler; `load_scheduler` shows such combinations.",
    )


def _scheduler(name: str, config: Mapping) -> Scheduler:
    family, sampler = SOLVERS[name, config.get("algorithm_type")]
    zero, karras_sigmas = config["rescale_betas_zero_snr"], config.get("use_karras_sigmas", False)
    spacing = config["timestep_spacing"]
    if name == "DDIMScheduler" and spacing != "leading":
        sampler = leaping_ddim
    process = Table(
        betas=config["trained_betas"] or config["beta_schedule"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        n=config["num_train_timesteps"],
        zero_terminal_snr=zero,
        floor=2**-24 if zero and family.levels else 0.0,
        log_linear=karras_sigmas,
        whole_tau=karras_sigmas and family.spare,
        unit_start=family is not KARRAS or spacing == "leading",
    )
    end = 0 if config.get(family.end[0]) == family.end[1] else -1
    options = {
        "leading": {"offset": config["steps_offset"], "spare": family.spare, "end": end},
        "linspace": {"whole": family.whole, "spare": family.spare, "end": end},
        "trailing": {"end": end},
    }
    grid = karras if karras_sigmas else partial(SPACINGS[spacing], **options[spacing])
    return Scheduler(process, OBJECTIVES[config["prediction_type"]], sampler, grid, config.get("clip_sample", False))


def _read(file: Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "MD-INTEROP-301",
            f"{file} cannot be read ({error}). A folder of the ecosystem describes its scheduler there; name the "
            "folder that holds this file, usually `scheduler` beside `unet`.",
        ) from error
    if not isinstance(config, dict):
        raise InputError("MD-INTEROP-301", f"{file} holds no JSON object, so it describes no scheduler.")
    return config


def _check(file: Path, name: str, config: Mapping) -> None:
    if problems := _problems(name, config):
        raise InputError(
            "MD-INTEROP-303",
            f"{file} asks its {name} for what minidiff does not do: {'; '.join(problems)}. Change these settings, or "
            "name another scheduler there: none of them is part of the trained weights except the noise schedule "
            "(beta_…, rescale_betas_zero_snr) and prediction_type.",
        )


def _problems(name: str, config: Mapping) -> list[str]:
    """Returns every setting that minidiff cannot take up, with those that it can."""
    problems = [
        f"{key}={config[key]!r} (it takes {' or '.join(map(repr, values))})"
        for key, (_, values) in SETTINGS[name].items()
        if values is not ANY and config[key] not in values
    ]
    if config.get("use_karras_sigmas"):
        spare = name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
        needs = {"rescale_betas_zero_snr": False, "final_sigmas_type": "zero"}  # Karras' grid goes from sigma to 0
        needs |= {} if spare else {"timestep_spacing": "linspace"}
        for key, value in needs.items():
            if config.get(key, value) != value:
                problems.append(f"use_karras_sigmas with {key}={config[key]!r} (it takes {value!r})")
        if config["beta_schedule"] == "squaredcos_cap_v2" and config["trained_betas"] is None:
            problems.append("use_karras_sigmas with beta_schedule='squaredcos_cap_v2', whose sigma ends at 20000")
    return problems


def _plain(f: Callable) -> tuple[Callable, dict]:
    """Returns a function without `partial`, and all its options, given or not."""
    bound = f.keywords if isinstance(f, partial) else {}
    f = f.func if isinstance(f, partial) else f
    defaults = {k: p.default for k, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
    return f, defaults | bound


def same(one: Scheduler, other: Scheduler) -> bool:
    """Returns whether both are the same functions with the same options, given or not."""
    return [_plain(x) if callable(x) else x for x in one] == [_plain(x) if callable(x) else x for x in other]

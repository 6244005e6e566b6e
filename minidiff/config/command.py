"""The command line → plain values, by Hydra. Nothing that is not ours is built or resolved on the way."""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from minidiff.errors import InputError, MinidiffError, did_you_mean
from minidiff.redact import redact, redact_values

CONF = Path(__file__).resolve().parents[2] / "conf"  # of a checkout
# free text on the command line
TEXTS = ("prompt", "negative", "out", "run", "prompts", "name", "resume", "init", "data.path", "lora", "image", "mask")
TEXTS += ("space.vae", "text.folder", "cache")
FLAGS = ("--help", "-h", "--multirun", "-m", "--cfg", "-c", "--info", "-i", "--resolve", "--package", "-p")


def compose(config_name: str, overrides: Sequence[str], conf: Path = CONF) -> dict:
    """Returns conf/`config_name`.yaml with overrides as the command line writes them, as plain values.

    For notebooks and tests; the scripts use `entry`. Raises InputError (MD-CONF-006) for what Hydra refuses.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        cfg = _composed(config_name, overrides, conf)
        own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        _require_data(OmegaConf.to_container(own, resolve=False))
        _require_plain_hydra(cfg.hydra)
        return OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise InputError("MD-CONF-006", _reword(error, conf, config_name)) from error


def _composed(config_name: str, overrides: Sequence[str], conf: Path) -> "omegaconf.DictConfig":  # noqa: F821
    import hydra

    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        return hydra.compose(config_name, _quoted(overrides), return_hydra_config=True)


def _require_data(node: object, key: str = "") -> None:
    """Refuses what would read the environment or run a function while values are resolved: ${oc.env:…} and the like."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            _require_data(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for i, child in enumerate(node):
            _require_data(child, f"{key}[{i}]")
    elif isinstance(node, str) and re.search(r"\$\{\s*[\w.]+\s*:", node):
        raise InputError(
            "MD-CONF-007",
            f"{key}={node} would call a resolver, which can read secrets from the environment or run code. minidiff's "
            "configurations may refer only to each other, as in ${image_size}. Write the value itself.",
        )


def _require_plain_hydra(hydra_node: object) -> None:
    """Refuses a configuration that has Hydra itself build something: callbacks, launchers, sweepers."""
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(hydra_node, resolve=False)
    targets = [str((node.get(part) or {}).get("_target_", "")) for part in ("launcher", "sweeper")]
    if node.get("callbacks") or any(x and not x.startswith("hydra._internal.") for x in targets):
        raise InputError(
            "MD-CONF-007",
            "The configuration sets hydra.callbacks, hydra.launcher or hydra.sweeper, through which it could run any "
            "code. Remove that from the file (a file in conf/experiment that is not yours?).",
        )


def entry(config_name: str) -> Callable:
    """Makes `main(values: dict)` the entry point of a script: composes conf/`config_name`.yaml with the command line.

    A failure that a user can act on is one paragraph and an exit code; `debug=true` shows the traceback instead.
    """

    def decorate(main: Callable[[dict], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            conf = Path(inspect.getfile(main)).resolve().parent / "conf"
            try:
                for values in _jobs(config_name, conf):  # outside of Hydra, which would print its remarks on our errors
                    main(values)
            except MinidiffError as error:
                if any(re.fullmatch(r"\+*debug=true", x, re.IGNORECASE) for x in sys.argv):
                    raise
                print(redact(str(error)), file=sys.stderr)
                sys.exit(error.exit_code)
            except KeyboardInterrupt:
                print("stopped by Ctrl-C; checkpoints that were there are as they were", file=sys.stderr)
                sys.exit(130)

        return run

    return decorate


def _jobs(config_name: str, conf: Path) -> list[dict]:
    """Returns the configurations that the command line asks for: one, or several with --multirun."""
    flags = [x for x in sys.argv[1:] if x.startswith("-")]
    overrides = [x for x in sys.argv[1:] if not x.startswith("-")]
    if not flags:
        return [compose(config_name, overrides, conf)]
    if strange := [x for x in flags if x not in FLAGS]:
        raise InputError(
            "MD-CONF-009", f"{strange[0]} is not offered; the flags are {', '.join(FLAGS)}. Options are KEY=VALUE."
        )
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    single = [x for x in overrides if "=" in x and "," not in x]  # no values of flags, no lists for --multirun
    if not {"--help", "-h"} & {*flags}:
        compose(config_name, single, conf)  # to check it before Hydra itself acts on it
    sys.argv[1:] = _quoted(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach us, who word them
    jobs: list[dict] = []

    @hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)
    def composed(cfg: object) -> None:
        _require_data(OmegaConf.to_container(cfg, resolve=False))
        jobs.append(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))

    try:
        composed()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError("MD-CONF-006", _reword(error, conf, config_name)) from error
    return jobs


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
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(redact_values(values))), encoding="utf-8")


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
        known: dict[str, list[str]] = {}  # key -> the choices of its group that list it
        for file in sorted(conf.rglob("*.yaml")):
            whole = file.parent in (conf, conf / "experiment")
            for leaf in _leaves(OmegaConf.to_container(OmegaConf.load(file), resolve=False)):
                choices = known.setdefault(leaf if whole else f"{file.parent.name}.{leaf}", [])
                choices += [] if whole else [file.stem]
        groups = {p.name for p in conf.iterdir() if p.is_dir()}
        if key in known:
            where = f"an option of {key.split('.')[0]}={' | '.join(known[key])}" if known[key] else "one of experiments"
            return (
                f"'{key}' is {where}, and not listed by the choice made here. If that takes it all the same, add it by "
                f"+{key}=…"
            )
        return (
            f"Unknown key '{key}'.{did_you_mean(key, sorted(known.keys() | groups))} "
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

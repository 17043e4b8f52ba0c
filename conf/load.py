"""From overrides to a TrainConfig: Hydra composes the YAML, pydantic decodes it, every refusal names its remedy."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from shardwright.conf.errors import ConfigError
from shardwright.conf.plugins import import_plugins
from shardwright.conf.schema import MODEL_CONFIGS, ModelConfig, TrainConfig

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)

_ADAPTER = TypeAdapter(TrainConfig)
_RULES = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list such as [a,b]",
    "dataclass_type": "must be a group of settings",
}


def load_config(overrides: Sequence[str] = ()) -> TrainConfig:
    """Compose `conf/train.yaml` with Hydra overrides and decode it.

    Args:
        overrides: as on the command line, for example `["model=llama_tiny", "train.num_steps=20"]`.

    Raises:
        ConfigError: an unknown key or option, a wrong type, or settings that contradict each other.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("shardwright.conf", version_base="1.3"):
            return decode(compose("train", overrides=list(overrides)))
    except COMPOSITION_ERRORS as error:
        raise explain(error) from None


def decode(tree: DictConfig) -> TrainConfig:
    """Resolve a composed tree and turn it into a TrainConfig.

    Raises:
        ConfigError: see `load_config`.
    """
    try:
        raw = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error) from None
    return from_dict(typing.cast(dict[str, Any], raw))


def from_dict(raw: dict[str, Any]) -> TrainConfig:
    """Import the plugins and decode plain containers, such as the `config` that a checkpoint holds.

    Raises:
        ConfigError: see `load_config`.
    """
    plugins = raw.get("plugins")
    if isinstance(plugins, list):  # anything else is refused below
        import_plugins(map(str, plugins))
    try:
        return _ADAPTER.validate_json(json.dumps(raw))  # strict JSON takes objects and lists, strict Python does not
    except ValidationError as error:
        raise ConfigError("\n".join(_describe_all(error.errors(include_url=False), raw))) from None


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the plain containers that `from_dict` takes back."""
    return _ADAPTER.dump_python(config, mode="json")


def explain(error: Exception) -> ConfigError:
    """Turn an error of Hydra or OmegaConf into value, rule and remedy."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        composed = getattr(error.__cause__, "parent_node", None)  # knows keys of families not imported
        return ConfigError(_unknown_key(match[1], present=list(composed or ())))
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{error.full_key} is not set; it has no default; add {error.full_key}=VALUE")
    if match := re.search(r"Could not find '([^']+)/([^']+)'", text):
        options = [line.strip() for line in text.split("Available options in", 1)[-1].splitlines()[1:] if line.strip()]
        options = options[: next((i for i, o in enumerate(options) if o.endswith(":")), len(options))]
        return ConfigError(f"{match[1]}={match[2]}: there is no such option; use one of {', '.join(options)}")
    reason = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return ConfigError(f"the command line or a YAML file does not compose: {reason}; --help lists what is accepted")


def _unknown_key(path: str, present: Sequence[str] = ()) -> str:
    """Say that a path is no setting; `present` are the keys beside it, if it is known which these are."""
    *parents, key = path.split(".")
    known, parent = _fields_under(parents), ".".join(parents)
    if key in known:
        return f"{path} has no meaning here; it belongs to another choice of {parent}; choose that one or drop {path}"
    known = sorted(present) or known
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"did you mean {'.'.join([*parents, close[0]])}?" if close else f"known here: {', '.join(known) or 'none'}"
    return f"{path} is not a setting; only known keys are accepted; {remedy}"


def _fields_under(path: list[str]) -> list[str]:
    """List the keys that some variant of the schema accepts below a dotted path."""
    nodes: list[Any] = [TrainConfig]
    for part in path:
        nodes = [field for node in nodes for field in _variants(typing.get_type_hints(node).get(part))]
    return sorted({field.name for node in nodes for field in dataclasses.fields(node)})


def _variants(annotation: Any) -> list[Any]:
    """Return the dataclasses in an annotation: itself, the members of a union, or the registered model configs."""
    if annotation is ModelConfig:
        return list(MODEL_CONFIGS.values())
    if dataclasses.is_dataclass(annotation):
        return [annotation]
    return [variant for member in typing.get_args(annotation) for variant in _variants(member)]


def _describe_all(problems: Sequence[Any], raw: dict[str, Any]) -> list[str]:
    """Say each problem once; the members of a union that refuse one value make one line."""
    lines, rules = [], {}
    for problem in problems:
        path = _locate(problem["loc"], raw)
        if problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        elif problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(_unknown_key(path))
        elif problem["type"] in ("missing", "missing_argument"):
            lines.append(f"{path} is not set; it is required; add {path}=VALUE")
        elif problem["type"] == "union_tag_invalid":
            context = problem["ctx"]
            path = f"{path}.{context['discriminator'].strip(chr(39))}"
            rules.setdefault((path, context["tag"]), []).append(f"must be one of {context['expected_tags']}")
        else:
            value = problem["input"]
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            rules.setdefault((path, shown), []).append(_rule(problem))
    for (path, shown), several in rules.items():
        rule = " or ".join([several[0], *(other.removeprefix("must be ") for other in several[1:])])
        lines.append(f"{path}={shown} {rule}; change {path} on the command line or in its YAML (--help lists all)")
    return lines


def _rule(problem: Any) -> str:
    text = problem["msg"][0].lower() + problem["msg"][1:]
    return _RULES.get(problem["type"]) or text.replace("input should", "must").replace("string should", "must")


def _locate(loc: tuple[Any, ...], raw: Any) -> str:
    """Drop from a pydantic location what is no key: the tags of unions."""
    parts = []
    for part in loc:
        if isinstance(raw, dict) and part in raw:
            raw = raw[part]
        elif part != loc[-1] or not isinstance(raw, dict):
            continue
        parts.append(str(part))
    return ".".join(parts)

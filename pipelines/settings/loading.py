"""Settings from YAML files and `section.key=value` overrides, and one sentence for whatever is wrong with them.

A sentence shows no secret: of --set it quotes what stands before the `=`, of storage no value at all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipelines.errors import RequestError
from pipelines.settings.sections import Config
from pipelines.storage.secrets import hidden


def load_config(
    files: Iterable[str | Path] = (), overrides: Iterable[str] = (), arguments: Mapping[str, Any] | None = None
) -> Config:
    """The settings from YAML `files` (later ones win), `section.key=value` overrides (they win over files) and
    {section.key: value} of arguments that stand for settings (they win over both).

    Raises:
        RequestError: a file that cannot be read or parsed, an unknown key, a value that does not fit.
    """
    settings = load_settings(files, overrides)
    merge_settings(settings, nested(arguments or {}))
    return make_config(settings)


def load_settings(files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The same as nested plain data, only what was given. Raises RequestError for what cannot be read or parsed."""
    settings: dict[str, Any] = {}
    for file in files:
        merge_settings(settings, read_yaml(Path(file)))
    for override in overrides:
        merge_settings(settings, _parse_override(override))
    return settings


def make_config(settings: Mapping[str, Any]) -> Config:
    """The settings from nested plain data. Raises RequestError with one sentence for the first mistake found."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise RequestError(hidden(_sentence(error))) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises RequestError for one that cannot be read or parsed."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"The settings file {file} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"The settings file {file} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        # of a value, such as one that begins with ! or *, it quotes all
        problem = _QUOTED_NAME.sub("", getattr(error, "problem", None) or "it is not YAML")
        raise RequestError(f"The settings file {file} is not valid YAML{line}: {problem}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RequestError(
            f"The settings file {file} must hold sections such as `model:`, not a {type(content).__name__}."
        )
    # a section whose keys are all commented out is empty, not wrong
    return {section: {} if values is None else values for section, values in content.items()}


def _parse_override(override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    shown = f"{path}=..." if equals else path
    if not equals or len(keys) < 2 or not all(keys):
        known = [f"{section}.{key}" for section in Config.model_fields for key in _known_keys([section])]
        near = [name for name in known if name.rsplit(".", 1)[1] == path.strip()] or ["features.stride"]
        raise RequestError(f"--set {shown!r} is not of the form section.key=value, such as --set {near[0]}=...")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise RequestError(f"--set {shown!r}: the value is not valid YAML.") from None
    nested: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        nested = {key: nested}
    return nested


def merge_settings(into: dict[str, Any], new: Mapping[Any, Any]) -> None:
    """Put `new` on top of `into`, in place, section by section."""
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge_settings(into[key], value)
        else:
            into[str(key)] = dict(value) if isinstance(value, Mapping) else value


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted names as sections. Raises RequestError for names that are no text."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if not isinstance(name, str):
            raise RequestError(f"settings has the name {name!r}, but a name is text, such as features.stride.")
        *sections, key = name.split(".")
        one: dict[str, Any] = {key: value}
        for section in reversed(sections):
            one = {section: one}
        merge_settings(found, one)
    return found


def _sentence(error: ValidationError) -> str:
    # an unknown key also leaves the key that was meant missing, and is the better explanation
    first = next((one for one in error.errors() if one["type"] == "extra_forbidden"), error.errors()[0])
    keys = [str(part) for part in first["loc"]]
    name = ".".join(keys)
    if first["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        path = ".".join([*keys[:-1], *near]) if near else None
        if path is None and len(keys) > 1:
            # Where several sections have the key, the first one is meant.
            sections = [*Config.model_fields][::-1]
            elsewhere = {key: f"{section}.{key}" for section in sections for key in _known_keys([section])}
            path = next((elsewhere[key] for key in difflib.get_close_matches(keys[-1], elsewhere, n=1)), None)
        hint = f"did you mean {path}?" if path else f"known here: {', '.join(known)}."
        return f"Unknown setting {name}: {hint}"
    if first["type"] in ("model_type", "model_attributes_type"):
        found = "a value" if keys[0] == "storage" else f"the value {first['input']!r}"
        return f"Setting {name} is a section with keys ({', '.join(_known_keys(keys))}), not {found}."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and len(keys) < 2:
        return f"The settings do not fit together: {f'{name}: ' if keys else ''}{message}."
    if first["type"] == "missing" and isinstance(first["input"], Mapping):
        return f"Setting {name} is missing: give {', '.join(_known_keys(keys[:-1]))}."
    union = next((at for at, key in enumerate(keys) if key.startswith("literal[")), None)
    if union is not None:  # pydantic reports each reading of the value
        keys = keys[:union]
        same = [one for one in error.errors() if [str(part) for part in one["loc"][:union]] == keys]
        readings = [_READINGS.get(str(one["loc"][union]), one["msg"].partition(" should be ")[2]) for one in same]
        message = f"should be {' or '.join(dict.fromkeys(readings))}"
    elif first["type"] == "missing":  # too few values in a list
        keys = keys[:-1]
        same = [one for one in error.errors() if [str(part) for part in one["loc"][:-1]] == keys]
        message = f"should be a list of {int(same[-1]['loc'][-1]) + 1} values"
    elif first["type"] == "too_long":
        message = f"should be a list of {first['ctx']['max_length']} values"
    # a union's branch ends pydantic's path; it names no key of ours
    name = ".".join(keys).removesuffix(".int")
    message = message.removeprefix("Input ").partition(", unable")[0]
    message = message.replace("valid tuple", "list").replace("valid dictionary", "mapping")
    found = "" if keys[0] == "storage" else f" is {first['input']!r}, but it"  # storage options may be secrets
    return f"Setting {name}{found} {message}."


_QUOTED_NAME = re.compile(r"(?<=tag|ias|dle) '.*'$")
_READINGS = {"int": "a whole number", "tuple[int, ...]": "a list of whole numbers"}


def _known_keys(path: list[str]) -> list[str]:
    model: Any = Config
    for key in path:
        if key.isdigit():  # an entry of a list of sections has the keys of its kind
            continue
        field = model.model_fields.get(key) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = get_args(field.annotation)[0] if get_origin(field.annotation) is tuple else field.annotation
    return list(model.model_fields) if hasattr(model, "model_fields") else []

"""Typed configuration: pydantic models read from YAML, changed by ``--set key=value``.

A room defines its own models as subclasses of :class:`Config`; :func:`load_config` reads them. Every mistake is a
:class:`~ngd_fast.errors.UserError` that names the key, what came, and what was wanted.
"""

import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ngd_fast.errors import UserError


class Config(BaseModel):
    """Base of all configurations: no unknown keys, no silent conversions between kinds, not changed once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def load_config(model: type[C], path: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Build ``model`` from a YAML file (or its defaults) and ``key.sub=value`` overrides, whose values are YAML.

    Raises UserError for a missing or malformed file, an unknown key (naming the nearest known one) or a wrong value.
    """
    data: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such configuration file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise UserError(f"{path}: must hold keys and values, holds a {type(loaded).__name__}")
        data = loaded or {}
    for override in overrides:
        _apply_override(data, override)
    return build_config(model, data, source=str(path) if path is not None else "configuration")


def build_config(model: type[C], data: dict[str, Any], *, source: str) -> C:
    """Validate ``data`` against ``model``; ``source`` names it in errors."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_describe(model, e) for e in error.errors()[:3])) from None


def dump_config(config: Config) -> str:
    """The configuration as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override}: must be key=value, for example --set optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 as a string (it wants 1.0e-3); nobody who types a number means a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = key.strip().split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent} is a value, it has no keys of its own")
        node = child
    node[last] = value


def _describe(model: type[BaseModel], error: dict[str, Any]) -> str:
    location = [part for part in error["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join(str(part) for part in location) or "(top level)"
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
        hint = f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else "no keys are known there"
        return f"unknown key {key}; {hint}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{key}: {message[:1].lower() + message[1:]}{given}"


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            return []
        candidates = [field.annotation, *get_args(field.annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)

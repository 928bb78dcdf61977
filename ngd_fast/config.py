"""Typed configuration: pydantic models read from YAML, changed by ``--set key=value``.

A room defines its own models as subclasses of :class:`Config`; :func:`load_config` reads them. Every mistake is a
:class:`~ngd_fast.errors.UserError` that names the key, what came, and what was wanted.
"""

import contextlib
import difflib
import json
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ngd_fast.errors import UserError


class Config(BaseModel):
    """Base of all configurations: no unknown keys, not changed once built. Numbers may stand as text ("1e-3")."""

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
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{path}: no such configuration file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        loaded = parse_yaml(text, path)
        if loaded is not None and not isinstance(loaded, dict):
            raise UserError(f"{path}: must hold keys and values, holds a {type(loaded).__name__}")
        data = loaded or {}
    overridden = [_apply_override(data, override) for override in overrides]
    return build_config(model, data, source=str(path) if path is not None else "configuration", overridden=overridden)


def parse_yaml(text: str, source: object) -> Any:
    """The value of a YAML document of plain types. Raises UserError naming ``source``, also for a key that stands twice
    and for what is larger than any configuration, as written or by its aliases."""
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"{source}: {len(text):,} characters, more than any configuration has ({_MAX_CHARACTERS:,})")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if not _size(root, {}) <= _MAX_CHARACTERS:
            raise UserError(f"{source}: its aliases (*name) stand for more values than any configuration has")
        return loader.construct_document(root)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # ValueError: a date that is none
        raise UserError(f"{source}: not valid YAML ({' '.join(str(error).split())[:300]})") from None


_MAX_CHARACTERS = 100_000


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys and says nothing."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes there are with every alias written out; infinite where one holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = () if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def build_config(model: type[C], data: dict[str, Any], *, source: str, overridden: Sequence[str] = ()) -> C:
    """Validate ``data`` against ``model``; errors name ``source``, but for keys that were ``overridden``."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = _faults_by_key(data, error)
        text = "; ".join(_describe(model, key, alike) for key, alike in faults)
        if not all(f"{key}.".startswith(tuple(f"{name}." for name in overridden)) for key, _ in faults):
            text = f"{source}: {text}"
        raise UserError(text) from None


def as_override(key: str, value: Any) -> str:
    """``key=value`` that :func:`load_config` reads back to just this value, such as a path with a colon or a hash."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"  # JSON is YAML, but for escapes beyond 16 bits


def dump_config(config: Config) -> str:
    """The configuration as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(data: dict[str, Any], override: str) -> str:
    """Set the key that ``override`` names; returns it, or the section around it that nothing else had set yet."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override[:200]}: must be key=value, for example --set optimizer.lr=1e-3")
    try:
        value = parse_yaml(text, "")
    except UserError:
        raise UserError(f"--set {override[:200]}: the value is not valid YAML") from None
    if value == text.strip():
        # YAML 1.1 reads 1e-3 as a string (it wants 1.0e-3); nobody who types a number without quotes means a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = names = key.strip().split(".")
    node, own = data, len(names)
    for depth, parent in enumerate(parents, start=1):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
            own = min(own, depth)
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent} is a value, it has no keys of its own")
        node = child
    node[last] = value
    return ".".join(names[:own])


def _faults_by_key(data: dict[str, Any], error: ValidationError) -> list[tuple[str, list[dict[str, Any]]]]:
    """The first three keys that are at fault, each with its faults: several where it may be of several types."""
    faults: dict[str, list[dict[str, Any]]] = {}
    for fault in error.errors():
        faults.setdefault(_key(data, fault), []).append(fault)
    # [1, 2] for "a number or three": that the third is missing says more than that a list is no number
    return [(key, alike) for key, alike in faults.items() if not any(k.startswith(f"{key}.") for k in faults)][:3]


def _key(data: dict[str, Any], fault: dict[str, Any]) -> str:
    """The key as a user types it: without pydantic's names of types and of validating functions."""
    parts, node = [], data
    for part in fault["loc"]:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif not isinstance(part, int):
            continue  # no key of what was given, so a name that pydantic put in
        elif isinstance(node, (list, tuple)) and part < len(node):
            node = node[part]
        parts.append(part)
    if fault["type"] == "missing" and isinstance(fault["loc"][-1], str):
        parts.append(fault["loc"][-1])
    return ".".join(map(str, parts)) or "(top level)"


def _describe(model: type[BaseModel], key: str, faults: Sequence[dict[str, Any]]) -> str:
    first, given = faults[0], faults[0]["input"]
    if first["type"] == "extra_forbidden":
        return f"unknown key {key[:200]}; did you mean {_nearest(key[:200], _keys(model))}?"
    if first["type"] == "missing":
        return f"{key} is missing"
    messages = [fault["msg"].removeprefix("Value error, ") for fault in faults]
    message = messages[0][:1].lower() + messages[0][1:]
    if len(messages) > 1:
        wanted = [text.removeprefix("Input should be ").partition(", unable")[0] for text in messages]
        message = f"input should be {' or '.join(wanted)}"
    return f"{key[:200]}: {message[:500]}" + ("" if isinstance(given, dict) else f" (got {_short.repr(given)})")


_short = reprlib.Repr()
"""Values may be long, and those that aliases make endless."""
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 200, 200, 200


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of ``model``."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        for nested in _models(field.annotation):
            keys += _keys(nested, f"{prefix}{name}.")
    return keys


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation names, such as Stage in tuple[Stage, ...] | None."""
    # Python 3.10 also calls tuple[int, ...] a type.
    if get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _nearest(key: str, known: Sequence[str]) -> str:
    """The known key most like ``key``; the last part counts most, so that lr finds optimizer.lr."""

    def likeness(candidate: str) -> float:
        leaf = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return 2 * leaf + difflib.SequenceMatcher(None, key, candidate).ratio()

    return max(known, key=likeness)

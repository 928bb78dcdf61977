"""What this package uses of pydantic, without the checks: defaults, nested models, dumps.

A machine with a GPU and no network often lacks pydantic. :mod:`gpu_check` then puts this folder on the path of its
tests and benches, and says so: their configurations are right or wrong wherever pydantic is.
"""

import copy
import typing

_UNSET = object()


class ValidationError(ValueError):
    """Never raised."""


class AfterValidator:
    def __init__(self, function):
        pass


def ConfigDict(**options):
    return options


def Field(default=_UNSET, **constraints):
    return default


def field_validator(*names):
    return lambda function: function


def model_validator(*, mode):
    return lambda function: function


class BaseModel:
    def __init__(self, **values):
        for name, kind in typing.get_type_hints(type(self)).items():
            value = values.pop(name, _UNSET)
            value = copy.deepcopy(getattr(type(self), name)) if value is _UNSET else value
            self.__dict__[name] = _build(kind, value)
        if values:
            raise ValueError(f"{type(self).__name__} has no {', '.join(values)}")

    def __eq__(self, other):
        return type(self) is type(other) and vars(self) == vars(other)

    @classmethod
    def model_validate(cls, values):
        return values if isinstance(values, cls) else cls(**values)

    def model_dump(self, *, mode="python", exclude=()):
        return {name: _dump(value, mode) for name, value in vars(self).items() if name not in exclude}

    def model_copy(self, *, update):
        return type(self)(**{**vars(self), **update})


def _build(kind, value):
    """``value`` with each mapping turned into the model that ``kind`` has in its place, lists into its tuples."""
    if isinstance(value, dict):
        model = _model_in(kind)
        return value if model is None else model(**value)
    if isinstance(value, list | tuple):
        values = [_build(kind, item) for item in value]
        return tuple(values) if "tuple" in str(kind) else values
    return value


def _model_in(kind):
    if typing.get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next(filter(None, map(_model_in, typing.get_args(kind))), None)


def _dump(value, mode):
    if isinstance(value, BaseModel):
        return value.model_dump(mode=mode)
    if isinstance(value, dict):
        return {key: _dump(item, mode) for key, item in value.items()}
    if isinstance(value, list | tuple):
        values = [_dump(item, mode) for item in value]
        return tuple(values) if isinstance(value, tuple) and mode == "python" else values
    return value

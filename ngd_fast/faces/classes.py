"""The one taxonomy of eight expressions, and how each dataset's labels map into it."""

from collections.abc import Mapping
from pathlib import Path

from ngd_fast.errors import UserError

CLASS_NAMES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
"""FER+'s order; the index of a name is its label everywhere in this package."""

CLASS_MAP = {name: index for index, name in enumerate(CLASS_NAMES)}

AFFECTNET_IDS = {0: "neutral", 1: "happiness", 2: "sadness", 3: "surprise", 4: "fear", 5: "disgust", 6: "anger"} | {
    7: "contempt"
}
"""AffectNet's expression codes; 8 (none), 9 (uncertain) and 10 (no face) carry no expression."""

AFFECTNET_UNUSED_IDS = {8: "none", 9: "uncertain", 10: "no face"}

CKPLUS_IDS = {0: "neutral", 1: "anger", 2: "contempt", 3: "disgust", 4: "fear", 5: "happiness", 6: "sadness"} | {
    7: "surprise"
}
"""The codes in CK+'s ``*_emotion.txt``."""

_ALIASES = {
    "happy": "happiness",
    "joy": "happiness",
    "surprised": "surprise",
    "sad": "sadness",
    "angry": "anger",
    "disgusted": "disgust",
    "fearful": "fear",
    "afraid": "fear",
    "contemptuous": "contempt",
}


def class_index(name: str) -> int | None:
    """Index of a class in CLASS_NAMES, by its name or a usual synonym ("happy"), ignoring case; None if unknown."""
    key = str(name).strip().lower()
    return CLASS_MAP.get(_ALIASES.get(key, key))


class LabelMap:
    """A dataset's own labels -> indices of CLASS_NAMES.

    Built from {"happy": 1, ...} or {"1": "happy", ...}: names are looked up in the taxonomy, ids are the dataset's own.
    Raises UserError for an empty map, a name that is no class of the taxonomy, or an id that stands twice.
    """

    def __init__(self, mapping: Mapping, source: str = "class map"):
        if not isinstance(mapping, Mapping) or not mapping:
            raise UserError(
                f'{source}: the class map is empty; it must look like {{"neutral": 0, "happiness": 1, ...}}'
            )
        self.source = source
        self.by_id: dict[int, int] = {}
        self.by_name: dict[str, int] = {}
        for key, value in mapping.items():
            name, number = (value, key) if isinstance(value, str) and _is_integer(key) else (key, value)
            if not _is_integer(number):
                raise UserError(f"{source}: {key!r}: {value!r} does not pair a class name with an integer id")
            index = class_index(name)
            if index is None:
                raise UserError(f"{source}: {name!r} is none of the classes {', '.join(CLASS_NAMES)}")
            number = int(float(number))
            if number in self.by_id:
                both = f"{CLASS_NAMES[self.by_id[number]]} and {name}"
                raise UserError(f"{source}: id {number} stands for two classes, {both}")
            self.by_id[number] = index
            self.by_name[str(name).strip().lower()] = index

    @classmethod
    def load(cls, source: "str | Path | Mapping | LabelMap") -> "LabelMap":
        """From a JSON file, a mapping, or a LabelMap (returned as it is)."""
        from ngd_fast.artifacts.files import read_json

        if isinstance(source, LabelMap):
            return source
        if isinstance(source, Mapping):
            return cls(source)
        return cls(read_json(source), str(source))

    def require_distinct(self) -> None:
        """Raise UserError where two ids stand for one class, as they may for labels but not for columns."""
        for number, index in self.by_id.items():
            first = next(n for n, i in self.by_id.items() if i == index)
            if first != number:
                raise UserError(f"{self.source}: columns {first} and {number} are both {CLASS_NAMES[index]}")

    def __str__(self) -> str:
        pairs = ", ".join(f"{number} {CLASS_NAMES[index]}" for number, index in sorted(self.by_id.items()))
        return f"{pairs} ({self.source})"

    @property
    def names(self) -> list[str]:
        """Classes of the taxonomy in the order of the dataset's ids."""
        return [CLASS_NAMES[index] for _, index in sorted(self.by_id.items())]

    def index_of_id(self, number: str | int) -> int | None:
        """Index in the taxonomy for an id as written in a table ("3", "3.0"); None if the map lacks it."""
        try:
            value = float(number)
        except ValueError:
            return None
        return self.by_id.get(int(value)) if value.is_integer() else None

    def index_of_name(self, name: str) -> int | None:
        """Index in the taxonomy for a class name or its synonym, if the map has that class; else None."""
        index = class_index(name)
        return index if index in self.by_name.values() else None


def _is_integer(value) -> bool:
    try:
        return not isinstance(value, bool) and float(value) == int(float(value))
    except (TypeError, ValueError, OverflowError):
        return False

"""NeuroGaze-Distill (arXiv 2509.11916) at the hardware's speed.

``from ngd_fast import functional, NGDObjective, PrototypeBank`` is all that a trainer of one's own needs. The names are
looked up on first use: ``import ngd_fast`` needs nothing but torch and numpy, and builds nothing.
"""

import importlib

from ngd_fast._version import __version__

_EXPORTS = {
    "functional": ("ngd_fast.objective.functional", None),
    "NGDObjective": ("ngd_fast.objective.modules", "NGDObjective"),
    "PrototypeBank": ("ngd_fast.prototypes.bank", "PrototypeBank"),
}

__all__ = ["NGDObjective", "PrototypeBank", "__version__", "functional"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ngd_fast' has no attribute {name!r}")
    module_name, attribute = _EXPORTS[name]
    module = importlib.import_module(module_name)
    return module if attribute is None else getattr(module, attribute)


def __dir__():
    return sorted([*globals(), *_EXPORTS])

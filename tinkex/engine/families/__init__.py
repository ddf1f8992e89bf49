"""Model families of the fast path: packed sequences, hand-written backward passes.

To add a family, add a module with its differences from Llama, as `FAMILY`, and a row to
tests/engine/test_families.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from tinkex.engine.families.family import Family

#: Modules of this folder that are not families.
_OTHERS = ("build", "family")


def _families() -> Iterator[Family]:
    for found in pkgutil.iter_modules(__path__):
        if found.name not in _OTHERS:
            yield importlib.import_module(f"{__name__}.{found.name}").FAMILY


#: Families of the fast path by model_type in config.json.
FAMILIES: dict[str, Family] = {family.model_type: family for family in _families()}

"""An operator's own functions, by their dotted names."""

import importlib
from collections.abc import Callable
from typing import Any


def load_hook(kind: str, name: str) -> Callable[[Any], Any] | None:
    """The function of a dotted name, None for an empty one."""
    if not name:
        return None
    module, colon, attribute = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the {kind} policy must be package.module:function, got {name!r}: {error}"
        ) from error
    if not callable(hook):
        raise ValueError(f"the {kind} policy must be package.module:function, got {name!r}")
    return hook

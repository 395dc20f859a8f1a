"""Large imports without Python's search for rubbish, which finds none in them and takes a fifth of their time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Nothing is searched while this is open, and what was imported is passed over by all later searches."""
    known, searching = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if searching:
            gc.enable()


def call(function: str, *given: Any) -> Any:
    """Imports `module:function` and calls it: for a new process, which else imports what its arguments come from."""
    module, _, name = function.partition(":")
    with importing():
        found = getattr(import_module(module), name)
    return found(*given)

"""Makes `import monai` load no more of MONAI than is used.

MONAI's packages import all their modules when the first of them is asked for, and some of these import further
libraries: three seconds and 150 MB in each process, to build one network. Their `__init__.py` files hold nothing but
lists of what comes from which module, so that is read here, and a module is imported when something of it is used.
What MONAI would download weights with it takes where it is installed; here it is told that it is not (10 MB a process).
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

_TOP = "monai"
_DOWNLOADS = ("gdown", "huggingface_hub", "requests")


def ensure_light_monai() -> None:
    """Has MONAI load piece by piece from now on. Call it before the first import; where MONAI is loaded, it stays."""
    if _TOP in sys.modules or _FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, _FINDER)
    tools: Any = importlib.import_module(f"{_TOP}.utils.module")
    asked = tools.optional_import

    @functools.wraps(asked)
    def optional_import(module: str, *words: Any, **more: Any) -> Any:
        library = module.partition(".")[0]
        absent = library in _DOWNLOADS
        return asked(f"{library}, for Fedicom downloads nothing" if absent else module, *words, **more)

    tools.optional_import = optional_import


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != _TOP:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.submodule_search_locations is not None and spec.origin is not None:
            body = ast.parse(Path(spec.origin).read_bytes()).body
            if fullname == _TOP or all(isinstance(node, ast.ImportFrom) or _is_text(node) for node in body):
                spec.loader = _Package(body)
        return spec


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


class _Package(Loader):
    """Gives each name of a package when it is asked for, from the module that the package would take it from."""

    def __init__(self, body: Sequence[ast.stmt]) -> None:
        self._body = body

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sources: dict[str, tuple[str, str]] = {}
        for node in self._body:
            if isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), name)
                sources |= {part.asname or part.name: (source, part.name) for part in node.names}

        def get(wanted: str) -> Any:
            if wanted.startswith("__"):
                raise AttributeError(f"{name} has no {wanted}")
            if wanted in sources:
                source, inner = sources[wanted]
                value = getattr(importlib.import_module(source), inner)
            else:
                try:
                    value = importlib.import_module(f"{name}.{wanted}")
                except ModuleNotFoundError as error:
                    if error.name != f"{name}.{wanted}":
                        raise
                    raise AttributeError(f"{name} has no {wanted}") from None
            setattr(module, wanted, value)
            return value

        if name == _TOP:
            module.__dict__["__version__"] = importlib.import_module(f"{name}._version").get_versions()["version"]
        module.__dict__["__getattr__"] = get


_FINDER = _Finder()

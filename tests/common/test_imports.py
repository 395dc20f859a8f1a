"""Imports are not searched for rubbish, and everything else is as before."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from common.imports import call, importing


@pytest.fixture(autouse=True)
def _searching():
    assert gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_searched_while_it_is_open_and_all_is_again_afterwards():
    with importing():
        assert not gc.isenabled()
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer one is still open"
    assert gc.isenabled()
    with pytest.raises(RuntimeError), importing():
        raise RuntimeError
    assert gc.isenabled()


def test_who_had_switched_the_search_off_finds_it_off():
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()


def test_what_was_imported_is_passed_over_later_and_nothing_else(tmp_path: Path, monkeypatch):
    gc.unfreeze()
    with importing():
        import json  # noqa: F401  # is there already
    assert gc.get_freeze_count() == 0
    (tmp_path / "some_new_module.py").write_text("held = [[number] for number in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with importing():
        __import__("some_new_module")
    assert gc.get_freeze_count() > 1000
    del sys.modules["some_new_module"]


def test_a_function_is_called_by_its_name_with_the_search_on(tmp_path: Path, monkeypatch):
    (tmp_path / "another_module.py").write_text("import gc\ndef told(*given):\n    return given, gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert call("another_module:told", 1, "two") == ((1, "two"), True)
    del sys.modules["another_module"]

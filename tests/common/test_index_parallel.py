"""A worker that a file kills or stalls is replaced, and every other file is done."""

from __future__ import annotations

import operator
import os
import time

import pytest

from common.imaging import parallel
from common.imaging.parallel import Lost, OutOfTime, spread, time_limit


def results(items: list[str], **kwargs: object) -> dict[int, object]:
    # `eval` is a function that every process can import, and an item can be any harm
    found = list(spread(eval, items, limit_s=0.5, **kwargs))  # type: ignore[arg-type]
    assert len(found) == len(dict(found)), "each item comes back once"
    return dict(found)


def test_every_item_comes_back_once_whatever_others_do_to_their_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_GRACE_S", 0.5)
    harm = {
        3: ("__import__('os').abort()", Lost("crashed")),
        11: ("__import__('time').sleep(60)", Lost("stalled")),
        12: ("sum(range(10**12))", Lost("stalled")),  # C code, which no signal interrupts
        20: ("bytes(2**33)", Lost("crashed")),  # more memory than a worker gets
        39: ("__import__('os')._exit(0)", Lost("crashed")),
    }
    items = [harm[at][0] if at in harm else str(at) for at in range(40)]
    found = results(items, jobs=2, at_once=8, memory_bytes=2**30)
    assert found == {at: harm[at][1] if at in harm else at for at in range(40)}


def test_an_error_of_the_work_is_no_result_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    found = results(["1", "1/0", "2"], jobs=1)
    assert (found[0], found[2]) == (1, 2)
    assert found[1] == Lost("crashed")
    assert capfd.readouterr() == ("", "")


def test_the_workers_end_with_the_iterator() -> None:
    running = spread(operator.attrgetter("real"), [os.getpid()] * 4, jobs=2, limit_s=5.0)
    next(running)
    running.close()
    assert list(running) == []


def test_the_time_limit_passes_through_except_exception() -> None:
    def parser() -> str:
        try:
            time.sleep(5)
        except Exception:
            return "swallowed"
        return "slept"

    with pytest.raises(OutOfTime), time_limit(0.05):
        parser()
    with time_limit(5):
        pass
    time.sleep(0.01)  # no alarm is left behind

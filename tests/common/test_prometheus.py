"""The text that Prometheus reads, and who may read it."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import pytest

from common.errors import ConfigError
from common.prometheus import TYPE, Family, exposition, serve_metrics
from common.supervise import free_port

UP = Family(name="fedicom_up", help="1 while it runs.", kind="gauge", samples=[({}, 1)])


def test_the_text_is_that_of_the_format() -> None:
    families = [
        UP,
        Family(name="rounds_total", help="Rounds.", kind="counter",
               samples=[({"site": "north", "state": "ok"}, 3), ({"site": "south"}, 0.5)]),
    ]  # fmt: skip
    assert exposition(families) == (
        b"# HELP fedicom_up 1 while it runs.\n# TYPE fedicom_up gauge\nfedicom_up 1\n"
        b"# HELP rounds_total Rounds.\n# TYPE rounds_total counter\n"
        b'rounds_total{site="north",state="ok"} 3\nrounds_total{site="south"} 0.5\n'
    )


def test_words_cannot_break_out_of_their_quotes_and_numbers_may_be_infinite() -> None:
    samples = [({"why": 'a "b"\n\\c'}, float("inf")), ({}, float("-inf")), ({}, float("nan"))]
    text = exposition([Family(name="x", help="two\nlines \\", kind="gauge", samples=samples)]).decode()
    assert text.splitlines() == [
        "# HELP x two\\nlines \\\\", "# TYPE x gauge", 'x{why="a \\"b\\"\\n\\\\c"} +Inf', "x -Inf", "x NaN",
    ]  # fmt: skip


def test_a_family_without_samples_is_left_out() -> None:
    assert exposition([Family(name="x", help="", kind="gauge", samples=[])]) == b""


def ask(port: int, path: str, host: str | None = None, method: str = "GET") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    answer.read_all = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


@pytest.fixture
def port() -> Iterator[int]:
    chosen = free_port()
    stop = serve_metrics(chosen, lambda: [UP])
    yield chosen
    stop()


def test_the_page_is_there_and_nothing_else(port: int) -> None:
    answer = ask(port, "/metrics")
    assert (answer.status, answer.getheader("Content-Type")) == (200, TYPE)
    assert answer.read_all == exposition([UP])  # type: ignore[attr-defined]
    assert ask(port, "/").status == 404
    assert ask(port, "/metrics", method="POST").status == 501


@pytest.mark.parametrize(("host", "status"), [("localhost:1", 200), ("evil.example:80", 403), ("evil.example", 403)])
def test_a_web_page_of_another_host_reads_nothing(port: int, host: str, status: int) -> None:
    assert ask(port, "/metrics", host).status == status


def test_a_failure_to_collect_is_an_error_of_the_server_without_its_text() -> None:
    def fail() -> list[Family]:
        raise ValueError("SECRET-1")

    chosen = free_port()
    stop = serve_metrics(chosen, fail)
    answer = ask(chosen, "/metrics")
    stop()
    assert answer.status == 500
    assert b"SECRET" not in answer.read_all  # type: ignore[attr-defined]


def test_a_port_that_is_taken_is_told(port: int) -> None:
    with pytest.raises(ConfigError, match=f"port {port}"):
        serve_metrics(port, list)


def test_the_port_is_free_again_after_the_stop() -> None:
    chosen = free_port()
    serve_metrics(chosen, list)()
    serve_metrics(chosen, list)()

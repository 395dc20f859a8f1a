"""Numbers for Prometheus: its text format, and a page on loopback that shows it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from common.errors import ConfigError

log = logging.getLogger(__name__)

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HOST = "127.0.0.1"
_NAMES = (_HOST, "localhost")
_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric with all its values."""

    name: str
    """Letters, digits and `_`; units at the end, `_total` behind counters."""
    help: str
    kind: Literal["counter", "gauge"]
    samples: Sequence[tuple[Mapping[str, str], float]]
    """Labels and value."""


def exposition(families: Iterable[Family]) -> bytes:
    """The text format, version 0.0.4; a family without samples is left out.

    Source: https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    lines = []
    for family in families:
        if family.samples:
            told = family.help.replace("\\", "\\\\").replace("\n", "\\n")
            lines += [f"# HELP {family.name} {told}", f"# TYPE {family.name} {family.kind}"]
            lines += [f"{family.name}{_labels(labels)} {_number(value)}" for labels, value in family.samples]
    return "".join(f"{line}\n" for line in lines).encode()


def serve_metrics(port: int, collect: Callable[[], Iterable[Family]]) -> Callable[[], None]:
    """Shows what `collect` gives at http://127.0.0.1:port/metrics, from a thread.

    Returns:
        What ends it.

    Raises:
        ConfigError: The port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, timeout = "fedicom", "", _TIMEOUT_S

        def do_GET(self) -> None:
            # A web page of somebody else may make a browser on this machine call us, but under its own host name.
            if self.headers.get("Host", "").rpartition(":")[0].strip("[]") not in _NAMES:
                self.send_error(403)
            elif self.path != "/metrics":
                self.send_error(404)
            else:
                self._show()

        def _show(self) -> None:
            try:
                text = exposition(collect())
            except Exception:
                log.exception("the metrics could not be collected")
                self.send_error(500)
                return
            self.send_response(200)
            self.send_header("Content-Type", TYPE)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            """A line for every look would fill the log."""

    try:
        server = ThreadingHTTPServer((_HOST, port), Handler)
    except OSError as error:
        raise ConfigError(f"the metrics port {port} cannot be used: {error.strerror}; choose another") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _labels(labels: Mapping[str, str]) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    return "{" + ",".join(f'{name}="{quoted(value)}"' for name, value in labels.items()) + "}" if labels else ""


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return repr(value)

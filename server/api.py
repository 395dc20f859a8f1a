"""The coordinator's HTTP interface on loopback: what `fedicom server` and Prometheus ask.

    GET  /metrics                   open
    GET  /v1/status                 operator or auditor: the coordinator and all runs
    GET  /v1/runs, /v1/runs/NAME    operator or auditor
    GET  /v1/audit[?part=N]         operator or auditor: the signed log, or one of its earlier parts
    POST /v1/runs[?name=N&patience_s=S]      operator; the body is a signed recipe
    POST /v1/runs/NAME/stop|resume|conclude  operator

A token comes as `Authorization: Bearer ...`. A POST with a known token is in the audit log before it is done.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from common.chain import part, parts
from common.deployment import ServerHome, read_status
from common.errors import ConfigError, FedicomError, StorageError
from common.prometheus import TYPE, Family, exposition
from common.storage import storing
from server.control import ConflictError, Control
from server.runs import NoRunError
from server.tokens import read_tokens

log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_NAMES = (_HOST, "localhost")
_TIMEOUT_S = 10.0
_MAX_BODY = 1 << 20


@dataclass(frozen=True)
class Person:
    """Who holds a token."""

    name: str
    role: str


def who(home: ServerHome, token: str) -> Person | None:
    """Whose token this is; None when it is nobody's, and for everybody when the file cannot be read.

    The table is read at every call, so a token that was taken away stops to work at once.
    """
    given = hashlib.sha256(token.encode()).hexdigest()
    try:
        table = read_tokens(home)
    except FedicomError as error:
        log.error("nobody is let in: %s", error)
        return None
    found = None
    for role, people in table.items():  # to the end, whatever is found: the time it takes tells nothing
        for person in people:
            if hmac.compare_digest(person["sha256"].encode(), given.encode()):
                found = Person(person["name"], role)
    return found


class Api:
    """The interface of one coordinator, served from a thread of its own."""

    def __init__(self, control: Control, port: int | None) -> None:
        """Listens; answers from `start` on.

        Args:
            port: None takes a free one.

        Raises:
            ConfigError: The port is taken.
        """
        try:
            self._server = ThreadingHTTPServer((_HOST, port or 0), _handler(control))
        except OSError as error:
            raise ConfigError(f"control_port {port} cannot be used: {error.strerror}; choose another") from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="control", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Ends; requests under way are not waited for."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _RefusedError(FedicomError):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def _handler(control: Control) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.control = control
    return Handler


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version, timeout = "fedicom", "", _TIMEOUT_S
    control: Control

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        try:
            try:
                self._route(method)
            except FedicomError as error:
                self._send(_code(error), _json({"error": str(error)}))
            except OSError:
                raise
            except Exception:
                log.exception("%s", method)
                self._send(500, _json({"error": "this is a defect of Fedicom; the coordinator's log has more"}))
        except OSError:  # the peer has gone
            self.close_connection = True

    def _route(self, method: str) -> None:
        # A web page of somebody else may make a browser on this machine call us, but under its own host name.
        if self.headers.get("Host", "").rpartition(":")[0] not in _NAMES:
            raise _RefusedError(403, "this interface is for programs on the coordinator's machine")
        try:
            url = urlsplit(self.path)
        except ValueError:
            raise _RefusedError(404, "this is no address; the interface is described in docs/coordinator.md") from None
        if method == "GET" and url.path == "/metrics":
            self._send(200, exposition(families(self.control)), TYPE)
            return
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        person = self._person()
        path = tuple(url.path.strip("/").split("/"))
        if method == "GET":
            self._get(path, query)
        else:
            self._post(path, query, person)

    def _person(self) -> Person:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        person = who(self.control.home, token.strip()) if scheme.lower() == "bearer" and token else None
        if person is None:
            raise _RefusedError(401, "no token, or one that is not known; give --token-file or set FEDICOM_TOKEN_FILE")
        return person

    def _get(self, path: tuple[str, ...], query: Mapping[str, str]) -> None:
        match path:
            case ("v1", "status"):
                plain: Any = {"server": self.control.status, "runs": self.control.run_statuses()}
            case ("v1", "runs"):
                plain = self.control.run_statuses()
            case ("v1", "runs", name):
                plain = self.control.run_status(name)
            case ("v1", "audit"):
                self._log(query.get("part"))
                return
            case _:
                raise _RefusedError(404, "nothing is here; the interface is described in docs/coordinator.md")
        self._send(200, _json(plain))

    def _log(self, number: str | None) -> None:
        path = self.control.home.audit_file
        earlier = parts(path)
        if number is not None:
            if not (number.isdecimal() and 1 <= int(number) <= len(earlier)):
                raise _RefusedError(404, f"the log has {len(earlier)} earlier parts")
            path = part(path, int(number))
        with storing("the audit log"):
            data = path.read_bytes()
        # An event may be on its way to the disk just now.
        data = data[: data.rfind(b"\n") + 1]
        self._send(200, data, "application/jsonl", {"Fedicom-Audit-Parts": str(len(earlier))})

    def _post(self, path: tuple[str, ...], query: Mapping[str, str], person: Person) -> None:
        body = self._body()
        control = self.control
        match path:
            case ("v1", "runs"):
                action, run = "run", query.get("name", "")
            case ("v1", "runs", name, "stop" | "resume" | "conclude" as action):
                run = name
            case _:
                raise _RefusedError(404, "nothing can be sent there; the interface is described in docs/coordinator.md")
        facts = {"who": person.name, "role": person.role, "action": action, "run": run[:80]}
        if action == "run":
            facts["body"] = hashlib.sha256(body).hexdigest()
        control.audit.append("operator action", **facts)
        try:
            if person.role != "operator":
                raise _RefusedError(403, f"{person.name} is an auditor: may read, and run or stop nothing")
            if action == "run":
                run = control.submit(body, run or None, by=person.name, patience_s=_patience(query))
            elif action == "stop":
                control.stop_run(run)
            elif action == "conclude":
                control.conclude_run(run)
            else:
                control.resume_run(run)
        except FedicomError as error:
            control.audit.append("operator action refused", **facts, why=str(error)[:500])
            raise
        self._send(200, _json(control.run_status(run)))

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            raise _RefusedError(411, "the length of the body is missing")
        if int(length) > _MAX_BODY:
            raise _RefusedError(413, f"a signed recipe has at most {_MAX_BODY} bytes")
        return self.rfile.read(int(length))

    def _send(
        self, status: int, data: bytes, kind: str = "application/json", more: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(more or {})}.items():
            self.send_header(name, value)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """A line for every look would fill the log; what people do is in the audit log."""


def _patience(query: Mapping[str, str]) -> float | None:
    try:
        patience_s = float(query["patience_s"]) if "patience_s" in query else None
    except ValueError:
        patience_s = -1.0
    if patience_s is not None and not 0 <= patience_s <= 365 * 86400:
        raise ConfigError("patience_s: expected seconds, from 0 to those of a year")
    return patience_s


def _code(error: FedicomError) -> int:
    match error:
        case _RefusedError():
            return error.status
        case ConflictError():
            return 409
        case NoRunError():
            return 404
        case ConfigError():
            return 400
        case StorageError():
            return 507
        case _:
            return 500


def _json(plain: Any) -> bytes:
    return (json.dumps(plain) + "\n").encode()


def families(control: Control) -> Iterator[Family]:
    """All metrics of the coordinator."""
    server, runs = control.status, control.run_statuses()
    yield Family(
        name="fedicom_child_up",
        help="1 while a process of the coordinator runs.",
        kind="gauge",
        samples=[({"child": name}, float(pid is not None)) for name, pid in server["children"].items()],
    )
    registry = server["registry"] or {"sites": []}
    yield _gauge("fedicom_sites_registered", "Sites that may take part.", len(registry["sites"]))
    yield Family(
        name="fedicom_site_online",
        help="1 while a site is connected.",
        kind="gauge",
        samples=[({"site": name}, float(name in server["online"])) for name in registry["sites"]],
    )
    yield _gauge("fedicom_sites_online", "Sites that are connected.", len(server["online"]))
    yield _gauge(
        "fedicom_warnings", "What the coordinator warns of: certificates that run out.", len(server["warnings"])
    )
    disk = shutil.disk_usage(control.home.path)
    yield _gauge("fedicom_disk_free_bytes", "Free on the disk of the coordinator's folder.", disk.free)
    yield from _of_runs(runs)
    yield from _of_gateway(control.home)


def _gauge(name: str, says: str, value: float) -> Family:
    return Family(name=name, help=says, kind="gauge", samples=[({}, float(value))])


def _of_runs(runs: list[dict[str, Any]]) -> Iterator[Family]:
    def each(name: str, says: str, path: tuple[str, ...], counter: bool = False) -> Family:
        samples = []
        for run in runs:
            value: Any = run
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                samples.append(({"run": str(run["run"])}, float(value)))
        return Family(name=name, help=says, kind="counter" if counter else "gauge", samples=samples)

    yield Family(
        name="fedicom_run_state",
        help="1 for the state that a run is in.",
        kind="gauge",
        samples=[({"run": run["run"], "state": str(run.get("state", "waiting"))}, 1.0) for run in runs],
    )
    yield each("fedicom_run_rounds", "Rounds behind a run.", ("round",))
    yield each("fedicom_run_rounds_planned", "Rounds of the recipe.", ("rounds",))
    yield each("fedicom_run_eta_seconds", "Estimated time to the end.", ("eta_s",))
    yield each("fedicom_round_seconds", "Duration of the last round.", ("last_round", "seconds"))
    yield each("fedicom_round_began_timestamp_seconds", "When the round began that is under way.", ("round_began",))
    yield each(
        "fedicom_round_validation_auroc", "Mean validation AUROC of the last round.", ("last_round", "validation")
    )
    yield each("fedicom_updates_admitted_total", "Replies that were admitted.", ("admitted",), counter=True)
    yield each("fedicom_updates_refused_total", "Replies that were not, silence included.", ("refused",), counter=True)
    sites = [(run["run"], name, site) for run in runs for name, site in (run.get("sites") or {}).items()]

    def of_sites(name: str, says: str, key: str) -> Family:
        return Family(
            name=name,
            help=says,
            kind="gauge",
            samples=[
                ({"run": run, "site": site}, float(facts[key]))
                for run, site, facts in sites
                if isinstance(facts.get(key), int | float)
            ],
        )

    yield of_sites("fedicom_site_epsilon", "Epsilon that a site spent on a run, as it reported.", "epsilon")
    yield of_sites("fedicom_site_visit_seconds", "Duration of a site's last visit.", "seconds")


def _of_gateway(home: ServerHome) -> Iterator[Family]:
    try:
        stats = read_status(home.gateway_stats) or {}
    except FedicomError:
        stats = {}

    def by(name: str, says: str, key: str, label: str) -> Family:
        samples = [({label: str(who)}, float(count)) for who, count in (stats.get(key) or {}).items()]
        return Family(name=name, help=says, kind="counter", samples=samples)

    yield by("fedicom_gateway_received_bytes_total", "Bodies received from sites.", "bytes_in", "site")
    yield by("fedicom_gateway_sent_bytes_total", "Bodies sent to sites.", "bytes_out", "site")
    yield by("fedicom_gateway_refused_total", "Refused requests and connections.", "refused", "why")
    requests = stats.get("requests") or {}
    yield Family(
        name="fedicom_gateway_requests_total",
        help="Answered requests.",
        kind="counter",
        samples=[
            ({"site": site, "status": status}, float(count))
            for site, codes in requests.items()
            for status, count in codes.items()
        ],
    )
    if "open_connections" in stats:
        yield _gauge("fedicom_gateway_open_connections", "Open connections.", float(stats["open_connections"]))

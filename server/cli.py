"""`fedicom server`: start the coordinator, and tell a running one what to do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import add_by
from common.epsilon import rounded_up
from common.errors import ConfigError, FedicomError, StorageError
from common.printable import number_of, printable
from common.storage import named_file, storing

if TYPE_CHECKING:
    from rich.console import Console, Group

    from common.deployment import ServerHome

_EPILOG = """verbs:
  fedicom server start                       SuperLink, gateway and all unfinished runs, until Ctrl-C or SIGTERM
  fedicom server run RECIPE [--name N] [--detach] [--patience-h H]
                                             put a recipe of `fedicom recipe sign` to work, and watch it
  fedicom server status [--watch] [--json]   the coordinator, its runs and their sites
  fedicom server runs                        all runs, a line each
  fedicom server stop RUN                    end the work on a run; what it has done stays
  fedicom server resume RUN                  go on with a run that was stopped or failed
  fedicom server conclude RUN                train no more: make the model of the rounds that are done
  fedicom server export RUN [--unaudited]    release the model of a run whose privacy audit passed
  fedicom server audit --out DIR             fetch the coordinator's signed log, all parts
  fedicom server registry install FILE       take a newer registry
  fedicom server token new --role ROLE --name NAME    a token for an operator or an auditor

All take --home DIR (or FEDICOM_HOME, or the current folder). Those that ask the running coordinator also take
--token-file FILE (or FEDICOM_TOKEN_FILE; without both, keys/operator.token) and --control 127.0.0.1:PORT."""

_POLL_S = 1.0
_BYTES = "surrogateescape"
"""Of an argument that is no UTF-8: they go as they are, and the coordinator says what it knows of such a name."""
_REACHED_BY = {"gateway", "superlink"}
"""Processes without which no site reaches the coordinator."""
_OVER = {"finished": 0, "failed": 1, "stopped": 1}
"""State of a run that nobody works on -> exit code of who watched it."""


def server_verb(words: Sequence[str]) -> int:
    """`fedicom server`: the first word is a verb."""
    parser = argparse.ArgumentParser(
        prog="fedicom server",
        description="Coordinate a federation.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=_VERBS, metavar="verb", help="what to do; `fedicom server verb --help`")
    return _VERBS[parser.parse_args(words[:1]).verb](words[1:])


# The coordinator itself


def _start(words: Sequence[str]) -> int:
    arguments = _parser("start", "Keep SuperLink, gateway and all unfinished runs alive.").parse_args(words)
    import logging
    import signal

    from common.deployment import ServerHome, home_folder
    from server.api import Api
    from server.control import Control, alone, deployed

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    for name in ("alembic", "flwr", "httpcore", "httpx"):  # a line for every call
        logging.getLogger(name).setLevel(logging.WARNING)
    home = ServerHome(home_folder(arguments.home, "server.yaml"))
    with alone(home):
        control = Control(home, deployed())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: control.stop())
        api = Api(control, control.config.control_port)
        try:
            api.start()
            control.serve(api.port)
        finally:
            api.stop()
    return 0


# Questions to a running one


def _run(words: Sequence[str]) -> int:
    parser = _asking("run", "Put a signed recipe to work.")
    parser.add_argument("recipe", metavar="RECIPE", help="file of `fedicom recipe sign`")
    parser.add_argument("--name", metavar="NAME", help="of the run (default: the recipe's)")
    parser.add_argument("--detach", action="store_true", help="return at once")
    parser.add_argument(
        "--patience-h", type=float, metavar="H", help="hours to ask again while too few sites answer (default: 48)"
    )
    arguments, more = parser.parse_known_args(words)
    if "=" in arguments.recipe and not Path(arguments.recipe).exists():
        raise ConfigError(
            f"{arguments.recipe} is no file: a run needs a signed recipe, for sites approve nothing else. Sign it "
            f"first: fedicom recipe sign {' '.join(word for word in words if '=' in word)} --out recipe.json"
        )
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    from urllib.parse import urlencode

    path = named_file(arguments.recipe)
    with storing(path.name):
        data = path.read_bytes()
    query: dict[str, Any] = {"name": arguments.name} if arguments.name else {}
    if arguments.patience_h is not None:
        query["patience_s"] = arguments.patience_h * 3600
    asking = _Asking(arguments)
    run = asking.post(f"/v1/runs{f'?{urlencode(query, errors=_BYTES)}' if query else ''}", data)
    name = str(run["run"])
    rounds = number_of(int(run.get("rounds") or 0), "round")
    _say(f"Run {name}: recipe {run.get('recipe')}, id {str(run.get('recipe_id'))[:12]}, {rounds}")
    if arguments.detach:
        _say(f"It goes on by itself; `fedicom server status` shows it, `fedicom server stop {name}` ends it.")
        return 0
    return _follow(asking, name)


def _status(words: Sequence[str]) -> int:
    parser = _asking(
        "status",
        "How the coordinator, its runs and their sites stand. Exit code 1 where no site can reach it: it does not run, "
        "its gateway or SuperLink is down or has a certificate that ran out, or nobody could be asked for two minutes.",
    )
    parser.add_argument("--watch", action="store_true", help="keep showing it until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    arguments = parser.parse_args(words)
    asking = _Asking(arguments)
    if arguments.watch and not arguments.json:
        _live(asking, lambda plain: None)
        return 0
    plain = asking.status()
    if arguments.json:
        _say(json.dumps(plain, indent=1))
    else:
        _console().print(_table(plain))
    reachable = not _REACHED_BY & set(plain["server"].get("down", ()))
    return 0 if plain["server"]["state"] == "running" and reachable and not plain["server"].get("silent") else 1


def _runs(words: Sequence[str]) -> int:
    arguments = _asking("runs", "All runs, a line each, oldest first.").parse_args(words)
    for run in _Asking(arguments).status()["runs"]:
        rounds = f"{run.get('round', 0)} of {run.get('rounds', '?')} rounds"
        why = f"  {_line(str(run['error']))}" if run.get("error") else ""
        _say(f"{run['run']:<24} {run.get('state', 'waiting'):<11} {rounds:<18} {run.get('updated', '')}{why}")
    return 0


def _stop(words: Sequence[str]) -> int:
    return _tell(
        "stop", "End the work on a run; what it has done stays.", words, "stopped; `fedicom server resume {0}`"
    )


def _resume(words: Sequence[str]) -> int:
    return _tell("resume", "Go on with a run that was stopped or failed.", words, "goes on; `fedicom server status`")


def _conclude(words: Sequence[str]) -> int:
    return _tell(
        "conclude",
        "End the training of a run where it stands, at work or not: the sites that are there measure the model, it is "
        "evaluated and exported, and nobody is asked to train again. A round that is under way is given up.",
        words,
        "trains no more and is concluded; `fedicom server status`",
    )


def _tell(action: str, says: str, words: Sequence[str], done: str) -> int:
    parser = _asking(action, says)
    parser.add_argument("run", metavar="RUN", help="name of the run, as `fedicom server runs` lists it")
    arguments = parser.parse_args(words)
    from urllib.parse import quote

    run = _Asking(arguments).post(f"/v1/runs/{quote(arguments.run, safe='', errors=_BYTES)}/{action}", b"")
    _say(f"Run {run['run']} {done.format(run['run'])}")
    return 0


def _audit(words: Sequence[str]) -> int:
    parser = _asking("audit", "Fetch the coordinator's signed log; `fedicom audit verify` checks it offline.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write it to")
    arguments = parser.parse_args(words)
    from common.chain import part
    from common.storage import private_folder, write_whole

    asking = _Asking(arguments)
    path = private_folder(arguments.out) / "server.jsonl"
    for _ in range(3):
        data, headers = asking.get("/v1/audit")
        count = int(headers.get("fedicom-audit-parts", "0"))
        for number in range(1, count + 1):
            if not part(path, number).exists():
                write_whole(part(path, number), asking.get(f"/v1/audit?part={number}")[0])
        # Closed and begun anew in between: what was fetched first lies in a part that was not.
        if int(asking.get("/v1/audit")[1].get("fedicom-audit-parts", "0")) == count:
            write_whole(path, data)
            events = len(data.splitlines())
            earlier = number_of(count, "earlier part")
            _say(f"{path}: {number_of(events, 'event')}, and {earlier}; check it with `fedicom audit verify`")
            return 0
    raise StorageError("the log grows too fast to be fetched; try again")


# What is done in the folder itself


def _export(words: Sequence[str]) -> int:
    from server.release import export_verb

    return export_verb(words)


def _registry(words: Sequence[str]) -> int:
    parser = _parser("registry", "Take a newer registry; the running coordinator sees it within a second.")
    parser.add_argument("action", choices=("install",), help="put it in place of the one before")
    parser.add_argument("file", type=named_file, metavar="FILE", help="registry.json of the authority's folder")
    add_by(parser)
    arguments = parser.parse_args(words)
    from common.enrolment import install_registry

    registry = install_registry(_home(arguments), arguments.file, by=arguments.by)
    _say(f"registry of version {registry.version}, sites that take part: {len(registry.members)}")
    return 0


def _token(words: Sequence[str]) -> int:
    parser = _parser("token", "Make a token: operators run and stop, auditors read.")
    parser.add_argument("action", choices=("new",), help="make one; `fedicom provision token --remove` takes it away")
    parser.add_argument("--role", choices=("operator", "auditor"), required=True, help="what the token allows")
    parser.add_argument("--name", required=True, metavar="NAME", help="the person's; it stands in the log")
    add_by(parser)
    arguments = parser.parse_args(words)
    from server.tokens import install_token

    path = install_token(_home(arguments), arguments.role, arguments.name, by=arguments.by)
    _say(f"{path}: hand it over and delete it here; FEDICOM_TOKEN_FILE names it. An earlier token of the name is void.")
    return 0


_VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "start": _start,
    "run": _run,
    "status": _status,
    "runs": _runs,
    "stop": _stop,
    "resume": _resume,
    "conclude": _conclude,
    "export": _export,
    "audit": _audit,
    "registry": _registry,
    "token": _token,
}


def _parser(verb: str, says: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"fedicom server {verb}", description=says)
    parser.add_argument(
        "--home",
        type=Path,
        metavar="DIR",
        help="the coordinator's folder (default: FEDICOM_HOME, else the current folder)",
    )
    return parser


def _asking(verb: str, says: str) -> argparse.ArgumentParser:
    parser = _parser(verb, says)
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="token to show (default: FEDICOM_TOKEN_FILE, else keys/operator.token)",
    )
    parser.add_argument(
        "--control", metavar="127.0.0.1:PORT", help="where the coordinator listens (default: as its folder says)"
    )
    return parser


def _home(arguments: argparse.Namespace) -> ServerHome:
    from common.deployment import ServerHome, home_folder

    return ServerHome(home_folder(arguments.home, "server.yaml"))


class NotRunningError(FedicomError):
    """Nobody answers."""


class _Asking:
    """Questions to the control interface; the token is read from a file and stands in no command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._home: ServerHome | None = None
        if arguments.control is None or not (arguments.token_file or os.environ.get("FEDICOM_TOKEN_FILE")):
            self._home = self._named(arguments)
        self._control: str | None = arguments.control
        self._token_file: Path | None = arguments.token_file

    @staticmethod
    def _named(arguments: argparse.Namespace) -> ServerHome:
        try:
            return _home(arguments)
        except ConfigError as error:
            raise ConfigError(f"{error}; who has a token alone says --control 127.0.0.1:PORT as well") from None

    def get(self, path: str) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers.

        Raises:
            NotRunningError: Nobody answers.
            FedicomError: The coordinator's refusal, in its own words.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: bytes) -> dict[str, Any]:
        """The answer, from JSON.

        Raises:
            FedicomError: As `get`.
        """
        plain: dict[str, Any] = json.loads(self._ask("POST", path, body)[0])
        return plain

    def run(self, name: str) -> dict[str, Any]:
        """How a run stands."""
        plain: dict[str, Any] = json.loads(self.get(f"/v1/runs/{name}")[0])
        return plain

    def status(self) -> dict[str, Any]:
        """How everything stands; of a coordinator that does not run, what its files say."""
        try:
            plain: dict[str, Any] = json.loads(self.get("/v1/status")[0])
        except NotRunningError as error:
            if self._home is None:
                raise
            return _from_files(self._home, str(error))
        return plain

    def _ask(self, method: str, path: str, body: bytes | None) -> tuple[bytes, Mapping[str, str]]:
        from http.client import HTTPConnection, HTTPException

        host, _, port = self._address().rpartition(":")
        connection = HTTPConnection(host, int(port), timeout=30)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {self._token()}"})
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, HTTPException):
            raise NotRunningError(
                f"no coordinator answers at {host}:{port}; start it with `fedicom server start`"
            ) from None
        finally:
            connection.close()
        if answer.status != 200:
            raise (ConfigError if answer.status in (400, 404, 409) else FedicomError)(_refusal(data, answer.status))
        return data, {name.lower(): value for name, value in answer.getheaders()}

    def _address(self) -> str:
        from common.deployment import read_status

        if self._control is not None:
            host, _, port = self._control.rpartition(":")
            # The token goes there unencrypted: nowhere but to this machine, where a tunnel may begin.
            if host not in ("127.0.0.1", "localhost") or not port.isdecimal():
                raise ConfigError(
                    f"--control: got {self._control!r}, expected 127.0.0.1:PORT; reach another machine with ssh -L"
                )
            return self._control
        assert self._home is not None
        found = (read_status(self._home.control_file) or {}).get("port")
        if not isinstance(found, int):
            raise NotRunningError("the coordinator does not run; start it with `fedicom server start`")
        return f"127.0.0.1:{found}"

    def _token(self) -> str:
        from common.identity import read_private

        path = self._token_file or (
            Path(os.environ["FEDICOM_TOKEN_FILE"]) if "FEDICOM_TOKEN_FILE" in os.environ else None
        )
        if path is None:
            assert self._home is not None
            path = self._home.operator_token
        token = read_private(path, "a token").decode("ascii", "replace").strip()
        if not token.isascii() or not token.isprintable() or not token:
            raise ConfigError(f"{path.name} holds no token; take the one of the kit, or make one")
        return token


def _refusal(data: bytes, status: int) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the coordinator answered with status {status}; is something else listening there?"


def _from_files(home: ServerHome, why: str) -> dict[str, Any]:
    from server.runs import Run, run_names

    runs = [{"run": name, **Run(home, name).status} for name in run_names(home)]
    return {"server": {"state": "not running", "trouble": why}, "runs": runs}


# What is shown


def _follow(asking: _Asking, name: str) -> int:
    """Shows a run until nobody works on it any more."""
    ended: dict[str, Any] = {}

    def over(plain: dict[str, Any]) -> dict[str, Any] | None:
        run = next((run for run in plain["runs"] if run["run"] == name), None)
        if run is not None and run.get("state") in _OVER and not run.get("at_work"):
            ended.update(run)
            return ended
        return None

    try:
        _live(asking, over, only=name)
    except KeyboardInterrupt:
        _say(f"Run {name} goes on by itself; `fedicom server stop {name}` ends it.")
        raise
    state = str(ended["state"])
    summary = ended.get("summary") or {}
    auroc = (summary.get("global") or {}).get("auroc")
    _say(f"Run {name} {state}" + (f": AUROC {auroc:.3f} on the coordinator's test set" if auroc is not None else ""))
    if ended.get("error"):
        _say(str(ended["error"]))
    return _OVER[state]


def _live(asking: _Asking, over: Callable[[dict[str, Any]], object], only: str | None = None) -> None:
    """Shows the table until `over` says so; in a file or a pipe, a line whenever a round is done."""
    from rich.live import Live

    console = _console()
    said = ""
    plain = asking.status()
    with Live(_table(plain, only), console=console, auto_refresh=False, transient=False) as live:
        while over(plain) is None:
            if console.is_terminal:
                live.update(_table(plain, only), refresh=True)
            elif (line := _lines(plain, only)) != said:
                said = line
                _say(line)
            time.sleep(_POLL_S)
            plain = asking.status()
        live.update(_table(plain, only), refresh=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _lines(plain: Mapping[str, Any], only: str | None) -> str:
    runs = [run for run in plain["runs"] if only in (None, run["run"])]
    return "\n".join(f"{run['run']}: {run.get('state', 'waiting')}, {_progress(run)}" for run in runs)


def _table(plain: Mapping[str, Any], only: str | None = None) -> Group:
    """The coordinator in a line or two, then each run that is not over with its sites, then the others in a line."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from server.runs import NOT_YET

    server = plain["server"]
    shown: list[Any] = [Text(line, style=style) for line, style in _server_lines(server)]
    runs = [run for run in plain["runs"] if only in (None, run["run"])]
    for run in runs:
        state = str(run.get("state", "waiting"))
        title = f"{run['run']}: {state}, {_progress(run)}"
        if state in ("finished", "stopped") and only is None:
            shown.append(Text(title))
            continue
        table = Table(title=title, title_justify="left")
        for column in ("site", "state", "round", "took", "epsilon", "last seen", "why"):
            table.add_column(column, justify="right" if column in ("round", "took", "epsilon") else "left")
        for name, site in sorted((run.get("sites") or {}).items()):
            state, why = str(site.get("state")), str(site.get("why") or "")
            if why == NOT_YET and name in server.get("online", []):
                # A run's process takes seconds until it asks; who is connected, the coordinator knows before.
                state, why = "online", "connected, not asked yet"
            table.add_row(
                name,
                Text(state, style=_STYLES.get(state, "")),
                _or_dash(site.get("round")),
                _duration(site.get("seconds")),
                "-" if site.get("epsilon") is None else rounded_up(site["epsilon"]),
                _clock(site.get("last_seen")),
                Text(_line(why)),
            )
        shown.append(table)
        if run.get("error"):
            shown.append(Text(_line(str(run["error"]), 500), style="yellow"))
    if not runs:
        shown.append(Text("No run yet; `fedicom server run RECIPE` begins one."))
    return Group(*shown)


_STYLES = {
    "online": "green",
    "answered": "green",
    "late": "yellow",
    "offline": "yellow",
    "refused": "red",
    "failed": "red",
}


def _server_lines(server: Mapping[str, Any]) -> list[tuple[str, str]]:
    if server["state"] == "not running":
        return [(f"Coordinator: {server['trouble']}", "red")]
    registry = server.get("registry") or {"sites": []}
    online, sites = server.get("online", []), registry["sites"]
    away = sorted(set(sites) - set(online))
    connected = f"{len(online)} of {len(sites)} sites connected" + " when last asked" * bool(server.get("stale"))
    if away:
        connected += f" (not: {', '.join(away[:8])})"
    if server.get("silent"):
        connected = "which sites are connected is not known: nobody could be asked for two minutes"
    head = f"Coordinator of {server['federation']}: {server['state']}, gateway on port {server['port']}, {connected}"
    lines = [(head, "")]
    lines += [(f"{name} is down: {what}; see run/logs/{name}.log", "red") for name, what in server["down"].items()]
    lines += [(warning, "yellow") for warning in server.get("warnings", [])]
    return lines + ([(server["trouble"], "red")] if server.get("trouble") else [])


def _progress(run: Mapping[str, Any]) -> str:
    text = f"round {run.get('round', 0)} of {run.get('rounds', '?')} done"
    last = run.get("last_round") or {}
    if last.get("validation") is not None:
        text += f", validation AUROC {last['validation']:.3f}"
    return text + (f", about {_duration(run['eta_s'])} left" if run.get("eta_s") else "")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _clock(moment: str | None) -> str:
    return "-" if not moment else moment[11:19] + " UTC"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _line(text: str, most: int = 80) -> str:
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= most else f"{flat[: most - 3]}..."


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201

"""How long a round of a deployed federation takes, beside a plain TLS transfer of the same bytes: a JSON file.

    python benchmarks/deployed_round.py --out runs/deployed_round.json

Real processes on loopback, as `fedicom rehearse` starts them: coordinator, gateway, SuperLink and three sites with
keys, TLS and node authentication. The model has 11 million numbers (45 MB), the training is one step on a handful of
tiny images. A round is the time from one "round aggregated" in the coordinator's log to the next: it holds the
checkpoint and whatever else stands between two rounds. The first two rounds are not counted. Beside it, in the same run
and on the same machine: a copy and a TLS 1.3 transfer over loopback of the same bytes (each site gets the model and
sends an update), with one plain thread a connection.

The breakdown has the processor time of each process over the counted rounds, and, from the logs of the sites, how long
a plan took to arrive, the visit itself, and the way back with aggregation and checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, spread

from common.audit import verify
from common.chain import Event
from common.config import Phantom
from simulations.rehearsal import RUN, Plan, Rehearsal, end_as_with_ctrl_c, rehearsing

SITES = 3
SKIPPED = 2
PHANTOM = Phantom(patients=24, central_patients=10, size=32)
POLICY = {"require_privacy": False, "min_patients": 3, "metrics": "none"}
TICKS = os.sysconf("SC_CLK_TCK")


def words(model: str, rounds: int, more: Sequence[str]) -> tuple[str, ...]:
    """The recipe: no privacy, and one step a round."""
    return (
        *("recipe=phantom_2d", "privacy=none", f"model={model}", f"rounds={rounds}", "data.size=[32,32]"),
        *("training.local_epochs=1", "training.batch_size=64", "training.optimizer=sgd", "training.lr=0.001"),
        *("evaluation.bootstraps=100", "federation.timeout_s=240", "federation.offline_s=100"),
        *more,
    )


def deployed(folder: Path, model: str, rounds: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """One deployed run; what its rounds took."""
    plan = Plan(count=SITES, quorum=SITES, recipe=words(model, rounds, more), phantom=PHANTOM, policy=POLICY)
    with rehearsing(folder, plan) as federation:
        federation.approve()
        for name in ("server", *plan.sites):
            federation.start(name)
        federation.run()
        federation.wait_round(SKIPPED, timeout_s=600)
        before, began = processor_s(federation), time.monotonic()
        federation.wait_round(rounds, timeout_s=600)
        after, wall_s = processor_s(federation), time.monotonic() - began
        summary = federation.wait_finished()["summary"]
        events = verify(federation.server.audit_file)
        sites = {name: verify(federation.site(name).audit_file) for name in plan.sites}
    counted = rounds - SKIPPED
    return {
        **rounds_of(events, sites),
        "weight_digest": summary["weight_digest"],
        "processor_s_a_round": {name: round((after[name] - before[name]) / counted, 3) for name in sorted(after)},
        "busy_cores": round(sum(after[name] - before[name] for name in after) / wall_s, 2),
    }


def rounds_of(events: Sequence[Event], sites: Mapping[str, Sequence[Event]]) -> dict[str, Any]:
    """Durations out of the logs of both sides, whose clock is the same one here; seconds."""
    done = {event.facts["round"]: event.moment for event in events if event.kind == "round aggregated"}
    walls = {number: seconds(done[number - 1], done[number]) for number in sorted(done) if number - 1 in done}
    walls = {number: wall for number, wall in walls.items() if number > SKIPPED}
    parts: dict[str, list[float]] = {"until the plan is at the site": [], "visit": [], "back and aggregated": []}
    for log in sites.values():
        at = {(event.kind, event.facts.get("round")): event.moment for event in log}
        for number in walls:
            got, sent = at["plan received", number], at["update sent", number]
            parts["until the plan is at the site"].append(seconds(done[number - 1], got))
            parts["visit"].append(seconds(got, sent))
            parts["back and aggregated"].append(seconds(sent, done[number]))
    return {
        "round_s": spread(list(walls.values())),
        "rounds": [round(wall, 3) for wall in walls.values()],
        "update_bytes": max(
            event.facts["bytes"] for log in sites.values() for event in log if event.kind == "update sent"
        ),
        "parts_s": {name: spread(values) for name, values in parts.items()},
    }


def processor_s(federation: Rehearsal) -> dict[str, float]:
    """Processor time of every process so far; those of the sites are added up by kind."""
    pids: dict[str, list[int]] = {}
    for name in ("server", *federation.plan.sites):
        home = federation.server if name == "server" else federation.site(name)
        status = json.loads(home.status_file.read_text())
        children = {**status["children"], "supervisor": status["pid"]}
        for child, pid in children.items():
            kind = f"{'coordinator' if name == 'server' else 'sites'}: {child.removesuffix('-' + RUN)}"
            if pid is not None:
                pids.setdefault(kind, []).append(pid)
    return {kind: sum(_ticks(pid) for pid in found) / TICKS for kind, found in pids.items()}


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def floor(folder: Path, count: int, nbytes: int, repeats: int = 7) -> dict[str, Any]:
    """Copy, and TLS 1.3 over loopback, of what a round moves: `count` sites get and send `nbytes` each."""
    data, copies, transfers = np.zeros(nbytes, np.uint8), list[float](), list[float]()
    home = folder / "floor"
    home.mkdir()
    certificate, key = home / "floor.crt", home / "floor.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
         "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    for _ in range(repeats):
        began = time.monotonic()
        for _ in range(2 * count):
            data.copy()
        copies.append(time.monotonic() - began)
        transfers.append(_transfer(certificate, key, count, nbytes))
    return {"copy_s": spread(copies), "tls_s": spread(transfers), "bytes": 2 * count * nbytes}


def _transfer(certificate: Path, key: Path, count: int, nbytes: int) -> float:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, payload = listener.getsockname()[1], bytes(nbytes)
        peers = [
            subprocess.Popen(
                [sys.executable, __file__, "--peer", str(certificate), str(port), str(nbytes)], stdin=subprocess.PIPE
            )
            for _ in range(count)
        ]
        lines = [context.wrap_socket(listener.accept()[0], server_side=True) for _ in range(count)]
        for line in lines:
            line.recv(1)  # it is up

        def serve(line: ssl.SSLSocket) -> None:
            line.sendall(payload)
            _drain(line, nbytes)

        threads = [threading.Thread(target=serve, args=(line,)) for line in lines]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        for line in lines:
            line.close()
        for peer in peers:
            peer.communicate()
    return took


def _peer(certificate: str, port: int, nbytes: int) -> None:
    context = ssl.create_default_context(cafile=certificate)
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost") as line:
        payload = bytes(nbytes)
        line.sendall(b"1")
        _drain(line, nbytes)
        line.sendall(payload)


def _drain(line: ssl.SSLSocket, nbytes: int) -> None:
    room = memoryview(bytearray(1 << 20))
    while nbytes:
        got = line.recv_into(room, min(nbytes, len(room)))
        if not got:
            raise SystemExit("the line was cut")
        nbytes -= got


def seconds(begin: datetime, end: datetime) -> float:
    return (end - begin).total_seconds()


def main() -> None:
    """Runs it."""
    if sys.argv[1:2] == ["--peer"]:
        _peer(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description="A deployed round beside a plain TLS transfer of the same bytes.")
    parser.add_argument("--out", type=Path, default=Path("runs/deployed_round.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet10_small"])
    parser.add_argument("--with", dest="more", nargs="*", default=[], help="more words of the recipe")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    given = parser.parse_args()
    end_as_with_ctrl_c()
    found: dict[str, Any] = {"machine": machine(), "sites": SITES}
    folder = given.keep or Path(tempfile.mkdtemp(prefix="fedicom-round-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for model in given.models:
            found[model] = deployed(folder / model, model, given.rounds, given.more)
            found[model]["floor"] = bound = floor(folder / model, SITES, found[model]["update_bytes"])
            found[model]["round_over_tls"] = round(found[model]["round_s"]["median"] / bound["tls_s"]["median"], 2)
            print(json.dumps({model: found[model]}, indent=1))
    finally:
        if given.keep is None:
            shutil.rmtree(folder)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

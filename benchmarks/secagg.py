"""What secure aggregation costs: bytes on the wire and CPU time at a site and at the coordinator.

    python benchmarks/secagg.py --out runs/secagg.json

One thread, the median of `--repeat` measurements. Every step of the protocol is run by all sites, with signed messages
as a deployed federation sends them; only the masks of full length are made by one site (each does the same work), and
by the coordinator. Plain float32 updates are the other side of each ratio: what a site would send, and what adding them
up would cost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cryptography
import numpy as np

from common import wire
from common.exchange import (
    Agreement,
    Box,
    Dealing,
    Gathering,
    MaskedUpdate,
    Masking,
    Offer,
    Opening,
    Shares,
    Survivors,
    Update,
)
from common.fixed import FixedPoint, Residues, fewest
from common.identity import Signer
from common.secagg import Aggregator, Member, Subject
from common.weights import Weights

SUBJECT = Subject(recipe_id="a" * 64, round=1, base="b" * 64)
ABOUT: dict[str, Any] = {"recipe_id": SUBJECT.recipe_id, "round": SUBJECT.round}
ASKED: dict[str, Any] = {**ABOUT, "base": SUBJECT.base}
SIGNER = Signer.temporary()


def main() -> None:
    """Measures, writes the JSON file, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/secagg.json"))
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 30, 100])
    parser.add_argument("--numbers", type=int, nargs="+", default=[100_000, 11_000_000])
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    began = os.getloadavg()[0]
    rows = [
        measured(sites, numbers, arguments.repeat) for sites in arguments.sites for numbers in arguments.numbers
    ]  # fmt: skip
    result = {
        "rows": rows,
        "repeat": arguments.repeat,
        "load": [began, os.getloadavg()[0]],
        "versions": {
            "python": platform.python_version(), "numpy": np.__version__, "cryptography": cryptography.__version__,
        },
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))


def measured(sites: int, numbers: int, repeat: int) -> dict[str, Any]:
    """One row: so many sites, so many numbers in the update."""
    names = [f"site-{number:03d}" for number in range(sites)]
    signers = {name: Signer.temporary() for name in names}
    keys = {name: signer.public for name, signer in signers.items()}
    threshold, short = fewest(sites), np.zeros(1, np.uint32)
    point = FixedPoint(sites=sites, limit=10.0)
    delta = Weights({"w": np.random.default_rng(0).normal(0, 1e-3, numbers).astype(np.float32)})
    cpu: dict[str, float] = {}

    def member(name: str) -> Member:
        return Member(name, SUBJECT, signer=signers[name], keys=keys, sites=sites, threshold=threshold)

    cpu["site: keys"], _ = timed(lambda: member(names[0]), repeat)
    members = {name: member(name) for name in names}
    offers = {name: members[name].offer for name in names}
    server = Aggregator(SUBJECT, offers, threshold=threshold, numbers=1)
    began, dealt = time.process_time(), {}
    for name in names:
        dealt[name] = members[name].deal(offers)
    cpu["site: share out"] = (time.process_time() - began) / sites
    for name in names:
        server.deal(name, *dealt[name])
    boxes = server.boxes()

    # The last site left after it shared out: its key is opened, and its masks come off one by one.
    for name in names[:-1] if sites > 3 else names:
        server.add(name, server.session, members[name].mask(server.session, boxes[name], short))
    signatures = {name: members[name].agree(server.session, server.masked) for name in server.masked}
    for name, signature in signatures.items():
        server.sign(name, server.session, signature)
    began, opened = time.process_time(), {}
    for name in server.masked:
        opened[name] = members[name].open(server.session, server.masked, signatures)
    cpu["site: agree and open"] = (time.process_time() - began) / len(opened)
    began = time.process_time()
    for name, shares in opened.items():
        server.open(name, server.session, *shares)
    cpu["coordinator: check the shares"] = time.process_time() - began

    # The same site once more, with an update of full length.
    own = member(names[0])
    fresh = {**offers, names[0]: own.offer}
    again = {name: member(name) for name in names[1:]}
    fresh |= {name: other.offer for name, other in again.items()}
    session, _, _ = own.deal(fresh)
    to_own = {name: other.deal(fresh)[2][names[0]] for name, other in again.items()}
    to_own[names[0]] = own.deal(fresh)[2][names[0]]
    cpu["site: fixed point"], words = timed(lambda: point.encode(delta, 1), repeat)
    cpu["site: mask"], masked = timed(lambda: own.mask(session, to_own, words), repeat)
    total = np.zeros(numbers + 1, "<u4")
    cpu["coordinator: add one"], _ = timed(lambda: np.add(total, masked.words, out=total), repeat)
    server._sum = np.zeros(numbers + 1, "<u4")
    cpu["coordinator: take the masks off"], _ = timed(server.total, repeat)
    plain = np.zeros(numbers, np.float32)
    cpu["plain: add one"], _ = timed(lambda: np.add(plain, delta["w"], out=plain), repeat)
    tracemalloc.start()
    own.mask(session, to_own, words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    up, down = messages(names, offers, dealt, boxes, server, signatures, opened, masked)
    update = Update(site=names[0], **ASKED, delta=delta, weight=1.0, steps=1)
    return {
        "sites": sites,
        "numbers": numbers,
        "left": sites - len(opened),
        "threshold": threshold,
        "cpu_s": cpu,
        "bytes": {"plain update": size(update), "up": up, "down": down},
        "mask_peak_bytes": peak,
    }


def messages(
    names: list[str],
    offers: dict[str, Offer],
    dealt: dict[str, Any],
    boxes: dict[str, dict[str, Box]],
    server: Aggregator,
    signatures: dict[str, str],
    opened: dict[str, Any],
    masked: Residues,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of what one site sends and is sent, beside the plan and the scores."""
    name, session = names[0], server.session
    said: dict[str, Any] = {"site": name, **ABOUT, "session": session, "audit_head": "c" * 64}
    up = {
        "keys": size(Update(site=name, **ASKED, delta=Weights({}), weight=1.0, steps=0, offer=offers[name], norm=1.0)),
        "shares": size(Dealing(**said, seed=dealt[name][1], boxes=dealt[name][2])),
        "masked update": size(MaskedUpdate(**said, values=Residues(masked.words))),
        "signature": size(Agreement(**said, signature=signatures[name])),
        "opening": size(Shares(**said, seeds=opened[name][0], keys=opened[name][1])),
    }
    asked: dict[str, Any] = {**ASKED, "session": session}
    down = {
        "keys of all": size(Gathering(**ASKED, offers=offers)),
        "boxes": size(Masking(**asked, boxes=boxes[name])),
        "list": size(Survivors(**asked, masked=server.masked)),
        "signatures": size(Opening(**asked, masked=server.masked, signatures=signatures)),
    }
    return up, down


def size(value: Any) -> int:
    """Bytes of a signed message."""
    return len(wire.to_bytes(wire.encode(value, SIGNER)))


def timed(work: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Median CPU seconds, and the last result."""
    times, result = [], None
    for _ in range(repeat):
        began = time.process_time()
        result = work()
        times.append(time.process_time() - began)
    return median(times), result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| sites | numbers | a site sends | of it beside the update | a site is sent | site, CPU | of it the masks | "
        "a number | coordinator, CPU | a number and site |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu, up, down = row["cpu_s"], sum(row["bytes"]["up"].values()), sum(row["bytes"]["down"].values())
        site = sum(seconds for name, seconds in cpu.items() if name.startswith("site"))
        server = sum(seconds for name, seconds in cpu.items() if name.startswith("coordinator"))
        server += cpu["coordinator: add one"] * (row["sites"] - row["left"] - 1)
        numbers, sites = row["numbers"], row["sites"]
        beside = up - row["bytes"]["plain update"]
        lines.append(
            f"| {sites} | {numbers / 1e6:g} M | {up / 1e6:.2f} MB ({up / row['bytes']['plain update']:.3f}x plain) | "
            f"{beside / 1e3:.1f} kB | {down / 1e3:.1f} kB | {site:.3f} s | {cpu['site: mask']:.3f} s | "
            f"{1e9 * site / numbers:.1f} ns | {server:.3f} s | {1e9 * server / numbers / sites:.2f} ns |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

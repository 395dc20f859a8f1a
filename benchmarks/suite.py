"""Runs the benchmarks and writes docs/benchmarks.md with a table and a plot each.

    make bench                                            # all, under half an hour on two quiet cores
    python benchmarks/suite.py --only parts               # one of them
    python benchmarks/suite.py --render                   # the page alone, from the numbers of earlier runs

Every part leaves its JSON in runs/bench/; what the page was made of is kept in docs/benchmarks.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from measure import ROOT
from scaling_plot import drawn

OUT = ROOT / "runs" / "bench"
KEPT = ROOT / "docs" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"
COST = ROOT / "docs" / "scaling.svg"
SUITE = {
    "simulation": ("simulation.py", "--repeats", "5"),
    "parts": ("parts.py", "--turns", "5"),
    "scale": ("scale.py",),
    "abreast": ("abreast.py",),
    "deployed": ("deployed_round.py", "--models", "resnet18"),
}
NOT_HERE = """
## What has no number here

- Anything on a GPU, unless it is above: no card was at hand. `python benchmarks/gpu.py` measures the steps where there
  is one, and `python benchmarks/abreast.py --device cuda` many small sites.
- Elsewhere: what the 8-bit file loses on real images ([results.md](results.md#the-8-bit-file-on-real-images)), private
  steps ([results.md](results.md#what-a-private-step-costs)), cost by sites, parameters and images
  ([scaling.md](scaling.md)).
- Under privacy, secure aggregation or compression a checkpoint stays on the way of a round: a site must never be asked
  for the next round before this one is safe, or a crash makes it train, and pay, twice. Elsewhere it is written while
  the next round is under way.
"""
HEAD = """# Benchmarks

Made by `make bench` (benchmarks/suite.py); do not edit. Every number is a ratio between two things on one machine,
taken in turns: the median, and in brackets the smallest and the largest. Speed is judged by these ratios, never by a
timed test.
"""


def main() -> None:
    """Runs what is asked for, then renders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUITE), default=list(SUITE))
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in () if arguments.render else arguments.only:
        file = OUT / f"{name}.json"
        script, *words = SUITE[name]
        command = [sys.executable, str(ROOT / "benchmarks" / script), *words, "--out", str(file)]
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
            sys.exit(f"{name} failed")
        found[name] = json.loads(file.read_text())
    for name in ("peers", "gpu", "abreast_gpu"):  # of `make bench-peers`, and of gpu.py where there is a card
        if (OUT / f"{name}.json").exists():
            found[name] = json.loads((OUT / f"{name}.json").read_text())
    KEPT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    found = json.loads(KEPT.read_text())  # sorted: the same page and plots from a run as from --render
    PLOTS.mkdir(exist_ok=True)
    PAGE.write_text(HEAD + "".join(f"\n{RENDER[name](found[name])}" for name in RENDER if name in found) + NOT_HERE)
    print(PAGE.read_text())


def simulation(found: Mapping[str, Any]) -> str:
    """Whole simulations against the raw loop."""
    lines = []
    for row in found["rows"]:
        lines.append(
            (
                f"{row['model']}, {row['workers']} worker{'s' if row['workers'] > 1 else ''}",
                _spread(row["wall_s"]["raw"]), _spread(row["wall_s"]["fedicom"]), _spread(row["wall_s"]["ratio"]),
                _spread(row["later_round_s"]["ratio"]),
                f"{row['start_s']['fedicom']['median'] - found['import_torch_s']['median']:.1f}",
                f"{row['peak_mb']['raw']:.0f}, {row['peak_mb']['fedicom']:.0f}", f"{row['peak_mb']['ratio']:.2f}",
            )
        )  # fmt: skip
    heads = (
        "5 rounds, 8 sites x 200 images", "raw loop, s", "Fedicom, s", "whole process", "a later round",
        "start beyond `import torch`, s", "peak MB (raw, ours)", "ratio",
    )  # fmt: skip
    later = {(row["model"], row["workers"]): row["later_round_s"] for row in found["rows"]}
    shared = ", ".join(
        f"{model} {later[model, 1][by]['median'] / later[model, 2][by]['median']:.2f}x ({by})"
        for model in dict.fromkeys(row["model"] for row in found["rows"])
        for by in ("fedicom", "raw")
        if {(model, 1), (model, 2)} <= later.keys()
    )
    _bars(
        "simulation",
        "A later round over the raw loop's (red: target, one worker)",
        {line[0]: row["later_round_s"]["ratio"] for line, row in zip(lines, found["rows"], strict=True)},
        1.02,
    )
    return (
        "## A simulated federation against the raw PyTorch loop\n\n"
        "Both do the same SGD steps and end with the same weights, bit for bit (the benchmark fails otherwise): "
        "benchmarks/raw_loop.py has nothing of Fedicom in it, and neither messages, checks, logs nor checkpoints. The "
        "raw loop imports torch alone, whose optimiser imports torch's compiler in the first round; Fedicom also "
        "imports Flower and the library of its network, and no compiler. Fedicom's bookkeeping for one site (hashes, "
        "log) runs beside the training of the next one, on the other core. What follows the last round "
        f"(export, report) takes another {found['conclusion_s']:.1f} s. Targets: 1.02 with one worker, 1.05 with two, "
        f"start 1 s, memory 1.2. Two workers against one, target 1.6x: {shared}.\n\n"
        f"{_where(found)}\n\n{_table(heads, lines)}\n\n![Rounds](benchmarks/simulation.svg)\n"
    )


def parts(found: Mapping[str, Any]) -> str:
    """Each part against the least that it could cost."""
    lines: list[tuple[str, ...]] = []
    ratios: dict[str, Mapping[str, float]] = {}
    if "help" in found:
        part = found["help"]
        lines.append(("`fedicom --help`", "`python -c pass`", f"+{_spread(part['difference_s'])} s", "+0.3 s"))
    if "start" in found:
        part = found["start"]
        lines.append(("import of the simulation", "`import torch`", f"+{_spread(part['difference_s'])} s", "+1 s"))
    if "aggregation" in found:
        part = found["aggregation"]
        ratios["aggregation"] = part["ratio"]
        lines.append(("mean of 100 sites x 45 MB", "one `add_` a site", f"{_spread(part['ratio'])}x", "2x"))
        lines.append(("the same, memory", "one model", f"{part['peak_models']:.1f} models and the one in hand", "3"))
    if "checkpoint" in found:
        part = found["checkpoint"]
        ratios["checkpoint"] = part["ratio"]
        lines.append(("durable checkpoint, 45 MB", "write and fsync", f"{_spread(part['ratio'])}x", "1.2x"))
    if "input" in found:
        part = found["input"]
        ratios["input"] = {name: 1 / value for name, value in part["ratio"].items()}
        lines.append(("small images, drawn", "a batch that is there", f"{_spread(part['ratio'])}x speed", "0.95x"))
    for name, row in found.get("inference", {}).items():
        lines.append((f"ONNX, {name}", "torch eager", f"{_spread(row['speed_against_eager'])}x speed", "1.5x"))
        if "int8_against_float32" in row:
            lines.append((f"ONNX int8, {name}", "ONNX", f"{_spread(row['int8_against_float32'])}x speed", "2x speed"))
        if "speed_against_compile" in row:
            lines.append((f"ONNX, {name}", "torch.compile", f"{_spread(row['speed_against_compile'])}x speed", ""))
    _bars("parts", "Time of a part over the least that it could take", ratios, 1.0)
    return (
        f"## Parts of a round\n\nOne thread. {_where(found)}\n\n"
        f"{_table(('part', 'against', 'measured', 'target'), lines)}\n\n![Parts](benchmarks/parts.svg)\n"
    )


def scale(found: Mapping[str, Any]) -> str:
    """Many tiny sites."""
    lines = [
        (
            f"{row['sites']:,}", f"{row['asked']:,}", f"{row['wall_s']['fedicom']['median']:.1f}",
            *(_spread(row[key]) for key in ("training_ms", "beside_ms", "hello_ms", "closing_ms", "beside_cpu_ms")),
            f"{row['peak_mb']['raw']['median']:.0f}, {row['peak_mb']['fedicom']['median']:.0f}",
        )
        for row in found["rows"]
    ]  # fmt: skip
    heads = (
        "sites", "asked a round", "whole run, s", "raw loop, ms a visit", "beside it, ms a visit",
        "introduction, ms a site", "closing evaluation, ms a site", "CPU beside training, ms a question",
        "peak MB (raw, ours)",
    )  # fmt: skip
    COST.write_text(drawn(found["rows"]))
    return (
        "## Many tiny sites\n\n20 images a site, 3 rounds, a tenth of the sites asked in each, every visit with its "
        "signed logs on disk; all sites introduce themselves once (key, log and folder are made then) and are asked "
        "for the closing evaluation. The raw loop does the same steps for the same sites, and ends with the same "
        "weights, bit for bit. Beside it: a visit of a later round less one of the raw loop. Target: 1 ms. "
        f"{_where(found)}\n\n{_table(heads, lines)}\n\n![Cost by the number of sites]({COST.name})\n"
    )


def abreast(found: Mapping[str, Any]) -> str:
    """Many small sites in one vectorised pass."""
    lines = [
        (
            row["case"], *(_spread(row["visit_ms"][name]) for name in ("one", "abreast")), _spread(row["pass_faster"]),
            _spread(row["faster"]), f"{row['peak_mb']['one']['median']:.0f}, {row['peak_mb']['abreast']['median']:.0f}",
        )
        for row in found["rows"]
    ]  # fmt: skip
    heads = (
        "network", "one after another, ms a visit", "abreast asked for, ms a visit", "speed in the trial",
        "speed of a whole round", "peak MB",
    )  # fmt: skip
    return (
        f"## Many small sites abreast{', on a GPU' if found['device'] == 'cuda' else ''}\n\n"
        f"{found['sites']} sites of 40 images, a patient each; `simulation.abreast={found['width']}` trains so many in "
        "one vectorised pass where a trial at the start finds that 1.2 times as fast, and one after another where not. "
        "Whole rounds, with messages, checks, signed logs and checkpoint. Both end at the same weights but for "
        f"rounding (a thousandth of the way at most, else the benchmark fails). Target: 2. {_where(found)}\n\n"
        f"{_table(heads, lines)}\n"
    )


def deployed(found: Mapping[str, Any]) -> str:
    """A round between real processes."""
    row = found["resnet18"]
    bound = row["floor"]
    lines = [
        ("a round", _spread(row["round_s"])),
        *((f"of it: {name}", _spread(part)) for name, part in row["parts_s"].items()),
        ("TLS 1.3 of the same bytes, plain threads", _spread(bound["tls_s"])),
        ("a copy of the same bytes in memory", _spread(bound["copy_s"])),
    ]
    _bars("deployed", "Seconds of a deployed round (red: the target)", {"round": row["round_s"], **row["parts_s"]}, 1.0)
    busy = [(name, f"{seconds:.2f}") for name, seconds in row["processor_s_a_round"].items()]
    return (
        "## A deployed round\n\n"
        f"Coordinator, gateway, SuperLink and {found['sites']} sites as processes of one machine, with TLS and node "
        f"authentication: a model of {row['update_bytes'] / 1e6:.0f} MB to every site and an update back from each, "
        "one training step, a durable checkpoint, and kept replies on disk. A round takes "
        f"{row['round_over_tls']:.1f} times the plain transfer. Target: 1 s. What it takes is processor time, and all "
        f"processes share the cores: {row['busy_cores']:.1f} are busy. {_where(found)}\n\n"
        f"{_table(('', 's'), lines)}\n\n{_table(('processes', 'processor s a round'), busy)}\n\n"
        "![Seconds of a deployed round](benchmarks/deployed.svg)\n"
    )


def peers(found: Mapping[str, Any]) -> str:
    """The same federation through the peers."""
    lines: list[tuple[str, ...]] = []
    ratios: dict[str, Mapping[str, float]] = {}
    for row in found["rows"]:
        for name, wall in row["wall_s"].items():
            slower = row["slower_than_fedicom"].get(name)
            against = _spread(slower["1"]) if slower else ""
            rounds = _spread(row["rounds_s"][name])
            later = f"{row['later_round_s'][name]['median']:.2f}"
            lines.append((row["model"], found["names"].get(name, name), _spread(wall), against, rounds, later))
            if slower:
                ratios[f"{name}, {row['model']}"] = slower["1"]
    heads = (
        "network", "by", "whole process, s", "times Fedicom's with one worker", "its 5 rounds, s", "a later round, s",
    )  # fmt: skip
    once = all(part["min"] == part["max"] for row in found["rows"] for part in row["wall_s"].values())
    single = "One run of each. " if once else "NVFLARE, which takes minutes, ran once. "
    _bars("peers", "Whole process over Fedicom's with one worker", ratios, 1.0)
    return (
        "## The same federation through the peers\n\n"
        "Made by `make bench-peers`. 8 sites x 200 images, 5 rounds; every peer trains with the code of raw_loop.py, "
        "and ends at its parameters within a hundredth of the way (a site left out of one round: a twentieth). Target: "
        "faster than each (above 1). "
        f"{single}"
        f"{_where(found)}\n\n"
        f"{_table(heads, lines)}\n\n![Peers](benchmarks/peers.svg)\n{_tiny(found)}"
    )


def _tiny(found: Mapping[str, Any]) -> str:
    rows = found.get("tiny", [])
    if not rows:
        return ""
    names = {"raw": "raw loop", "fedicom": "Fedicom", "pfl": found["names"]["pfl"]}
    lines = [
        (
            f"{row['sites']:,}", f"{row['asked']:,}", shown, _spread(row["wall_s"][name]),
            _spread(row["visit_ms"][name]),
        )
        for row in rows
        for name, shown in names.items()
    ]  # fmt: skip
    heads = "sites", "asked a round", "by", "whole process, s", "a visit in a later round, ms"
    slower = ", ".join(f"{_spread(row['slower_than_fedicom'])} with {row['sites']:,}" for row in rows)
    return (
        "\nThe many tiny sites through pfl, which asks nobody who it is, keeps no log and no checkpoint, and evaluates "
        f"nothing at the end. A later round takes it {slower} sites of Fedicom's time (above 1: slower).\n\n"
        f"{_table(heads, lines)}\n"
    )


def gpu(found: Mapping[str, Any]) -> str:
    """Steps on a card."""
    lines = [
        (
            f"{name}, batch {row['batch']}", *(_spread(row["step_ms"][way]) for way in ("plain", "fedicom", "private")),
            *(_spread(row[key]) for key in ("against_plain", "against_compiled", "private_against_plain")),
        )
        for name, row in found["rows"].items()
    ]  # fmt: skip
    heads = (
        "network", "plain step, ms", "Fedicom's", "a private one", "against plain", "against torch.compile",
        "private against plain",
    )  # fmt: skip
    return (
        "## Steps on a GPU\n\nMade by `python benchmarks/gpu.py --out runs/bench/gpu.json`. bfloat16, channels last; "
        "the private step is held against a plain one of the same network with group norm. Targets: 1.03, private 1.2. "
        f"{found['card']}. {_where(found)}\n\n{_table(heads, lines)}\n"
    )


RENDER: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "simulation": simulation,
    "parts": parts,
    "scale": scale,
    "abreast": abreast,
    "deployed": deployed,
    "peers": peers,
    "gpu": gpu,
    "abreast_gpu": abreast,
}


def _where(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    return (
        f"{machine['date']}, {machine['cores']} cores of {machine['cpu']}, load before {machine['load']:.1f}, "
        f"torch {machine['torch']}, flwr {machine['flwr']}."
    )


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}-{values['max']:.2f})"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _figure() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "fedicom", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def _bars(name: str, title: str, values: Mapping[str, Mapping[str, float]], line: float) -> None:
    pyplot = _figure()
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.4 * len(values)))
    names = list(values)
    middle = [values[key]["median"] for key in names]
    ends = [
        [max(0.0, m - min(values[key].values())) for key, m in zip(names, middle, strict=True)],
        [max(0.0, max(values[key].values()) - m) for key, m in zip(names, middle, strict=True)],
    ]
    axes.barh(names, middle, xerr=ends, color="#4477aa")
    axes.axvline(line, color="#cc3311", linewidth=1)
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    _save(pyplot, figure, name)


def _save(pyplot: Any, figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()

"""Alert rules and dashboard name metrics that the code gives, with the labels that it gives them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.machine import Card
from client.node import families as site_families
from common.deployment import FederationPlan, ServerHome
from common.prometheus import Family, exposition
from server.api import families as server_families
from server.control import Control, deployed
from server.provision import provision
from server.runs import Order, Run, utc_now

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())
DASHBOARD = json.loads((MONITORING / "fedicom.json").read_text())
PROMTOOL = shutil.which("promtool")
METRIC = re.compile(r"\bfedicom_[a-z_]+\b")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")

STATUS = {
    "site": "north",
    "connected": True,
    "disk_free": 5_000_000_000,
    "warnings": 0,
    "children": {"supernode": 11, "runner": None},
    "updates": 3,
    "evaluations": 1,
    "refusals": 2,
    "bytes_sent": 4096,
    "busy_s": 12.5,
    "last_visit_s": 4.5,
    "round": 3,
    "last_contact": "2026-01-02T03:04:05+00:00",
    "epsilon": {"spent": 2.5, "cap": 8.0, "delta": 1e-5},
}
"""`run/status.json` of a node, and what is added to it, with every field that becomes a metric."""
CARD = Card(number=0, name="a card", driver="1", used=1 << 30, total=2 << 30, utilisation=0.5)
RUN_STATUS = {
    "state": "training",
    "round": 2,
    "rounds": 5,
    "eta_s": 30.0,
    "round_began": 1_700_000_000.5,
    "last_round": {"seconds": 9.5, "validation": 0.75},
    "admitted": 6,
    "refused": 1,
    "sites": {"north": {"epsilon": 2.5, "seconds": 4.0}},
}
GATEWAY_STATS = {
    "requests": {"north": {"200": 12}},
    "bytes_in": {"north": 4096},
    "bytes_out": {"north": 8192},
    "refused": {"unknown key": 3},
    "open_connections": 2,
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, list[Family]]:
    """What a coordinator and a node with something to tell show: side -> families."""
    out = tmp_path_factory.mktemp("kits") / "kits"
    provision(FederationPlan(name="study", host="fl.example.org", sites=("north", "south")), out)
    home = ServerHome(out / "coordinator")
    control = Control(home, deployed())
    run = Run(home, "first")
    run.path.mkdir(parents=True)
    run.write_order(Order(run="first", recipe_id="0" * 64, wanted="running", submitted=utc_now(), by="eve"))
    run.settle(**RUN_STATUS)
    home.gateway_stats.parent.mkdir(exist_ok=True)
    home.gateway_stats.write_text(json.dumps(GATEWAY_STATS))
    # Nothing is started here, so what tells of processes and connections needs a sample by hand.
    by_hand = {"fedicom_child_up": {"child": "gateway"}, "fedicom_site_online": {"site": "north"}}
    server = [
        replace(family, samples=[(by_hand[family.name], 1.0)]) if family.name in by_hand else family
        for family in server_families(control)
    ]
    return {"server": server, "site": site_families(STATUS, (CARD,))}


def labels_of(shown: dict[str, list[Family]]) -> dict[str, set[str]]:
    return {
        family.name: {label for labels, _ in family.samples for label in labels}
        for families in shown.values()
        for family in families
    }


def alerts() -> Iterator[dict[str, Any]]:
    for group in RULES["groups"]:
        yield from group["rules"]


def panels() -> list[dict[str, Any]]:
    return list(DASHBOARD["panels"])


def targets() -> Iterator[tuple[str, dict[str, Any]]]:
    """(title of the panel, query)."""
    for panel in panels():
        for target in panel.get("targets", []):
            yield panel["title"], target


def expressions() -> list[tuple[str, str]]:
    """(where, expression) of every alert and every panel, the dashboard's variables filled in."""
    found = [(rule["alert"], rule["expr"]) for rule in alerts()]
    for title, target in targets():
        expr = target["expr"].replace("$__rate_interval", "1m")
        found.append((title, re.sub(r"\$(run|site)\b", ".*", expr)))
    return found


def test_every_metric_has_a_value_in_the_examples(shown):
    empty = [family.name for families in shown.values() for family in families if not family.samples]
    assert empty == []


def test_alerts_and_dashboard_name_only_metrics_that_exist(shown):
    known = set(labels_of(shown))
    used = {name for _, expression in expressions() for name in METRIC.findall(expression)}
    assert len(used) > 25
    assert used <= known


def test_every_metric_is_on_the_dashboard(shown):
    drawn = {name for _, target in targets() for name in METRIC.findall(target["expr"])}
    assert set(labels_of(shown)) - drawn == set()


def test_labels_in_expressions_and_texts_are_those_of_the_metrics(shown):
    labels = labels_of(shown)
    for where, expression in expressions():
        for name, inside in re.findall(r"\b(fedicom_[a-z_]+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]", inside)) <= labels[name], where
    for title, target in targets():
        given = set().union(*(labels[name] for name in METRIC.findall(target["expr"])))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= given, title
    for rule in alerts():
        given = set().union(*(labels[name] for name in METRIC.findall(rule["expr"])), {"job", "instance"})
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= given, rule["alert"]


@pytest.mark.parametrize("said", ["rounds", "seconds", "bytes", "epsilon_left", "gpu_utilisation", "gpu_memory"])
def test_what_a_person_asks_first_is_on_the_dashboard(said):
    assert any(f"_{said}" in target["expr"] for _, target in targets())


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    found = list(alerts())
    assert len({rule["alert"] for rule in found}) == len(found)
    for rule in found:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "action"}


def test_reasons_of_refusal_in_an_alert_are_the_gateways_own():
    gateway = "".join(
        (ROOT / "server" / name).read_text() for name in ("gateway.py", "gateway_beside.py", "gateway_rules.py")
    )
    (strangers,) = (rule for rule in alerts() if rule["alert"] == "GatewayRefusesStrangers")
    for why in re.search(r'why=~"([^"]+)"', strangers["expr"])[1].split("|"):
        assert f'"{why}"' in gateway, why


def test_commands_in_the_alerts_exist():
    verbs = {"site": ROOT / "client" / "cli.py", "server": ROOT / "server" / "cli.py"}
    named = re.findall(r"`fedicom (site|server) (\w+)", (MONITORING / "rules.yaml").read_text())
    assert named
    for side, verb in named:
        assert f'    "{verb}": ' in verbs[side].read_text(), verb


def test_the_dashboard_is_whole():
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    cells = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & mine, panel["title"]
        cells |= mine
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*variables, "__rate_interval"}
    assert "password" not in json.dumps(DASHBOARD).lower()


def test_prometheus_asks_loopback_alone_at_the_ports_that_the_charts_name():
    plain = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    asked = {job["job_name"]: job["static_configs"][0]["targets"] for job in plain["scrape_configs"]}
    assert asked == {"fedicom-site": ["127.0.0.1:9464"], "fedicom-coordinator": ["127.0.0.1:9465"]}
    for side, template in (("site", "node"), ("coordinator", "coordinator")):
        chart = ROOT / "deploy" / "helm" / f"fedicom-{side}"
        (target,) = asked[f"fedicom-{side}"]
        assert f'targets: ["{target}"]' in (chart / "templates" / f"{template}.yaml").read_text()
        port = target.rpartition(":")[2]
        assert f"_port: {port}" in (chart / "values.yaml").read_text()


@needs_promtool
def test_promtool_accepts_configuration_and_rules():
    # `check config` reads the rules as well.
    done = subprocess.run(
        [PROMTOOL, "check", "config", "--lint=all", "--lint-fatal", str(MONITORING / "prometheus.yml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(list(alerts()))} rules found" in done.stdout


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then():
    file = Path(__file__).with_name("rules_test.yaml")
    done = subprocess.run([PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [test for world in yaml.safe_load(file.read_text())["tests"] for test in world["alert_rule_test"]]
    fired = {test["alertname"] for test in tests if test.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in alerts()}


@needs_promtool
def test_promtool_reads_every_expression_of_the_dashboard(tmp_path):
    rules = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(expressions())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    command = [PROMTOOL, "check", "rules", "--lint=none", str(tmp_path / "rules.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("side", ["server", "site"])
def test_promtool_accepts_the_metrics_of_both_sides(shown, side):
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=exposition(shown[side]), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()

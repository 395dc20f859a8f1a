"""The Helm charts: what they render to, held against Kubernetes' own schemas and against what they promise.

`helm` itself is rarely at hand, so the few constructs that the charts use are rendered here; a construct that is not
known fails. Where Helm's engine is installed (`helm`, or the package helm-python-sdk), both must agree.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHARTS = {chart.parent.name: chart.parent for chart in sorted((ROOT / "deploy" / "helm").glob("*/Chart.yaml"))}
OTHER = {
    "image": "registry.example.org/other:1.2.3",
    "siteYaml": 'site: "north"\ndata: /data\n',
    "serverYaml": "control_port: 9465\n",
    "data": {"claim": "images", "groups": [5000]},
    "gateway": {"cidr": "198.51.100.7/32", "port": 443},
    "dns": {"enabled": False},
    "hostAliases": [{"ip": "198.51.100.7", "hostnames": ["gateway.example.org"]}],
    "sites": {"cidrs": ["198.51.100.0/24", "203.0.113.0/24"]},
    "service": {"type": "ClusterIP", "port": 443},
    "gpu": 1,
    "monitoring": {"enabled": True},
}
"""The other side of every choice that the charts offer."""
KUBERNETES = ("1.28", "1.37")


class UnknownConstructError(Exception):
    """A template holds what this renderer cannot do; teach it, or keep the template plain."""


def render(text: str, values: Mapping[str, Any]) -> str:
    """What Helm makes of a template that uses toJson, sha256sum, if, ne, range and end alone."""
    pieces = re.split(r"\s*\{\{-\s*(.*?)\s*\}\}|\{\{\s*(.*?)\s*\}\}", text, flags=re.DOTALL)
    if any("{{" in piece or "}}" in piece for piece in pieces[::3] if piece):
        raise UnknownConstructError("a brace that is not closed")
    # Plain text and actions in turn, one of the two groups of each action is None.
    tokens: list[tuple[bool, str]] = []
    for at in range(0, len(pieces), 3):
        tokens.append((False, pieces[at] or ""))
        if at + 2 < len(pieces):
            tokens.append((True, pieces[at + 1] if pieces[at + 1] is not None else pieces[at + 2]))
    lines: list[str] = []
    if _block(tokens, 0, values, None, lines) != len(tokens):
        raise UnknownConstructError("an end too many")
    return "".join(lines)


def _block(tokens: list[tuple[bool, str]], at: int, values: Mapping[str, Any], dot: Any, out: list[str] | None) -> int:
    """Renders up to the block's end, into nothing when `out` is None; returns the place of that end."""
    while at < len(tokens):
        is_action, text = tokens[at]
        if not is_action:
            if out is not None:
                out.append(text)
        elif text == "end":
            return at
        elif found := re.fullmatch(r'(if|range) (?:(ne) )?(\.[\w.]*)(?: "([^"]*)")?', text):
            word, ne, path, literal = found.groups()
            if (ne is None) != (literal is None) or (word == "range" and ne is not None):
                raise UnknownConstructError(text)
            value = _value(path, values, dot)
            turns = (value if word == "range" else [dot] if (value != literal if ne else value) else []) or []
            for turn in turns if out is not None else []:
                _block(tokens, at + 1, values, turn, out)
            at = _block(tokens, at + 1, values, dot, None)
            if at == len(tokens):
                raise UnknownConstructError(f"{text}: no end")
        elif found := re.fullmatch(r"(toJson|sha256sum) (\.[\w.]*)", text):
            if out is not None:
                value = _value(found[2], values, dot)
                plain = json.dumps(value, sort_keys=True, separators=(",", ":"))
                out.append(plain if found[1] == "toJson" else hashlib.sha256(value.encode()).hexdigest())
        else:
            raise UnknownConstructError(text)
        at += 1
    return at


def _value(path: str, values: Mapping[str, Any], dot: Any) -> Any:
    if path == ".":
        return dot
    top, _, rest = path[1:].partition(".")
    if top != "Values":
        raise UnknownConstructError(path)
    value: Any = values
    for name in rest.split("."):
        value = value[name]  # Helm takes a missing value for nothing; here it is an error
    return value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm lays values over the chart's own; what the chart does not know is left out."""
    return {
        name: merged(value, over[name]) if isinstance(value, dict) and name in over else over.get(name, value)
        for name, value in base.items()
    }


def documents(chart: str, over: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = merged(yaml.safe_load((CHARTS[chart] / "values.yaml").read_text()), over)
    texts = [render(path.read_text(), values) for path in sorted((CHARTS[chart] / "templates").glob("*.yaml"))]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def one(chart: str, kind: str, over: Mapping[str, Any]) -> dict[str, Any]:
    (found,) = (document for document in documents(chart, over) if document["kind"] == kind)
    return found


def containers(pod: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from (*pod.get("initContainers", ()), *pod["containers"])


both_values = pytest.mark.parametrize("over", [{}, OTHER], ids=["as shipped", "other values"])
both_charts = pytest.mark.parametrize("chart", CHARTS)


def test_there_are_two_charts():
    assert sorted(CHARTS) == ["fedicom-coordinator", "fedicom-site"]


@pytest.mark.parametrize(
    "text",
    [
        "{{ .Values.a }}",
        '{{ include "x" . }}',
        "{{ toJson .Release.Name }}",
        "{{ if .Values.a }}x",
        "{{ toJson .Values.a",
        "{{ end }}",
        "{{- if and .Values.a .Values.b }}x{{ end }}",
        '{{ range .Values.a "b" }}{{ end }}',
        "{{- toJson .Values.a -}}",
    ],
)
def test_a_construct_that_is_not_known_is_an_error_and_not_left_out(text):
    with pytest.raises(UnknownConstructError):
        render(text, {"a": "1", "b": "2"})


def test_the_renderer_trims_loops_and_chooses_as_helm_does():
    text = "a:\n{{- range .Values.many }}\n  - {{ toJson . }}\n{{- end }}\n{{- if .Values.no }}\nb: 1\n{{- end }}\n"
    text += '{{- if ne .Values.kind "x" }}\nc: "{{ sha256sum .Values.kind }}"\n{{- end }}\n'
    shown = render(text, {"many": [1, "two"], "no": 0, "kind": "abc"})
    # sha256 of "abc": FIPS 180-2, appendix B.1
    assert shown == 'a:\n  - 1\n  - "two"\nc: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"\n'


@both_charts
@both_values
def test_helms_own_engine_renders_the_same(chart, over, tmp_path):
    if shutil.which("helm"):
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(over))
        command = ["helm", "template", "x", str(CHARTS[chart]), "--values", str(tmp_path / "values.yaml")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        theirs = [done.stdout]
    elif find_spec("helm_python") is not None:
        import helm_python

        assert helm_python.lint(str(CHARTS[chart]))["errors"] == []
        with helm_python.Chart.load(CHARTS[chart]) as loaded:
            theirs = list(loaded.render(values=dict(over), name="x").values())
    else:
        pytest.skip("neither helm nor helm-python-sdk is installed; the templates are rendered by this file alone")
    found = [document for text in theirs for document in yaml.safe_load_all(text) if document]

    def by_name(document):
        return document["kind"], document["metadata"]["name"]

    assert sorted(found, key=by_name) == sorted(documents(chart, over), key=by_name)


@both_charts
@both_values
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_document_follows_the_schema_of_kubernetes(chart, over, version):
    found = documents(chart, over)
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)
    assert {"StatefulSet", "ConfigMap", "NetworkPolicy"} <= {document["kind"] for document in found}
    names = [(document["kind"], document["metadata"]["name"]) for document in found]
    assert len(names) == len(set(names))


def test_the_schema_finds_a_misspelt_field():
    document = one("fedicom-site", "StatefulSet", {})
    document["spec"]["template"]["spec"]["securityContext"]["runAsNonroot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)


@both_charts
@both_values
def test_no_container_has_root_a_writable_system_or_a_capability(chart, over):
    pod = one(chart, "StatefulSet", over)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["runAsGroup"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # With "Always" the kubelet would open the home's keys to a group, and they would be refused.
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not any("hostPath" in volume for volume in pod["volumes"])
    for container in containers(pod):
        context = container["securityContext"]
        assert context.get("runAsUser", 10001) > 0
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert re.search(r":v?\d+\.\d+\.\d+$", container["image"])


@both_charts
@both_values
def test_every_mount_has_its_volume_and_every_volume_is_mounted(chart, over):
    pod = one(chart, "StatefulSet", over)["spec"]["template"]["spec"]
    mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert mounted <= volumes
    assert volumes - mounted <= {"series", "configuration"}  # of what is switched off
    data = [mount for container in containers(pod) for mount in container["volumeMounts"] if mount["name"] == "data"]
    assert all(mount == {"name": "data", "mountPath": "/data", "readOnly": True} for mount in data)


def test_a_site_calls_the_gateway_and_the_name_server_and_nothing_calls_it():
    policy = one("fedicom-site", "NetworkPolicy", {})["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy
    gateway, dns = policy["egress"]
    assert gateway == {
        "to": [{"ipBlock": {"cidr": "192.0.2.10/32"}}],
        "ports": [{"protocol": "TCP", "port": 8443}],
    }
    assert {port["port"] for port in dns["ports"]} == {53}


def test_a_site_without_dns_calls_the_gateway_alone():
    policy = one("fedicom-site", "NetworkPolicy", {"dns": {"enabled": False}})["spec"]
    assert [rule["to"] for rule in policy["egress"]] == [[{"ipBlock": {"cidr": "192.0.2.10/32"}}]]


def test_a_watched_site_opens_one_port_to_one_namespace():
    (rule,) = one("fedicom-site", "NetworkPolicy", {"monitoring": {"enabled": True}})["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert rule["ports"] == [{"protocol": "TCP", "port": 9090}]


def test_the_coordinator_is_called_at_the_gateway_by_the_sites_and_calls_nobody():
    policy = one("fedicom-coordinator", "NetworkPolicy", {})["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert policy["ingress"] == [
        {"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"protocol": "TCP", "port": 8443}]}
    ]
    service = one("fedicom-coordinator", "Service", {})["spec"]
    assert [port["targetPort"] for port in service["ports"]] == [8443]
    assert service["externalTrafficPolicy"] == "Local"


@both_charts
def test_policy_service_and_pod_mean_the_same_pod(chart):
    labels = one(chart, "StatefulSet", {})["spec"]["template"]["metadata"]["labels"]
    assert one(chart, "NetworkPolicy", {})["spec"]["podSelector"]["matchLabels"] == labels
    if chart == "fedicom-coordinator":
        assert one(chart, "Service", {})["spec"]["selector"] == labels


@both_charts
def test_a_changed_configuration_starts_the_pod_again(chart):
    def annotation(text):
        over = {"siteYaml": text, "serverYaml": text}
        return one(chart, "StatefulSet", over)["spec"]["template"]["metadata"]["annotations"]

    assert annotation("a: 1\n") == annotation("a: 1\n") != annotation("a: 2\n")

"""What is in each kit: keys, certificates, configuration, and the page that its people read."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping

from common.deployment import FederationPlan
from common.enrolment import site_yaml
from common.identity import Certificate, NodeKey
from common.kit import COHORT, NODE, SIGNING
from server.certificates import LOOPBACK, CertificateAuthority
from server.tokens import new_token, token_table

EXAMPLE = """\
# Who takes part. `fedicom provision federation.yaml --out kits/` makes the keys and one kit for each.
name: chest-xray-study        # of the federation
host: fl.example.org          # DNS name or IP address at which the sites reach the coordinator's gateway
port: 8443
also_hosts: []                # other names and addresses of the gateway; none can be added later
sites: [north, south, west]   # a site that makes its own keys is left out here and added later
auditors: [anna]              # people who may read the coordinator's status and logs, and run nothing
valid_days: 397               # of the gateway's certificate; renewed with `fedicom provision rotate gateway`
"""

SERVER_YAML = """\
# The coordinator of federation {federation}. Start it with `fedicom server start` in this folder.

# The federation's name: as in the registry, not to be changed.
federation: {federation}
# Address and port of the gateway, the only one that is open; 0.0.0.0 is every network of this machine.
listen: {listen}
port: {port}

superlink_port: null        # port of Flower's SuperLink on 127.0.0.1; null takes a free one
control_port: null          # port on 127.0.0.1 of `fedicom server run`, `stop` ... and of Prometheus
test_data: null             # the coordinator's own labelled images, which no site holds; null: no central evaluation
device: auto                # auto, cpu or cuda
int8: false                 # also write model.int8.onnx, where it is twice as fast and as good on test_data
checkpoint_key: null        # key file (`fedicom provision key FILE`) that encrypts checkpoints; null leaves them plain
cache: {{}}                   # prepared test images: `key: FILE` encrypts them, `storage: float16` halves them
gateway: {{}}                 # limits of the gateway that differ from its defaults
blobs: true                 # weights travel beside the messages; false where what stands for the gateway cannot
"""

SITE = """\
# {site}: your hospital's node in the federation "{federation}"

This folder makes one computer in your hospital a node of a federated study. The model comes to the images: your
computer fetches it from the coordinator, trains on your patients, and sends back a change of the model that is
clipped and noised as your policy demands. Images, reports and names stay where they are.

## Firewall

| from | to | protocol | rule |
|---|---|---|---|
| this computer | {host}, port {port} | TCP, TLS 1.3 | allow, outbound |
| anywhere | this computer | all | nothing has to be opened inbound |

The node runs as a normal user, without root. With a proxy in between, set `proxy` in site.yaml.

## First steps

1. Compare this key of the federation's authority with the coordinator, by telephone and not by mail:
   `{authority}`
2. Keep the folder on an encrypted disk and for one user (mode 0700). `keys/` is private{made}
3. Edit `site.yaml`: where your images lie, and what your hospital allows (`policy`).
4. `fedicom site preflight` checks the computer, the network, the certificates and your data, and says what to fix.
5. `fedicom site review RECIPE` explains a study in plain words: on which of your patients, what would leave, what it
   costs of your privacy budget. `fedicom site approve RECIPE` lets it run; nothing else runs, and no program code
   is ever accepted from outside.
6. `fedicom site start`; `fedicom site status` shows what it does.

## What never leaves

Images, DICOM headers, names, identifiers, dates, labels of single patients, and counts of fewer patients than
`min_cell`. What does leave is a closed list (docs/what-leaves-the-site.md of Fedicom); every message is in `audit/`, a
signed log. Nobody can change it unnoticed, not even you, up to the last line that the coordinator has taken note of.

## When something is wrong

End `fedicom site start` or its service; nothing is lost by it. Call {contact}, if a key
may have become known to others, if this computer is lost, or before you leave the study: your keys are then revoked
and refused at the next call. Do not send this folder to anybody, not even to the coordinator.
"""

SITE_MADE_HERE = "; you made these keys yourself, nobody else has them."
SITE_MADE_THERE = (
    ".\n   They were made by the coordinator. If only you shall have had them, run `fedicom site init` and send\n"
    "   `public.json` instead."
)

JOIN = """\
# {owner}: {what} for the federation "{federation}"

Put it into the folder that is there already: `{command}`. It checks the authority's signature, keeps your
own settings and secrets, and hands the audit log over to the new key. Restart what runs there.

The key of the federation's authority is `{authority}`; compare it by telephone.
Destroy this folder afterwards.
"""

COORDINATOR = """\
# The coordinator of the federation "{federation}"

The gateway is the only open port: allow inbound TCP to {host}, port {port} (TLS 1.3). Everything else listens on
127.0.0.1.

1. Edit `server.yaml`.
2. `fedicom server start` in this folder.
3. `fedicom server run RECIPE`, with a recipe that `fedicom recipe sign` made.

| file | what it is |
|---|---|
| `keys/signing.key` | signs recipes, plans and the audit log |
| `keys/gateway.crt`, `.key` | TLS certificate of the gateway; runs out on {ends} |
| `keys/superlink.crt`, `.key` | the same for Flower's SuperLink on 127.0.0.1 |
| `keys/operator.token` | opens `fedicom server run`, `stop`, `resume`, `conclude` |
| `keys/tokens.json` | SHA-256 of all tokens; `fedicom provision token` changes it |
| `trust/registry.json` | who takes part; `fedicom provision registry FILE --home .` brings a newer one |

The authority's folder is not part of this kit and does not belong on this computer. Its key is
`{authority}`.
"""

AUDITOR = """\
# {name}: auditor of the federation "{federation}"

`auditor.token` lets you read the coordinator's status and logs, and run or stop nothing. The coordinator listens for
that on its own machine alone: log in there, or open a tunnel (`ssh -L PORT:127.0.0.1:PORT`), and ask for PORT, which is
`control_port` in its `server.yaml`. Then, in this folder:

    fedicom server status --control 127.0.0.1:PORT --token-file auditor.token
    fedicom server audit --out logs --control 127.0.0.1:PORT --token-file auditor.token

Logs that you were given are verified offline with the public keys in `trust/registry.json`: `fedicom audit verify`.

The key of the federation's authority is `{authority}`; compare it with the coordinator by
telephone.
"""


def _gateway_address(plan: FederationPlan) -> str:
    return f"[{plan.host}]:{plan.port}" if ":" in plan.host else f"{plan.host}:{plan.port}"


def certificates(plan: FederationPlan, ca: CertificateAuthority) -> dict[str, bytes]:
    """Certificates and keys of the gateway and of the SuperLink behind it."""
    gateway = ca.server("Fedicom gateway", plan.name, (plan.host, *plan.also_hosts), plan.valid_days)
    superlink = ca.server("Fedicom superlink", plan.name, LOOPBACK, plan.valid_days)
    return {
        "keys/gateway.crt": gateway[0],
        "keys/gateway.key": gateway[1],
        "keys/superlink.crt": superlink[0],
        "keys/superlink.key": superlink[1],
    }


def coordinator_files(
    plan: FederationPlan, ca: CertificateAuthority, signing: bytes, authority: str, auditors: Mapping[str, str]
) -> dict[str, bytes]:
    """The coordinator's whole kit, without the folder `trust`; `auditors` is name -> token."""
    operator = new_token()
    tls = certificates(plan, ca)
    ends = Certificate.parse(tls["keys/gateway.crt"]).ends
    # A federation that is reached over loopback alone is a rehearsal: it opens no port to the network either.
    listen = plan.host if plan.host in LOOPBACK else "0.0.0.0"  # noqa: S104
    words = {"federation": json.dumps(plan.name), "listen": json.dumps(listen), "port": plan.port}
    page = COORDINATOR.format(
        federation=plan.name, host=plan.host, port=plan.port, ends=f"{ends:%Y-%m-%d}", authority=authority
    )
    return {
        **tls,
        "server.yaml": SERVER_YAML.format(**words).encode(),
        SIGNING: signing,
        "keys/superexec.secret": _superexec(),
        "keys/tokens.json": token_table({"operator": operator}, auditors),
        "keys/operator.token": f"{operator}\n".encode(),
        "README.md": page.encode(),
    }


def site_files(
    plan: FederationPlan, site: str, authority: str, signing: bytes | None, node: NodeKey | None
) -> dict[str, bytes]:
    """A site's whole kit, without the folder `trust`; without private keys where the site made its own."""
    gateway = _gateway_address(plan)
    page = SITE.format(
        site=site,
        federation=plan.name,
        host=plan.host,
        port=plan.port,
        authority=authority,
        made=SITE_MADE_HERE if signing is None else SITE_MADE_THERE,
        contact=plan.contact or "the coordinator, who sent you this kit",
    )
    files = {"README.md": page.encode(), "site.yaml": site_yaml(site=site, federation=plan.name, gateway=gateway)}
    if signing is not None and node is not None:
        files |= {SIGNING: signing, NODE: node.private, COHORT: os.urandom(32), "keys/superexec.secret": _superexec()}
    return files


def auditor_files(plan: FederationPlan, name: str, authority: str, token: str) -> dict[str, bytes]:
    """An auditor's kit, without the folder `trust`."""
    page = AUDITOR.format(name=name, federation=plan.name, authority=authority)
    return {"auditor.token": f"{token}\n".encode(), "README.md": page.encode()}


def join_files(federation: str, owner: str, what: str, command: str, authority: str) -> dict[str, bytes]:
    """The page of a kit that is put into a home which exists."""
    page = JOIN.format(owner=owner, what=what, federation=federation, command=command, authority=authority)
    return {"README.md": page.encode()}


def _superexec() -> bytes:
    # text: a shell that reads the file into a variable shall not lose a byte
    return secrets.token_hex(32).encode()

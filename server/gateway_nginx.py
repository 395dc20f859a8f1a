"""The gateway's configuration as nginx takes it: `deploy/nginx/fedicom.conf.template`, filled in."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from common.config import validate_json
from common.errors import ConfigError, FedicomError
from common.storage import storing, write_whole
from server.gateway_rules import FLEET_ROUTES, GatewayConfig, RegistryKeys

TEMPLATE = Path(__file__).parents[1] / "deploy" / "nginx" / "fedicom.conf.template"

_MAIN = """\
# A whole nginx for the gateway alone, as a normal user: nginx -p {folder} -c nginx.conf
daemon off;
pid nginx.pid;
error_log error.log warn;
worker_processes auto;
worker_rlimit_nofile {files};
events {{ worker_connections {connections}; }}
http {{
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include fedicom.conf;
}}
"""


def nginx_keys(allowed: Mapping[str, str]) -> str:
    """The lines of the keys' map: an exact, case-sensitive expression for each key, and its site."""
    return "".join(f'"~^{re.escape(key)}$" "{site}";\n' for key, site in sorted(allowed.items(), key=lambda at: at[1]))


def nginx_config(config: GatewayConfig) -> str:
    """The site for nginx's http block; what `nginx_keys` gives lies beside it, in `fedicom.keys`.

    Raises:
        ConfigError: A path cannot stand in a configuration, or the template asks for what is not known.
        StorageError: The template cannot be read; it comes with the repository, not with the package.
    """
    limits = config.limits
    values: dict[str, object] = {
        "CALLS": "|".join(sorted(path.rpartition("/")[2] for _, path in FLEET_ROUTES)),
        "BESIDE": "GET|PUT" if config.blobs_port else "-",
        "BLOBS": f"{_host(config.upstream_host)}:{config.blobs_port or config.upstream_port}",
        "BLOBS_NAME": config.blobs_name,
        "KEYS": "fedicom.keys",
        "LISTEN": f"{_host(config.listen_host)}:{config.listen_port}",
        "ACCESS_LOG": config.access_log.resolve() if config.access_log else "access.log",
        "CERTIFICATE": config.certificate.resolve(),
        "KEY": config.key.resolve(),
        "UPSTREAM": f"{_host(config.upstream_host)}:{config.upstream_port}",
        "UPSTREAM_NAME": config.upstream_name,
        "UPSTREAM_CA": config.upstream_ca.resolve(),
        "BODY_BYTES": limits.body_bytes,
        "HEADER_BYTES": limits.header_bytes,
        "HEADER_MS": _milliseconds(limits.header_s),
        "BODY_MS": _milliseconds(limits.body_grace_s),
        "IDLE_MS": _milliseconds(limits.idle_s),
        "RESPONSE_MS": _milliseconds(limits.response_s),
        "CONNECT_MS": _milliseconds(limits.connect_s),
        "CONNECTIONS": limits.connections,
        "CONNECTIONS_PER_ADDRESS": limits.connections_per_address,
        "CONNECTIONS_PER_NODE": limits.connections_per_node,
        "NODE_REQUESTS_PER_MIN": max(1, round(limits.requests_per_s_per_node * 60)),
        "NODE_BURST": limits.request_burst_per_node,
        "REFUSALS_PER_MIN": max(1, round(limits.refusals_per_s_per_address * 60)),
        "REFUSAL_BURST": limits.refusal_burst_per_address,
    }
    with storing(TEMPLATE.name):
        text = TEMPLATE.read_text()

    def value(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in values:
            raise ConfigError(
                f"{TEMPLATE.name} asks for FEDICOM_{name}, which is not known; use the one of this version"
            )
        given = str(values[name])
        if re.search(r"[\s;{}\"'$\\]", given):
            raise ConfigError(f"{given!r} cannot stand in nginx's configuration; use a path without spaces and signs")
        return given

    return re.sub(r"\$\{FEDICOM_(\w+)\}", value, text)


def write_nginx(config: GatewayConfig, folder: Path) -> Path:
    """Writes `fedicom.conf`, `fedicom.keys` and an `nginx.conf` around them; `nginx -s reload` takes changes up.

    Args:
        config: Of the gateway.
        folder: Becomes nginx's prefix.

    Returns:
        The `nginx.conf`.

    Raises:
        FedicomError: The registry does not hold; then nothing is written.
    """
    allowed = RegistryKeys(config.registry, config.authority)()
    site, connections = nginx_config(config), 2 * config.limits.connections + 64
    with storing(folder.name):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "fedicom.keys", nginx_keys(allowed).encode())
    write_whole(folder / "fedicom.conf", site.encode())
    main = _MAIN.format(folder=folder.resolve(), files=2 * connections, connections=connections)
    write_whole(folder / "nginx.conf", main.encode())
    return folder / "nginx.conf"


def _host(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def main() -> None:
    """`python -m server.gateway_nginx --config FILE --out FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m server.gateway_nginx", description="The gateway as nginx.")
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the fields of GatewayConfig")
    parser.add_argument("--out", type=Path, required=True, help="folder that becomes nginx's prefix")
    arguments = parser.parse_args()
    try:
        with storing(arguments.config.name):
            text = arguments.config.read_bytes()
        write_nginx(validate_json(GatewayConfig, text), arguments.out)
    except FedicomError as error:
        raise SystemExit(f"fedicom: {error}") from None


if __name__ == "__main__":
    main()

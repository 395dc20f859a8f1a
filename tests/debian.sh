#!/usr/bin/env bash
# Installs Debian's packages without starting any service in them.
# Exit 77: they cannot be here, and the last line says why. Anything else but 0: the installation failed.
set -euo pipefail

cannot() {
  echo "no $*" >&2
  exit 77
}

command -v apt-get >/dev/null || cannot "$* here, and no apt-get to install Debian's packages with"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  sudo -n true 2>/dev/null || cannot "$* here, and installing takes root: sudo apt-get install $*"
  as_root=(sudo)
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod 755 "$policy"
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi
"${as_root[@]}" apt-get -qq update >&2 || cannot "$* here, and no Debian mirror answers"
apt-cache show "$@" >/dev/null 2>&1 || cannot "$* here, and this system has no such package"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >&2

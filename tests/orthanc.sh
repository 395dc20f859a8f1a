#!/usr/bin/env bash
# Puts Debian's Orthanc and what its tests need on this machine, without starting it.
# Exit 0: it is here. Exit 77: it cannot be here, and the last line says why. Anything else: the installation failed.
set -euo pipefail

ready() {
  { command -v Orthanc || test -x /usr/sbin/Orthanc; } &&
    test -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so &&
    type -P unshare nsenter ip curl
}

cannot() {
  echo "$1" >&2
  exit 77
}

if ! ready >/dev/null 2>&1; then
  command -v apt-get >/dev/null || cannot "no Orthanc here, and no apt-get to install Debian's package with"
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || cannot "no Orthanc here, and installing it takes root: sudo apt-get install orthanc orthanc-dicomweb"
    as_root=(sudo)
  fi
  # The package would start a service on all addresses.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
  fi
  "${as_root[@]}" apt-get -qq update >&2 || cannot "no Orthanc here, and no Debian mirror answers"
  apt-cache show orthanc >/dev/null 2>&1 || cannot "no Orthanc here, and this system has no package of it"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
    orthanc orthanc-dicomweb iproute2 util-linux curl >&2
  ready >/dev/null || { echo "Orthanc was installed and is not there" >&2; exit 1; }
fi

alone=(unshare --net)
[ "$(id -u)" -eq 0 ] || alone=(unshare --user --map-root-user --net)
"${alone[@]}" ip link set lo up 2>/dev/null ||
  cannot "this machine lets nobody make a network namespace, and Orthanc would listen on all addresses"

#!/usr/bin/env bash
# Puts Debian's Orthanc, which would listen on all addresses, and what its tests need on this machine, without starting it.
# Exit 0: it is here. Exit 77: it cannot be here, and the last line says why. Anything else: the installation failed.
set -euo pipefail
cd "$(dirname "$0")"

ready() {
  { command -v Orthanc || test -x /usr/sbin/Orthanc; } &&
    test -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so &&
    type -P unshare nsenter ip curl
}

if ! ready >/dev/null 2>&1; then
  ./debian.sh orthanc orthanc-dicomweb iproute2 util-linux curl
  ready >/dev/null || { echo "Orthanc was installed and is not there" >&2; exit 1; }
fi

alone=(unshare --net)
[ "$(id -u)" -eq 0 ] || alone=(unshare --user --map-root-user --net)
"${alone[@]}" ip link set lo up 2>/dev/null || {
  echo "this machine lets nobody make a network namespace, and Orthanc would listen on all addresses" >&2
  exit 77
}

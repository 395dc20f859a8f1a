#!/bin/sh
# Installs Fedicom from this folder, without a network: ./install.sh DIR     (for example /opt/fedicom-0.1.0)
# FEDICOM_PYTHON names the interpreter (default python3). Nothing is installed unless every hash is right, and what an
# attempt left that failed or was cut off is no hindrance to the next one.
set -eu
umask 022 # the user that runs it is another one than who installs it
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
unfinished=$1/.fedicom-unfinished
if [ -e "$1" ] && [ ! -e "$unfinished" ]; then
    echo "$1 exists; give a folder that is not there yet: an upgrade is installed beside what it replaces" >&2
    exit 1
fi
python=${FEDICOM_PYTHON:-python3}
(cd "$here" && sha256sum --check --strict --quiet SHA256SUMS) || {
    echo "this bundle is not whole, or was changed; copy it again" >&2
    exit 1
}
trap 'rm -rf "$1"' EXIT
trap 'exit 1' HUP INT TERM
rm -rf "$1"
mkdir -p "$1"
: > "$unfinished"
# A venv of its own, which nothing else uses and which needs no right of root beyond the folder's parent.
"$python" -m venv "$1"
# --isolated: no index, proxy or constraint of this machine's settings has a say.
if ! "$1/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-cache-dir \
    --no-index --find-links "$here/wheels" --only-binary :all: --require-hashes --requirement "$here/requirements.txt"; then
    echo "not installed; the bundle is for $(sed -n 's/^# for //p' "$here/requirements.txt"), this is $("$python" -VV)" >&2
    exit 1
fi
"$1/bin/python" -m pip --isolated --disable-pip-version-check check
"$1/bin/fedicom" version
rm "$unfinished"
trap - EXIT

#!/bin/sh
# Installs Fedicom from this folder, without a network: ./install.sh DIR     (for example /opt/fedicom)
# FEDICOM_PYTHON names the interpreter (default python3). Nothing is installed unless every hash is right.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
if [ -e "$1" ]; then
    echo "$1 exists; give a folder that is not there yet" >&2
    exit 1
fi
python=${FEDICOM_PYTHON:-python3}
(cd "$here" && sha256sum --check --strict --quiet SHA256SUMS) || {
    echo "this bundle is not whole, or was changed; copy it again" >&2
    exit 1
}
# A venv of its own, which nothing else uses and which needs no right of root beyond the folder's parent.
"$python" -m venv "$1"
# --isolated: no index, proxy or constraint of this machine's settings has a say.
if ! "$1/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-cache-dir \
    --no-index --find-links "$here/wheels" --only-binary :all: --require-hashes --requirement "$here/requirements.txt"; then
    rm -rf "$1"
    echo "not installed; the bundle is for $(sed -n 's/^# for //p' "$here/requirements.txt"), this is $("$python" -VV)" >&2
    exit 1
fi
"$1/bin/python" -m pip --isolated --disable-pip-version-check check
"$1/bin/fedicom" version

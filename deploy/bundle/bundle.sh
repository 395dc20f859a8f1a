#!/bin/sh
# `make bundle`: all that a hospital without internet needs to install Fedicom, in one folder to copy there.
#   deploy/bundle/bundle.sh [OUT]        OUT is bundle/ by default and is made anew
# PYTHON names the interpreter (default .venv/bin/python). The bundle fits machines of the same Python, system and
# processor as this one. It holds what runs, not the developers' tools, in the versions of requirements.lock.
set -eu
umask 022
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
out=${1:-$root/bundle}
mark=.fedicom-bundle

say() { printf '%s\n' "$*"; }

if [ -e "$out" ] && [ ! -e "$out/$mark" ]; then
    say "$out exists and is no bundle; give another folder" >&2
    exit 1
fi
rm -rf "$out"
mkdir -p "$out/wheels"
: > "$out/$mark"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

say "Building our own wheel"
# From a copy: setuptools leaves build/ and *.egg-info where it builds.
mkdir "$work/source"
(cd "$root" && tar -cf - --exclude=__pycache__ --exclude='*.egg-info' \
    LICENSE README.md fedicom.py pyproject.toml common client server simulations configs) | tar -xf - -C "$work/source"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$out/wheels" "$work/source"

say "Collecting the packages that it needs"
# `pip wheel`, not `pip download`: what comes as source is built here, so that nothing is compiled at the hospital.
# setuptools is for those who build the container images from the bundle.
"$python" -m pip wheel --quiet --disable-pip-version-check --wheel-dir "$out/wheels" \
    --constraint "$root/requirements.lock" "$out"/wheels/fedicom-*.whl 'setuptools>=77'

say "Writing down their hashes"
"$python" "$root/deploy/bundle/hashes.py" "$out/wheels" > "$out/requirements.txt"
cp "$root/deploy/bundle/install.sh" "$out/install.sh"
cp "$root/LICENSE" "$out/LICENSE"
chmod 755 "$out/install.sh"
seal() {
    (cd "$out" && find . -type f ! -name SHA256SUMS ! -name "$mark" | LC_ALL=C sort | xargs sha256sum) > "$work/sums"
    cp "$work/sums" "$out/SHA256SUMS"
}
seal

say "Trying it: an empty environment, no network"
FEDICOM_PYTHON=$python "$out/install.sh" "$work/installed"

say "Software bill of materials of what was installed"
"$root/deploy/bundle/sbom.sh" "$work/installed/bin/python" "$out/sbom.cdx.json"
seal

say "$out: $(find "$out/wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$out" | cut -f 1)"
say "Copy the folder, compare the SHA-256 of SHA256SUMS by another way, and run ./install.sh DIR there:"
(cd "$out" && sha256sum SHA256SUMS)

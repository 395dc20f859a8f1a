#!/bin/sh
# `make sbom`: CycloneDX 1.6 JSON of an environment, checked against the schema before it is written.
#   deploy/bundle/sbom.sh [PYTHON [OUT]]      default: .venv/bin/python and sbom.cdx.json
# Needs cyclonedx-bom (CYCLONEDX names its program, default .venv/bin/cyclonedx-py).
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${1:-$root/.venv/bin/python}
out=${2:-$root/sbom.cdx.json}
tool=${CYCLONEDX:-$root/.venv/bin/cyclonedx-py}
"$tool" environment --pyproject "$root/pyproject.toml" --mc-type application --output-reproducible \
    --spec-version 1.6 --output-format JSON --validate --output-file "$out" "$python"

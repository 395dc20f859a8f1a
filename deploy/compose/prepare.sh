#!/bin/sh
# Makes what compose.yaml mounts: kits/ and hospitals/ at the root of the repository, for user 10001.
#   deploy/compose/prepare.sh [SETTING ...]     settings of the recipe, for example rounds=10
# FEDICOM names the command (default .venv/bin/fedicom). Needs root for the change of owner; OWNER="" leaves it away.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
fedicom=${FEDICOM:-$root/.venv/bin/fedicom}
owner=${OWNER-10001:10001}
cd "${TARGET:-$root}"
if [ -e kits ] || [ -e hospitals ]; then
    echo "kits/ or hospitals/ exists; move it away first" >&2
    exit 1
fi
umask 077
"$fedicom" provision "$root/deploy/compose/federation.yaml" --out kits
"$fedicom" hospitals phantom hospitals --sites 3
for site in north south east; do
    # As the site's people would with an editor: in the container the images are at /data.
    sed -i 's|^data: null|data: /data|' "kits/$site/site.yaml"
done
sed -i 's|^test_data: null|test_data: /data|' kits/coordinator/server.yaml
"$fedicom" recipe sign recipe=phantom_2d federation.sites=3 federation.quorum=2 "$@" --home kits/coordinator \
    --out kits/coordinator/recipe.json
for site in north south east; do
    "$fedicom" site approve kits/coordinator/recipe.json --home "kits/$site" --by "$site-officer"
done
if [ -n "$owner" ]; then
    # Rootless podman: podman unshare chown. The authority's folder stays yours; keep it offline.
    chown -R "$owner" kits/coordinator kits/north kits/south kits/east hospitals
fi
echo "ready: docker compose -f deploy/compose/compose.yaml up --build"

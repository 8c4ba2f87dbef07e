#!/usr/bin/env bash
# ray 2.60.0: a test cluster with a temp_dir of its own starts only where the default folder is there.
#
# ray.cluster_utils.Cluster starts its head node with temp_dir. Then it notes the address in $RAY_TMPDIR/ray (/tmp/ray where
# that is not set), a folder that temp_dir has kept from being made. On a machine that never ran Ray it ends in a
# FileNotFoundError, and the processes of the head node go on.
# Seen: without the folder FileNotFoundError for ray_current_cluster; with an empty folder there the cluster starts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check ray==2.60.0
cat > "$folder/start.py" <<'PYTHON'
import sys

from ray.cluster_utils import Cluster

Cluster(
    initialize_head=True,
    head_node_args={
        "num_cpus": 1,
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "node_ip_address": "127.0.0.1",
        "temp_dir": sys.argv[1],
    },
).shutdown()
print("started")
PYTHON
export RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR="$folder/default"
mkdir "$RAY_TMPDIR"
short=$(mktemp -d /tmp/rXXXX)
trap 'pkill -f "$short" || true; rm -rf "$folder" "$short"' EXIT
without=$("$folder/venv/bin/python" "$folder/start.py" "$short" 2>&1 | tail -1 || true)
echo "without the folder: $without"
pkill -f "$short" || true
mkdir "$RAY_TMPDIR/ray"
with=$("$folder/venv/bin/python" "$folder/start.py" "$short" 2>&1 | tail -1)
echo "with it: $with"
[[ $without == *FileNotFoundError*ray_current_cluster* && $with == started ]]

#!/usr/bin/env bash
# tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [options of tools/test.py]
set -euo pipefail
config=${1:?CONFIG} checkpoint=${2:?CHECKPOINT} processes=${3:?number of processes}
tools=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$processes" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"

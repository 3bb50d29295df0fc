#!/usr/bin/env bash
# tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]; several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT
# TOOL=cache_teacher runs tools/cache_teacher.py in its place
set -euo pipefail
config=${1:?CONFIG} processes=${2:?number of processes}
tools=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$processes" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$tools/${TOOL:-train}.py" "$config" --launcher pytorch "${@:3}"

#!/usr/bin/env bash
# tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]; GPUS, GPUS_PER_NODE,
# CPUS_PER_TASK and SRUN_ARGS are read from the environment; TOOL=cache_teacher runs tools/cache_teacher.py instead
set -euo pipefail
partition=${1:?PARTITION} job=${2:?JOB_NAME} config=${3:?CONFIG} work_dir=${4:?WORK_DIR}
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
tools=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2086  SRUN_ARGS is a list of words
PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec srun -p "$partition" --job-name="$job" \
    --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$tools/${TOOL:-train}.py" "$config" --work-dir="$work_dir" --launcher=slurm "${@:5}"

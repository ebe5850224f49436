#!/usr/bin/env bash
# Sets the environment up and runs all checks: ruff, mypy, pytest.
#
#   bash launch/test.sh                the fast tier: within 5 minutes on 2 cores
#   bash launch/test.sh --full         everything: what CI runs, within 14 minutes
#   bash launch/test.sh [--full] ...   further arguments go to pytest, such as tests/loss/test_loss.py or -k shard
#
# PYTHON and VENV are as for launch/setup.sh. Without a GPU the tests run on the CPU with gloo, and Triton's kernels in
# its interpreter. Two processes share them there, unless arguments for pytest are given.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tier=(-m "not full")
if [[ ${1:-} == --full ]]; then
    tier=()
    shift
fi

cd "$root"
bash launch/setup.sh deepspeed,train,test,bench
bin=${VENV:-$root/.venv}/bin
export PATH="$bin:$PATH" # DeepSpeed looks for ninja there
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
shared=()
if ! nvidia-smi -L >/dev/null 2>&1; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
    # Most tests use one core or wait. Each process has its own ranks; it takes the tests in their order, one file after
    # the other, and takes over from the other what is left at the end.
    if [[ $# == 0 ]]; then shared=(-n 2 --dist worksteal); fi
fi

# Without caches, which know a file by its time and not by what has changed beside it.
ruff check --no-cache
ruff format --no-cache --check
mypy --cache-dir=/dev/null
exec pytest --durations=10 "${tier[@]}" "${shared[@]}" "$@"

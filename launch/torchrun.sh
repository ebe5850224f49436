#!/usr/bin/env bash
# Trains on one node or on many with torchrun (torch elastic). Run it on every node, with the same arguments.
#
#   bash launch/torchrun.sh --config configs/train/tiny-cpu.yaml [key=value ...]      python -m cce_dist.train
#   bash launch/torchrun.sh my_script.py [arguments of it]                            a script of your own
#   bash launch/torchrun.sh -m my.module [arguments of it]                            a module of your own
#
# The lines that you change, as environment variables:
#   NNODES        nodes (default 1), or MIN:MAX where the job may run with fewer than MAX
#   MASTER_ADDR   a name or address of the first node that all others reach (needed with several nodes)
#   NPROC         ranks per node (default: its GPUs, or 1)
#
# What can stay as it is:
#   NODE_RANK     0 on the first node, 1 on the next ...; needed only where MASTER_ADDR is not the first node's own name
#   MASTER_PORT   a free port of the first node (default 29500 with several nodes; any free one on a single node)
#   JOB_ID        anything that the nodes of this job share, and those of no other (default cce_dist)
#   MAX_RESTARTS  how often the ranks are started anew after one of them has died (default 3)
#   LOCAL_ADDR    this node's address, where the one its host name stands for is not the one that others reach
#   RDZV_TIMEOUT  seconds that a node waits for a silent first node, at the start and later (default 60)
#   PYTHON        the interpreter (default: .venv's in the repository if it is there, else python3)
#   NCCL_*, GLOO_*, TORCH_* and all others reach the ranks as they are: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_DEBUG ...
#
# python -m cce_dist.train is told checkpoint.resume=true, so what is started anew goes on from the newest checkpoint in
# its output folder; set checkpoint.every. A script of your own has to find its checkpoint itself.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# == 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit $(($# == 0 ? 2 : 0))
fi
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH # DeepSpeed looks for ninja there
export PATH

# A store of its own for every start of the ranks: in the one that torchrun shares by default, gloo finds the addresses of
# the ranks that have died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

nodes=${NNODES:-1}
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
ranks=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [[ $gpus == 0 ]]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi

flags=(--nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}")
flags+=(--rdzv-backend c10d --rdzv-id "${JOB_ID:-cce_dist}")
if [[ $nodes == 1 ]]; then
    flags+=(--rdzv-endpoint "127.0.0.1:${MASTER_PORT:-0}" --local-addr 127.0.0.1)
else
    if [[ -z ${MASTER_ADDR:-} ]]; then
        echo "torchrun.sh: NNODES=$nodes needs MASTER_ADDR: a name or address of the first node." >&2
        exit 2
    fi
    conf=read_timeout=${RDZV_TIMEOUT:-60}
    if [[ -n ${NODE_RANK:-} ]]; then conf+=,is_host=$((NODE_RANK == 0)); fi
    flags+=(--rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-conf "$conf")
    if [[ -n ${LOCAL_ADDR:-} ]]; then flags+=(--local-addr "$LOCAL_ADDR"); fi
fi

case $1 in
    *.py | -m) program=("$@") ;;
    *) program=(-m cce_dist.train checkpoint.resume=true "$@") ;;
esac
exec "$PYTHON" -m torch.distributed.run "${flags[@]}" "${program[@]}"

#!/usr/bin/env bash
# Trains on one node or on many with the DeepSpeed launcher.
#
#   bash launch/deepspeed.sh --config configs/train/tiny-cpu.yaml [key=value ...]     python -m cce_dist.train
#   bash launch/deepspeed.sh my_script.py [arguments of it]                           a script of your own
#   bash launch/deepspeed.sh -m my.module [arguments of it]                           a module of your own
#
# One node: nothing else is needed. Many nodes, with ssh: run it on one node; pdsh must be installed there, and ssh must
# reach the others without a password. Many nodes, without ssh: run it on every node, each with its NODE_RANK.
#
# The lines that you change, as environment variables:
#   HOSTFILE      a file with a line "NAME slots=RANKS" for each node (default: this node alone)
#   MASTER_ADDR   a name or address of the first node that all others reach (default with ssh: it is asked for)
#   NODE_RANK     this node's line of the file, from 0: starts this node's ranks alone, without ssh
#
# What can stay as it is:
#   NPROC         ranks per node (default: the slots, or this node's GPUs, or 1)
#   MASTER_PORT   a free port of the first node (default 29500)
#   PYTHON        the interpreter (default: .venv's in the repository if it is there, else python3)
#   NCCL_*, GLOO_*, TORCH_*, HF_*, DS_ACCELERATOR and OMP_NUM_THREADS reach the ranks of all nodes as they are here, and so
#   do the lines of ~/.deepspeed_env and ./.deepspeed_env
#
# The launcher gives a script the argument --local_rank (a module not), and starts nothing anew: for restarts, use
# launch/torchrun.sh, which runs DeepSpeed as well, or start it again; python -m cce_dist.train is told
# checkpoint.resume=true and goes on from the newest checkpoint. Ctrl-C and SIGTERM leave a checkpoint.
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

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [[ $gpus == 0 ]]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

flags=(--master_port "${MASTER_PORT:-29500}")
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -r $HOSTFILE ]] || { echo "deepspeed.sh: HOSTFILE=$HOSTFILE cannot be read." >&2 && exit 2; }
    flags+=(--hostfile "$HOSTFILE")
    if [[ -n ${NPROC:-} ]]; then flags+=(--num_gpus "$NPROC"); fi
else
    flags+=(--num_gpus "${NPROC:-$((gpus > 0 ? gpus : 1))}")
fi
if [[ -n ${NODE_RANK:-} ]]; then
    if [[ -z ${HOSTFILE:-} || -z ${MASTER_ADDR:-} ]]; then
        echo "deepspeed.sh: NODE_RANK=$NODE_RANK needs HOSTFILE and MASTER_ADDR too." >&2
        exit 2
    fi
    flags+=(--no_ssh --node_rank "$NODE_RANK")
fi
if [[ -n ${MASTER_ADDR:-} ]]; then flags+=(--master_addr "$MASTER_ADDR"); fi

case $1 in
    -m) shift && program=(--no_local_rank --module "$@") ;;
    *.py) program=("$@") ;;
    *) program=(--no_local_rank --module cce_dist.train checkpoint.resume=true "$@") ;;
esac

# The launcher sends other nodes what stands in this file. It knows it by one name, so the usual ones go in first.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for file in ~/.deepspeed_env .deepspeed_env; do
    if [[ -f $file ]]; then cat "$file"; fi
done >"$DS_ENV_FILE"
env | grep -E '^(NCCL_|GLOO_|TORCH_|HF_|DS_ACCELERATOR=|OMP_NUM_THREADS=)' >>"$DS_ENV_FILE" || true

# The launcher keeps SIGTERM to itself, so that it goes to all of its processes at once, and this waits for all of them.
set -m
"$PYTHON" -m deepspeed.launcher.runner "${flags[@]}" "${program[@]}" &
group=$!
trap 'kill -TERM -- "-$group"' TERM
trap 'kill -INT -- "-$group"' INT
code=0
wait "$group" || code=$?
while kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
exit "$code"

#!/usr/bin/env bash
# Trains a small language model on real text with 2 ranks, with DeepSpeed and with FSDP2: each with the plain head, and
# with the vocabulary-parallel head in exact mode, which must give the same losses; then once more in the default mode,
# which is exact too on a CPU. Ends with a table, and with an exit code other than 0 where sharded and plain runs
# disagree.
#
#   bash launch/quickstart.sh [key=value ...]     settings of cce_dist/train/settings.py, such as steps=10
#
# Takes about 5 minutes on 2 CPU cores, installation apart. Works with and without GPUs; with fewer GPUs than ranks, the
# ranks share one. Nothing is downloaded but the packages; the text is the source of Python's standard library.
#
# Environment: RANKS (default 2), OUTPUT (default runs/quickstart in the repository; what is there is replaced, once the
# settings are known to be valid), and PYTHON and VENV as for launch/setup.sh.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=${OUTPUT:-$root/runs/quickstart}
ranks=${RANKS:-2}
if [[ $output != /* ]]; then output=$PWD/$output; fi

cd "$root"
bash launch/setup.sh deepspeed,train
bin=${VENV:-$root/.venv}/bin
export PATH="$bin:$PATH" # DeepSpeed looks for ninja there
export HF_HUB_OFFLINE=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
if ! nvidia-smi -L >/dev/null 2>&1; then
    cores=$(nproc)
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi

# train NAME key=value...: one run into $output/NAME
train() {
    local name=$1
    shift
    rm -rf "${output:?}/$name"
    echo "== $name (details: $output/$name.log)"
    torchrun --nproc-per-node "$ranks" --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 \
        -m cce_dist.train "${common[@]}" "output=$output/$name" "$@" 2>"$output/$name.log" ||
        { explain "$output/$name.log" >&2 && exit 1; }
}

# explain LOG: the ranks' own errors, then the end of what they said; torchrun's traceback comes after both.
explain() {
    local own
    own=$(sed '/ failed (exitcode: /,$d' "$1")
    sed -E 's/^\[rank[0-9]+\]: //' <<<"$own" | grep -E '^(cce-dist train: |[A-Za-z_.]+(Error|Exception): )' |
        awk '!seen[$0]++' || true
    echo "== the end of $1, without torchrun's own lines:"
    tail -n 40 <<<"$own"
}

mkdir -p "$output"
common=(--config configs/train/tiny-cpu.yaml measure_head_memory=true "data.cache=$output/data")
deepspeed=(engine=deepspeed deepspeed=configs/deepspeed/zero3.json)
fsdp2=(engine=fsdp2 deepspeed=null)
for engine in deepspeed fsdp2; do # wrong settings end it here, where nothing is removed yet
    declare -n words=$engine
    cce-dist train --check "${common[@]}" "output=$output" "${words[@]}" "$@"
done
train deepspeed-plain "${deepspeed[@]}" head=plain "$@"
train deepspeed-exact "${deepspeed[@]}" head=cce cce.gradient=exact "$@"
train fsdp2-plain "${fsdp2[@]}" head=plain "$@"
train fsdp2-exact "${fsdp2[@]}" head=cce cce.gradient=exact "$@"
train fsdp2-default "${fsdp2[@]}" head=cce "$@"
cce-dist compare "$output"/{deepspeed-plain,deepspeed-exact,fsdp2-plain,fsdp2-exact,fsdp2-default}

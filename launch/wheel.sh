#!/usr/bin/env bash
# Builds the wheel, by way of the sdist, and tries it as a user gets it: for each extra a fresh environment, in which every
# module is imported that the extra is enough for, and the commands run. Nothing of this folder is on their path.
#
#   bash launch/wheel.sh [EXTRAS ...]     of pyproject.toml, as in deepspeed,train; default: none, and each of them
#
# Takes a minute or more for each. PYTHON is as for launch/setup.sh.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0 HF_HUB_OFFLINE=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
if ! nvidia-smi -L >/dev/null 2>&1; then export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""; fi
[[ $# != 0 ]] || set -- none deepspeed train deepspeed,train tensorboard test bench

# A module may lack what the extras do not bring, and nothing else.
imports='
import importlib, pkgutil, re, sys
from importlib.metadata import requires
import cce_dist

brought, missing, imported = {"cce_dist"}, {}, 0
for line in requires("cce_dist"):
    extra = re.search("extra == .(\\w+)", line)
    if extra is None or extra[1] in sys.argv[1].split(","):
        brought.add(re.match(r"[\w-]+", line)[0].lower().replace("pyyaml", "yaml"))
for module in pkgutil.walk_packages(cce_dist.__path__, "cce_dist."):
    try:
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            imported += 1
    except ModuleNotFoundError as error:
        missing.setdefault(error.name.split(".")[0], []).append(module.name)
print(imported, "modules imported, others lack", ", ".join(sorted(missing)) or "nothing")
wrong = {name: modules for name, modules in missing.items() if name in brought}
sys.exit(f"these lack what is installed: {wrong}" if wrong else 0)
'
consumer='
import torch
from cce_dist import CCEConfig, VocabShard, linear_cross_entropy

config: CCEConfig = CCEConfig(gradient="exact")
loss: torch.Tensor = linear_cross_entropy(
    torch.ones(1, 2), torch.ones(9, 2), torch.ones(1, dtype=torch.int64), shard=VocabShard.whole(9)
)
'

cp -r "$root"/{LICENSE,README.md,benchmarks,cce_dist,configs,kernels,pyproject.toml} "$work"
cd "$work"
"${PYTHON:-python3}" -m venv build-env
build-env/bin/pip install -qq build
build-env/bin/python -m build --outdir dist . >build.log 2>&1 || { cat build.log >&2 && exit 1; }
rm -r build-env benchmarks kernels cce_dist # what is tried is the wheel
wheel=$(echo "$work"/dist/*.whl)

"${PYTHON:-python3}" -m venv with-torch # unpacked once: the environments are copies, by links
with-torch/bin/pip install -qq torch==2.13.0
export PATH="$work/env/bin:$PATH" # DeepSpeed looks for ninja there

# asks_for_train COMMAND...: without the extra it ends with 2 and says what to install.
asks_for_train() {
    local code=0
    "$@" >said 2>&1 || code=$?
    if [[ $code != 2 ]] || ! grep "needs the package .*: pip install 'cce_dist\[train\]'" said; then
        cat said >&2
        exit 1
    fi
}

has() { env/bin/python -c "import $1" 2>/dev/null; }

plan=(cce-dist plan --vocab 262144 --hidden 2304 --tokens 8192 --gpus 64)
for extras in "$@"; do
    echo "== ${wheel##*/} with $extras"
    cp -al with-torch env
    if [[ $extras == none ]]; then what=$wheel; else what="${wheel}[$extras]"; fi
    env/bin/python -m pip install -qq "$what"
    env/bin/python -m pip check
    env/bin/python -W ignore -c "$imports" "$extras"
    cce-dist --version
    if [[ ,$extras, == *,train,* ]]; then
        cce-dist doctor
        "${plan[@]}" >/dev/null
        words=(engine=fsdp2 deepspeed=null)
        if [[ ,$extras, == *,deepspeed,* ]]; then words=(); fi
        for head in plain cce; do
            env/bin/python -m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d \
                --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 -m cce_dist.train \
                --config configs/train/tiny-cpu.yaml "output=$head" head=$head steps=2 cce.gradient=exact \
                data.max_bytes=200000 eval_batches=1 "${words[@]}" >train.log 2>&1 || { cat train.log >&2 && exit 1; }
        done
        cce-dist compare plain cce
        cce-dist report cce
        rm -r plain cce
    else
        cce-dist doctor
        "${plan[@]}" >/dev/null
        has transformers || asks_for_train cce-dist train --config configs/train/tiny-cpu.yaml
    fi
    if [[ ,$extras, == *,test,* ]]; then
        echo "$consumer" >consumer.py
        env/bin/mypy --strict consumer.py
        echo "${consumer/VocabShard.whole(9)/9}" >wrong.py # of which it has to say so
        env/bin/mypy --strict wrong.py >said || true
        grep 'wrong.py:.*linear_cross_entropy.*"int"' said
    fi
    rm -r env
done

#!/usr/bin/env bash
# Makes the project's virtual environment and installs cce_dist into it (editable). Safe to run again: it does nothing
# where the environment is up to date.
#
#   bash launch/setup.sh [EXTRAS]        EXTRAS: comma-separated, of pyproject.toml; default deepspeed,train
#
# Environment:
#   PYTHON   the interpreter to make the environment with (default python3; 3.10 or later)
#   VENV     where the environment is (default .venv in the repository)
#
# torch: one that the environment has already is kept. Otherwise a machine with an NVIDIA GPU gets the release of the
# package index, and one without gets the CPU build, which saves several GB.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-deepspeed,train}
venv=${VENV:-$root/.venv}
cpu_torch=2.13.0
stamp=$venv/.cce_dist_installed
state="$root $extras $(cksum <"$root/pyproject.toml")"

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

if [[ -f $stamp ]] && grep -qxF "$state" "$stamp"; then
    exit 0
fi

if [[ ! -x $venv/bin/python ]]; then
    echo "setup: making $venv"
    "${PYTHON:-python3}" -m venv "$venv"
fi

echo "setup: installing cce_dist[$extras] into $venv (minutes the first time)"
if ! "$venv/bin/python" -c "import torch" 2>/dev/null && ! has_gpu; then
    install "torch==$cpu_torch+cpu" 2>/dev/null ||
        install "torch==$cpu_torch+cpu" --index-url https://download.pytorch.org/whl/cpu ||
        install "torch==$cpu_torch"
fi
torch_before=$("$venv/bin/python" -c "import torch; print(torch.__version__)" 2>/dev/null || true)
# DS_BUILD_OPS=0: DeepSpeed compiles nothing at installation.
DS_BUILD_OPS=0 install --editable "${root}[$extras]"
torch_after=$("$venv/bin/python" -c "import torch; print(torch.__version__)")
if [[ -n $torch_before && $torch_before != "$torch_after" ]]; then
    echo "setup: the installation replaced torch $torch_before by $torch_after; see what asks for it with" \
        "'$venv/bin/python -m pip check'" >&2
    exit 1
fi
echo "$state" >>"$stamp"
echo "setup: done, torch $torch_after"

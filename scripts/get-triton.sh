#!/usr/bin/env bash
# Usage: get-triton.sh VENV FOLDER VERSION
# Puts another Triton into FOLDER, once: `PYTHONPATH=FOLDER VENV/bin/python` compiles with it.
set -euo pipefail
venv=$1 folder=$2 version=$3
[ "$(cat "$folder/.version" 2>/dev/null)" = "$version" ] && exit 0
printf '\033[1m[set-up]\033[0m Triton %s beside the one in %s ...\n' "$version" "$venv"
rm -rf "$folder"
"$venv/bin/python" -m pip --disable-pip-version-check install -q --no-deps --target "$folder" "triton==$version"
echo "$version" >"$folder/.version"

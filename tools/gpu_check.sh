#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: no network, no installed kvopt, at most 8 minutes on one H100.
# `tools/gpu_check.sh --help` says how, which wheels to bring, and what comes out.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec </dev/null

usage() {
  cat <<'HELP'
tools/gpu_check.sh [--again] [--small] [--device cuda|cpu] [tests|kernels|attention|steps ...]

Checks kvopt on the GPU of this machine and measures it there. Without names it runs all parts, in this order:
  tests    pytest -m gpu: kernels against float64; models, optimization, training and answers against the CPU;
           quantized bases, where bitsandbytes or torchao is installed; cuda:1, where there are two GPUs
  kernels  the divergence op against TRL, Liger, fla and plain torch at the shapes of real models
  attention
           rows packed behind a shared prefix against padded ones, at a layer of Llama-3-8B's shape: the same outputs and
           gradients, time and memory
  steps    a step of optimization, whole and in micro-batches, and scoring, on models of Qwen3-4B's and Llama-3-8B's
           shape with random weights that are made on the device, against PEFT's CARTRIDGE and full prompts

Each part has its own time limit (tests 150 s, kernels 165 s, attention 55 s, steps 110 s; together at most 8 minutes),
writes $OUT/PART.json and $OUT/PART.md line by line, and does not stop the next one. A part that was measured to its end
with these sources is not run again. All output is also in $OUT/gpu_check.log. The exit code is 1 if anything failed.

  --again        run parts that are complete already, too
  --small        tiny sizes, to see in a minute whether everything starts; without CUDA the sizes are always tiny
  --device NAME  cuda or cpu; default: cuda if torch sees one, else cpu

Environment:
  PYTHON   the Python to use (default python3); it needs torch, transformers, peft, accelerate, einops, safetensors,
           scipy, typer, rich, filelock, pytest and hypothesis. kvopt is taken from this checkout.
  OUT      folder of results (default gpu-check)
  WHEELS   folder of wheels of what that Python lacks. They are unpacked into a temporary folder; nothing is installed,
           and one that does not fit is named and left out.
  SMOLLM2  folder of SmolLM2 (config, tokenizer, weights), to measure steps on it too
  GPU_CHECK_PYTEST, GPU_CHECK_SECONDS  further arguments of pytest, and one time limit for every part

Wheels that kvopt itself needs:  pydantic pydantic-core annotated-types typing-inspection tenacity
Wheels to compare with:          trl (with datasets, dill, multiprocess), liger-kernel, flash-linear-attention, fla-core
For quantized bases:             bitsandbytes torchao
For all of kvopt's modules:      jsonschema jsonschema-specifications referencing rpds-py attrs
One line gets them all, for Python 3.12 on Linux (x86-64); they take 8 MB:
  pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --constraint constraints.txt --dest wheels \
    pydantic pydantic-core annotated-types typing-inspection tenacity \
    trl datasets dill multiprocess liger-kernel flash-linear-attention fla-core \
    jsonschema jsonschema-specifications referencing rpds-py attrs
HELP
}

fault() {
  printf 'tools/gpu_check.sh: %s (see --help)\n' "$1" >&2
  exit 2
}

again="" small="" device="" parts=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --again) again=1 ;;
    --small) small=1 ;;
    --device) [ $# -gt 1 ] || fault "--device needs cuda or cpu"; device="$2"; shift ;;
    tests | kernels | attention | steps) parts+=("$1") ;;
    *) fault "unknown argument $1" ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests kernels attention steps)
case "$device" in "" | cuda | cpu) ;; *) fault "--device is $device, not cuda or cpu" ;; esac

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || fault "there is no Python $python"
mkdir -p "${OUT:-gpu-check}" || fault "cannot write to ${OUT:-gpu-check}"
out="$(cd "${OUT:-gpu-check}" && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$scratch/site:$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

unpack() { # wheels into $scratch/site, all at once: two of them may share a package
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$1" "${@:2}"
}
run_part() {
  local part="$1" limit="$2" status
  if [ -z "$again" ] && ! "$python" "$root/tools/gpu_report.py" wanted "$out" "$part" "$size" "$device"; then
    echo "== $part: complete already (--again measures it once more)"
    return
  fi
  limit="${GPU_CHECK_SECONDS:-$limit}"
  echo "== $part on $device, $size sizes, at most $limit s (after $((SECONDS - started)) s)"
  rm -f "$out/$part.json" "$out/$part.md"
  timeout --kill-after=5 "$limit" "$python" "$root/tools/gpu_$part.py" --out "$out" --size "$size" --device "$device" \
    --seconds "$limit"
  status=$?
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    "$python" "$root/tools/gpu_report.py" killed "$out" "$part" "$size" "$device" "stopped after $limit s"
  elif [ "$status" -ne 0 ]; then
    "$python" "$root/tools/gpu_report.py" killed "$out" "$part" "$size" "$device" "exit code $status"
  fi
}

main() {
  if [ -n "${WHEELS:-}" ]; then
    shopt -s nullglob
    wheels=("$WHEELS"/*.whl)
    shopt -u nullglob
    [ ${#wheels[@]} -gt 0 ] || echo "wheels: none in $WHEELS"
    if [ ${#wheels[@]} -gt 0 ] && ! unpack "$scratch/site" "${wheels[@]}" 2>"$scratch/pip.log"; then
      fitting=()
      for wheel in "${wheels[@]}"; do
        if unpack "$scratch/one" "$wheel" 2>"$scratch/pip.log"; then fitting+=("$wheel"); else
          echo "wheels: $(basename "$wheel") is left out: $(grep -m1 ERROR "$scratch/pip.log" || tail -1 "$scratch/pip.log")"
        fi
        rm -rf "$scratch/one"
      done
      rm -rf "$scratch/site"
      [ ${#fitting[@]} -eq 0 ] || unpack "$scratch/site" "${fitting[@]}"
    fi
  fi

  if [ -z "$device" ]; then
    device="$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")' || echo cpu)"
    [ "$device" = cuda ] || echo "torch sees no CUDA device: small sizes on the CPU"
  fi
  size=full
  if [ -n "$small" ] || [ "$device" = cpu ]; then size=small; fi
  started=$SECONDS

  for part in "${parts[@]}"; do
    case "$part" in
      tests) run_part tests 150 ;;
      kernels) run_part kernels 165 ;;
      attention) run_part attention 55 ;;
      steps) run_part steps 110 ;;
    esac
  done

  echo
  "$python" "$root/tools/gpu_report.py" summary "$out" "${parts[@]}"
  local status=$?
  echo "results: $out (after $((SECONDS - started)) s)"
  return "$status"
}

main 2>&1 | tee "$out/gpu_check.log"
exit "${PIPESTATUS[0]}"

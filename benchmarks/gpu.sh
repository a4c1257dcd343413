#!/usr/bin/env bash
# What is measured on a GPU: decoding, updates, and whether a run resumes bit for bit. Needs jax[cuda13] and jaxrft.
#
#   bash benchmarks/gpu.sh OUT [MODEL ...]     models: tiny 0.5b 1.5b 7b; all but tiny by default
#
# Random weights of the shapes of Qwen2.5 in bfloat16. Decoding is at 256 rows and from an empty to a full cache, half
# full in the mean: "of the copy's" is the bytes that must be read, over the measured copy rate, over the time. An
# update, "of the products'", is the operations that must be done over the measured rate of products over the time.
# It is measured with attention by XLA and by cuDNN. An update of all weights of 7b does not fit into 80 GB.
set -uo pipefail

out=${1:?usage: bash benchmarks/gpu.sh OUT [MODEL ...]}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
models=("$@")
[ ${#models[@]} -gt 0 ] || models=(0.5b 1.5b 7b)

shape() {
  case $1 in
    tiny) echo --layers 2 --width 128 --heads 2 --kv-heads 1 --mlp 256 --vocabulary 512 --prompts 4 --new-tokens 32 ;;
    0.5b) echo --layers 24 --width 896 --heads 14 --kv-heads 2 --mlp 4864 --vocabulary 151936 ;;
    1.5b) echo --layers 28 --width 1536 --heads 12 --kv-heads 2 --mlp 8960 --vocabulary 151936 ;;
    7b) echo --layers 28 --width 3584 --heads 28 --kv-heads 4 --mlp 18944 --vocabulary 152064 ;;
    *) echo "no model $1: give tiny, 0.5b, 1.5b or 7b" >&2 && exit 2 ;;
  esac
}

failed=0
measure() { # NAME COMMAND...: a failure is told, and the next measurement goes on
  local name=$1
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.md" 2>"$out/$name.log" || { failed=1 && tail -n 3 "$out/$name.log"; }
  cat "$out/$name.md"
}

common=(--dtype bfloat16 --prompt-length 256 --new-tokens 1024 --repeats 3)
for model in "${models[@]}"; do
  flags=$(shape "$model") || exit 2
  read -ra sizes <<<"$flags"
  measure "rollout-$model" python -m benchmarks.rollout "${common[@]}" "${sizes[@]}" --json "$out/rollout-$model.json"
  [ "$model" = 7b ] && continue
  for attention in xla cudnn; do
    measure "learn-$model-$attention" python -m benchmarks.learn "${common[@]}" "${sizes[@]}" \
      --micro-batch 32 --attention "$attention" --json "$out/learn-$model-$attention.json"
  done
done

# Six steps at once, and three with three after a resume: the same policy, bit for bit.
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
quickstart() { jaxrft train configs/quickstart.py --save-steps 3 --output-dir "$runs/$1" --steps "$2" >>"$out/resume.log" 2>&1; }
if quickstart whole 6 && quickstart parts 3 && quickstart parts 6 &&
  cmp "$runs"/{whole,parts}/policy/model.safetensors; then
  echo "the quickstart resumes bit for bit"
else
  failed=1
  echo "the quickstart does not resume bit for bit: see $out/resume.log"
fi
exit "$failed"

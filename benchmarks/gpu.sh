#!/usr/bin/env bash
# The tests that need a card, then every benchmark for one H200 (or another single GPU) in one go: about an hour.
# Needs the `bench` and the `dev` extra.
#
#   bash benchmarks/gpu.sh                      reports in runs/benchmarks/gpu/, OUT=folder for elsewhere
#   DPO_KIT_TOY=1 bash benchmarks/gpu.sh        the same commands at toy size, on a CPU too: a few minutes
#   ONLY=mfu bash benchmarks/gpu.sh             only the reports whose name begins so
#
# A command that fails is named at the end, the others run. Ended halfway, the same command goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python3
OUT=${OUT:-runs/benchmarks/gpu}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
# Varied lengths fragment the caching allocator otherwise, on every side alike.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
failed=()
mkdir -p "$OUT"

if [ -n "${DPO_KIT_TOY:-}" ]; then
    small=random:toy middle=random:toy-qwen2 large=random:toy
    equal=32/16/16 ultrafeedback=16/24/24~0.4 hh=16/8/8~0.7
    pairs() { echo 4; }
    batch() { echo 2; }
    repeats() { echo 1; }
else
    small=random:0.5b middle=random:1.5b large=random:7b
    equal=1024/512/512 ultrafeedback=512/768/768~0.4 hh=128/64/64~0.7
    pairs() { echo "$1"; }
    batch() { echo "$1"; }
    repeats() { echo "$1"; }
fi

# report NAME SCRIPT OPTIONS...
report() {
    local name=$1 script=$2
    shift 2
    case "$name" in "${ONLY:-}"*) ;; *) return ;; esac
    echo "== $name" >&2
    "$PYTHON" "benchmarks/$script" --dtype bfloat16 "$@" -o "$OUT/$name.md" || failed+=("$name")
}

# 0. Whether it is right on this card at all: the tests that need one, under 5 minutes
case "cuda-tests" in "${ONLY:-}"*)
    echo "== cuda-tests" >&2
    "$PYTHON" -m pytest -m gpu tests/test_cuda.py > "$OUT/cuda-tests.log" 2>&1 || failed+=("cuda-tests")
    tail -n 3 "$OUT/cuda-tests.log" >&2
    ;;
esac

# 1. MFU of the kit: must / aim 0.5B 30 / 36 %, 1.5B 40 / 45 %, 7B with recompute 36 / 39 %, 7B without 44 / 48 %
mfu() {
    local name=$1 model=$2
    shift 2
    report "mfu-$name" bench.py --sides kit --model "$model" --shape "$equal" --warmup-steps 0 "$@"
}
mfu 0.5b "$small" --pairs "$(pairs 128)" --batch-size "$(batch 32)" --repeats "$(repeats 3)" --max-tokens 32768
mfu 1.5b "$middle" --pairs "$(pairs 64)" --batch-size "$(batch 32)" --repeats "$(repeats 3)" --max-tokens 16384
mfu 7b-recompute "$large" --pairs "$(pairs 32)" --batch-size "$(batch 16)" --repeats "$(repeats 2)" \
    --max-tokens 8192 --recompute
mfu 7b-bf16-states "$large" --pairs "$(pairs 32)" --batch-size "$(batch 16)" --repeats "$(repeats 2)" \
    --max-tokens 4096 --set actor.optimizer.state_dtype=bfloat16
mfu 0.5b-compiled "$small" --pairs "$(pairs 128)" --batch-size "$(batch 32)" --repeats "$(repeats 3)" \
    --max-tokens 32768 --set actor.compile=true

# 2. Against TRL, at its best / its defaults: equal lengths >= 1.4x / 2.2x, UltraFeedback-like 1.35x / 3x, HH-like 1.6x / 3x
against() {
    report "trl-$1" bench.py --model "$2" --shape "$3" --pairs "$(pairs "$4")" --batch-size "$(batch "$5")" \
        --repeats "$(repeats 3)" --warmup-steps 0 --default-steps 0 --max-tokens 32768
}
against equal-0.5b "$small" "$equal" 64 16
against ultrafeedback-like-0.5b "$small" "$ultrafeedback" 64 16
against hh-like-0.5b "$small" "$hh" 512 64
against equal-1.5b "$middle" "$equal" 64 16
against ultrafeedback-like-1.5b "$middle" "$ultrafeedback" 64 16
against hh-like-1.5b "$middle" "$hh" 512 64

# 3. Activation memory (<= 0.70x at the same recompute setting), and sharing alone (>= 0.92 of the formula's ratio)
report activations activations.py --model "$small" --shape "$equal" --pairs "$(pairs 4)"
report sharing sharing.py --model "$small" --shape "$equal" --pairs "$(pairs 64)" --batch-size "$(batch 16)"

# 4. Where the rest goes, and recompiles over varied lengths
report profile-0.5b step_profile.py --model "$small" --shape "$equal" --pairs "$(pairs 64)" --batch-size "$(batch 32)" \
    --max-tokens 32768
report profile-7b step_profile.py --model "$large" --shape "$equal" --pairs "$(pairs 32)" --batch-size "$(batch 16)" \
    --max-tokens 8192 --set actor.gradient_checkpointing=true
report recompiles step_profile.py --model "$small" --shape "$hh" --pairs "$(pairs 512)" --batch-size "$(batch 64)" \
    --max-tokens 8192 --steps 8 --set actor.compile=true

# 5. Options on and off
report options options.py --models "$small" "$middle" --shape "$equal" --pairs "$(pairs 8)" --max-tokens 16384

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
echo "reports: $OUT" >&2

#!/usr/bin/env bash
# Everything that only a GPU can say, in order of importance, on a machine without network:
#
#     benchmarks/gpu.sh OUT [SECONDS] [WHEELS]
#
# OUT: an empty or new folder for JSON and logs. SECONDS (default 540): what has not started by then is skipped, and what
# runs then is stopped; everything measured before is in OUT. WHEELS: a folder of wheels for whatever is missing here.
# DRY_RUN=1 prints the commands instead. Exit status 1 if any stage failed.
set -uo pipefail
out=${1:?"usage: benchmarks/gpu.sh OUT [SECONDS] [WHEELS]"}
budget=${2:-540}
wheels=${3:-}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0

stage() { # NAME LIMIT COMMAND...: one log and one line in stages.tsv each
    local name=$1 limit=$2 left=$((budget - SECONDS)) started=$SECONDS status
    shift 2
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$name (at most $limit s): $*"
        return
    fi
    if [ "$left" -lt 10 ]; then
        printf '%s\tskipped\t0\n' "$name" >>"$out/stages.tsv"
        return
    fi
    timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
    status=$?
    printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - started)) >>"$out/stages.tsv"
    [ "$status" -eq 0 ] || failed=1
    tail -n 3 "$out/$name.log"
}

benchmark() { # NAME LIMIT FILE [PYTEST OPTIONS...]
    local name=$1 limit=$2 file=$3
    shift 3
    stage "$name" "$limit" python -m pytest "benchmarks/$file" -q "$@" --benchmark-json "$out/$name.json"
}

stage device 20 nvidia-smi
install=(python -m pip install --no-build-isolation --no-deps -e .)
if [ -n "$wheels" ]; then
    stage wheels 60 python -m pip install --no-index --find-links "$wheels" pycocotools tyro pytest-benchmark hypothesis
fi
stage build 170 env DNDETR_BUILD=cuda "${install[@]}"
stage doctor 60 python -m dndetr.doctor
stage tests 150 python -m pytest -q -m gpu tests
benchmark msda 90 bench_ms_deform_attn.py
benchmark matching 60 bench_matching.py
benchmark attention 90 bench_attention.py
benchmark losses 40 bench_losses.py
benchmark step 120 bench_step.py
stage memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -q -m gpu tests/ops
stage racecheck 90 compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest -q -m gpu tests/ops
stage initcheck 90 compute-sanitizer --tool initcheck --error-exitcode 1 python -m pytest -q -m gpu tests/ops
exit "$failed"

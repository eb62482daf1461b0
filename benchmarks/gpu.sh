#!/usr/bin/env bash
# What only a GPU can say, on a bare machine without network whose time is short (docs/gpu.md):
#
#     benchmarks/gpu.sh FIRST OUT SECONDS      whether all is right, and where a step's time goes
#     benchmarks/gpu.sh SECOND OUT SECONDS     the numbers that the docs publish
#
# OUT: a folder that gets at most five files, each complete at any moment. SECONDS: all of it ends by then. DRY_RUN=1 prints
# the plan instead: blocks, seconds that each needs, and takes at most. What gpu_pack.sh put into .gpu is used where it is.
# Exit status 1 if anything failed.
set -uo pipefail
usage="usage: benchmarks/gpu.sh FIRST|SECOND OUT SECONDS"
plan=${1:?$usage} out=${2:?$usage} seconds=${3:?$usage}
refuse() { # WHY
    echo "gpu.sh: $1" >&2
    exit 2
}
[[ $plan == FIRST || $plan == SECOND ]] || refuse "there is no plan $plan, only FIRST and SECOND"
[[ $seconds =~ ^[1-9][0-9]*$ ]] || refuse "SECONDS must be a whole number, got $seconds"
out=$(realpath -m "$out")
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
[ -z "${DRY_RUN:-}" ] || exec python3 benchmarks/gpu_plan.py "$plan" "$out" "$seconds"

mkdir -p "$out" || exit 2
pack=$PWD/.gpu site=$(mktemp -d) log=$out/setup.log
export PYTHONPATH=$site:$PYTHONPATH
# As cuda_calls.py has them; here they are set before torch is imported.
export DISABLE_CUPTI_LAZY_REINIT=1 TEARDOWN_CUPTI=0
[ ! -f "$pack/commit" ] || export DNDETR_COMMIT=${DNDETR_COMMIT:-$(cat "$pack/commit")}
[ ! -d "$pack/shared" ] || export DNDETR_SHARED=${DNDETR_SHARED:-$pack/shared}
[ ! -d "$pack/official" ] || export DNDETR_OFFICIAL=${DNDETR_OFFICIAL:-$pack/official}

imports() {
    python3 -c "import dndetr._C as compiled; assert hasattr(compiled, 'match_cuda'), 'built without CUDA'"
}

set_up() (
    set -x
    nvidia-smi
    which -a python3 nvcc ncu compute-sanitizer
    df -h /dev/shm
    [ ! -d "$pack/wheels" ] ||
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$pack"/wheels/*.whl
    imports || cp "$pack"/_C.*.so "$pack/_build_info.json" dndetr/
    imports || DNDETR_BUILD=cuda timeout $((seconds / 2)) python3 -m pip install -q --no-build-isolation --no-deps -e .
)
set_up >"$log" 2>&1
echo "set up in $SECONDS s" | tee -a "$log"
left=$((seconds - SECONDS - 8)) # a plan that hangs in the GPU is killed after these
[ "$left" -gt 5 ] || refuse "no time was left after setting up; see $log"
exec timeout --foreground --kill-after=8 "$left" python3 benchmarks/gpu_plan.py "$plan" "$out" $((left - 4)) 2>>"$log"

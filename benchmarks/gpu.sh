#!/usr/bin/env bash
# Everything that only a GPU can say, in order of importance, on a machine without network:
#
#     benchmarks/gpu.sh OUT [SECONDS] [WHEELS]
#     STAGES="wheels build step" benchmarks/gpu.sh OUT [SECONDS] [WHEELS]
#
# OUT: a folder for results (JSON), logs and runs. SECONDS (default 540): what has not started by then is skipped, and what
# runs then is stopped; all that was measured before is in OUT. WHEELS: a folder of wheels, every one of which is installed.
# STAGES: names of stages, or their first word (default: all). DRY_RUN=1 prints the commands instead. OUT/stages.tsv has a
# line for each stage: name, what became of it, seconds, reason. Exit status 1 if any failed. More in docs/gpu.md.
set -uo pipefail
out=${1:?"usage: benchmarks/gpu.sh OUT [SECONDS] [WHEELS]"}
budget=${2:-540}
refuse() { # WHY
    echo "gpu.sh: $1" >&2
    exit 2
}
[[ $budget =~ ^[1-9][0-9]*$ ]] || refuse "SECONDS must be a whole number, got $budget"
[ -z "${3:-}" ] || [ -d "$3" ] || refuse "there is no folder of wheels $3"
wheels=${3:+$(realpath "$3")}
[ -n "${DRY_RUN:-}" ] || mkdir -p "$out"
out=$(realpath -m "$out")
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 # so that logs are complete whatever ends a stage
failed=0

all="device wheels build doctor tests sanitize ceilings step msda matching attention losses fused train"
read -ra stages <<<"${STAGES:-$all}"
[ ${#stages[@]} -gt 0 ] || refuse "STAGES is empty; the first words of stages are: $all"
for word in "${stages[@]}"; do
    [[ " $all " == *" ${word%%-*} "* ]] || refuse "there is no stage $word; the first words of stages are: $all"
done
met=" " # words that stages were found for

chosen() { # NAME
    local word found=1
    for word in "${stages[@]}"; do
        [[ $1 == "$word" || $1 == "$word"-* ]] && met+="$word " && found=0
    done
    return $found
}

note() { # NAME WHAT SECONDS REASON
    printf '%s\t%s\t%s\t%s\n' "$@" | tee -a "$out/stages.tsv"
}

stage() { # NAME LIMIT COMMAND...
    local name=$1 limit=$2 left=$((budget - SECONDS)) started=$SECONDS status
    shift 2
    chosen "$name" || return 0
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%s\t%s\t%s\n' "$name" "$limit" "${*@Q}"
        return
    fi
    if [ "$left" -lt 10 ]; then
        note "$name" skipped 0 "no time was left"
        return
    fi
    # Interrupted, pytest still says what failed until then.
    timeout ${ending:---signal=INT} --kill-after=10 $((limit < left ? limit : left)) "$@" >>"$out/$name.log" 2>&1
    status=$?
    case $status in
        0) note "$name" ok $((SECONDS - started)) "" ;;
        124 | 137) note "$name" interrupted $((SECONDS - started)) "after $((limit < left ? limit : left)) s" ;;
        *)
            failed=1
            note "$name" failed $((SECONDS - started)) "exit status $status, see $name.log"
            ;;
    esac
}

skip() { # NAME REASON
    chosen "$1" && [ -z "${DRY_RUN:-}" ] && note "$1" skipped 0 "$2"
}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | awk 'NR == 1 { print tolower($2) }')
results() { # AREA
    echo "$out/${gpu:-gpu}-$1.json"
}

benchmark() { # NAME LIMIT FILE [PYTEST OPTIONS...]; names that differ after their first word share a file of results
    local name=$1 limit=$2 file=$3
    shift 3
    stage "$name" "$limit" python -m pytest "benchmarks/$file" -q -s --results "$(results "${name%%-*}")" "$@"
}

stage device 20 nvidia-smi
if [ -n "$wheels" ]; then
    stage wheels 60 python -m pip install --no-index --no-deps "$wheels"/*.whl
else
    skip wheels "no folder of wheels was given"
fi
stage build 200 env DNDETR_BUILD=cuda python -m pip install --no-build-isolation --no-deps -e .
stage doctor 60 python -m dndetr.doctor
# Apart from the rest, whose Triton kernels are compiled as tests need them and may take all the time there is.
compiled="tests/ops/test_match_cuda.py tests/ops/test_ms_deform_attn_cuda.py"
stage tests-compiled 90 python -m pytest -q -m gpu $compiled
stage tests-others 150 python -m pytest -q -m gpu tests ${compiled//tests/--ignore=tests} --continue-on-collection-errors

# Small cases only, and none that captures: without torch's cache every tensor has bounds that can be checked.
small="precise and not (train or quarter or decoder or coco) or test_group_attention or test_conditional_attention"
small+=" or (cost_is_the_reference or matches_as_the_cpu) and not coco"
for tool in memcheck racecheck initcheck; do
    # torch's kernels are not checked, but initcheck must see what they write.
    ours=(--kernel-name-exclude kns=at6native)
    [ "$tool" = initcheck ] && ours=()
    stage "sanitize-$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
        --error-exitcode 9 --report-api-errors no "${ours[@]}" --target-processes application-only \
        python -m pytest -q -m gpu tests/ops -k "$small"
done

benchmark ceilings 60 bench_ceilings.py
# A process for each, so that none meets what another left in the GPU's memory.
for images in 2 16; do
    for model in deformable dense; do
        preset=dn-detr-r50
        [ "$model" = deformable ] && preset=dn-deformable-detr-r50
        benchmark "step-$model-$images" 120 "bench_gpu_step.py::bench_gpu_step[$preset-$images]"
    done
done
benchmark msda 170 bench_ms_deform_attn.py -m gpu
benchmark matching 100 bench_matching.py -k "cuda and not 64x6"
benchmark attention-cross 60 bench_attention.py -k conditional
benchmark attention-self 150 bench_attention.py -k group
benchmark losses 40 bench_losses.py
benchmark fused 60 bench_fused.py

train() { # NAME LIMIT COMMAND...
    # Told to terminate, the command saves where it is. It alone is told: were its workers too, it would fail first.
    ending=--foreground stage "$@"
}

times() { # NAME RUN...
    local name=$1
    shift
    [ -n "${DRY_RUN:-}" ] || [ -f "$1/metrics.jsonl" ] || return 0
    stage "$name" 30 python benchmarks/time_to_ap.py "$@" --results "$(results training)"
}

# From nothing: ResNet-50 and six layers each on the built-in shapes.
train train-shapes 240 python -m dndetr.train --preset dn-deformable-detr-r50 --data shapes --output "$out/shapes-r50" \
    --train-images 16000 --val-images 500 --batch-size 64 --epochs 12 --workers 12 --denoising.padding hidden \
    --model.backbone.norm batch --model.backbone.frozen 0 --model.anchors grid --model.size-bias 0 \
    --lr 4e-4 --optimizer.backbone-scale 1 --optimizer.schedule cosine --optimizer.warmup 0.05 --optimizer.ema 0.998
times train-shapes-times "$out/shapes-r50"
# From a ResNet-18: denoising on and off.
shared=$(realpath "${DNDETR_SHARED:-../shared}" 2>/dev/null)
weights=$shared/weights/resnet18_imagenet_to_layer3.pt
if [ -n "${DRY_RUN:-}" ] || { [ -d "$shared/data/bccd" ] && [ -f "$weights" ]; }; then
    train train-bccd 300 python -m dndetr.compare --preset small --data "$shared/data/bccd" --init "$weights" \
        --workers 8 --seeds 1 --output "$out/bccd"
    times train-bccd-times "$out"/bccd/groups-*
else
    skip train-bccd "DNDETR_SHARED holds no data/bccd, or no weights/${weights##*/}"
fi
for word in "${stages[@]}"; do
    [[ $met == *" $word "* ]] || refuse "there was no stage $word"
done
exit "$failed"

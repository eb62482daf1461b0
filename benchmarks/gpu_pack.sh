#!/usr/bin/env bash
# Makes .gpu/ (ignored): what a bare machine with a GPU of compute capability 9.0, Python 3.12 and no network needs for
# gpu.sh: wheels, the compiled extension, the commit, and
#     shared/      data/bccd and the weights of a ResNet-18, where DNDETR_SHARED (default ../shared) has them
#     official/    the part of the official implementation that is timed, where DNDETR_OFFICIAL names a copy
# It needs nvcc, git and Python 3.12 here, and is to be run again after every change in csrc/ or dndetr/_build.py.
set -euo pipefail
cd "$(dirname "$0")/.."
shared=$(realpath -m "${DNDETR_SHARED:-../shared}") pack=$PWD/.gpu work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$pack"
mkdir -p "$pack/wheels"
git describe --always --dirty >"$pack/commit"

for python in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
    "$python" -V >/dev/null 2>&1 && break
done
"$python" -V >/dev/null || { echo "gpu_pack.sh: there is no Python 3.12 here" >&2 && exit 2; }
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q pybind11 ninja "setuptools<82" wheel

wheel() { # NAME==VERSION
    local from=(--platform any)
    for glibc in 28 17; do
        from+=(--platform "manylinux_2_${glibc}_x86_64")
    done
    "$work/venv/bin/pip" download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${from[@]}" \
        -d "$pack/wheels" "$1"
}
for needed in tyro==1.0.17 typeguard==4.6.1 docstring_parser==0.18.0 pycocotools==2.0.11 safetensors==0.8.0 \
    transformers==5.24.0; do
    wheel "$needed"
done
for peer in deformops==3.0.1 torch-hungarian==0.1.0rc2; do # measured against where they are there
    wheel "$peer" || echo "without $peer"
done

# A build writes beside the sources; a copy keeps this checkout's own as it is.
git ls-files -z --cached --others --exclude-standard | xargs -0 cp -a --parents -t "$work" 
(cd "$work" && DNDETR_BUILD=cuda DNDETR_CUDA_ARCHS=9.0 venv/bin/pip install -q --no-build-isolation --no-deps -e .)
cp "$work"/dndetr/_C.cpython-312-*.so "$work/dndetr/_build_info.json" "$pack/"

carry() { # FROM TO FILE...: files and folders below FROM, where there are such
    local from=$1 to=$2 name
    shift 2
    for name; do
        [ -e "$from/$name" ] || { echo "without $from/$name" && continue; }
        mkdir -p "$(dirname "$pack/$to/$name")"
        cp -rL "$from/$name" "$pack/$to/$name"
    done
}
carry "$shared" shared data/bccd weights/resnet18_imagenet_to_layer3.pt
[ -z "${DNDETR_OFFICIAL:-}" ] || carry "$DNDETR_OFFICIAL" official models util
du -sh "$pack"

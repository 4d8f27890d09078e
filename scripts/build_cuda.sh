#!/usr/bin/env bash
# Builds the binary with the feature `cuda`; needs no GPU, no driver and no root. A CUDA toolkit that is there (CUDA_HOME, or nvcc on
# PATH) is used; else NVIDIA's wheels from the Python package index stand in for one: 1.2 GB in the target directory, fetched once.
# CUDA_COMPUTE_CAP names the GPU: 90, the default, is H100 and H200 alone; 80 is everything since A100.
# Arguments are a command to run in place of the build: scripts/build_cuda.sh cargo clippy --features cuda
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
# without it nvidia-smi is asked, which comes with a driver
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}

# A driver takes the PTX of its own CUDA version and older ones: 13.0 suits every driver for 13, from 580 on.
fetch_toolkit() {
  rm -rf "$1" "$1.part"
  mkdir -p "$1.part"
  python3 -m pip install --quiet --no-deps --only-binary=:all: --target "$1.part" \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35
  # where the wheels put things and what they call them is not what nvcc and the linker look for
  ln -s lib "$1.part/nvidia/cu13/lib64"
  local library
  for library in "$1.part"/nvidia/cu13/lib/lib{cudart,cublas,cublasLt,curand,nvrtc}.so.*; do
    ln -s "${library##*/}" "${library%%.so.*}.so"
  done
  mv "$1.part" "$1"
}

# libcuda comes with the driver and in no wheel. To link, a library with the names that are called is enough; each answers 34,
# CUDA_ERROR_STUB_LIBRARY, so that a program that meets it in a driver's place can say what it met.
make_stub() {
  local manifest
  manifest=$(cargo metadata --locked --format-version 1 --features cuda --filter-platform "$(rustc -vV | sed -n 's/^host: //p')" |
    grep -o '[^"]*/cudarc[^"/]*/Cargo\.toml' | sort -u)
  mkdir -p "$1"
  grep -rohE '\bcu[A-Z][A-Za-z0-9_]+' "${manifest%/*}/src/driver" | sort -u | sed 's/.*/int &(void) { return 34; }/' |
    cc -shared -fPIC -Wl,-soname,libcuda.so.1 -x c -o "$1/libcuda.so.1" -
  ln -sf libcuda.so.1 "$1/libcuda.so"
}

if [[ -n ${CUDA_HOME:-} ]]; then
  from=CUDA_HOME
elif nvcc=$(command -v nvcc); then
  from='nvcc on PATH'
  CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
else
  from=wheels
  CUDA_HOME=$target/cuda-toolkit/nvidia/cu13
  [[ -x $CUDA_HOME/bin/nvcc ]] || fetch_toolkit "$target/cuda-toolkit"
  make_stub "$CUDA_HOME/lib/stubs"
fi
export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"
version=$(nvcc --version | sed -n 4p)
echo "CUDA toolkit: $CUDA_HOME ($from), $version" >&2

if (($#)); then exec "$@"; fi
cargo build --release --locked --features cuda
cat <<END
built: $target/release/safemed
It starts only where the loader finds the libraries of this toolkit and a libcuda.so.1, which an NVIDIA driver brings:
  LD_LIBRARY_PATH=$CUDA_HOME/lib64 $target/release/safemed doctor
END
if [[ -e $CUDA_HOME/lib64/stubs/libcuda.so.1 ]]; then
  echo "Without a driver, add :$CUDA_HOME/lib64/stubs to that path: it then starts, says that there is no GPU and takes the processor."
fi

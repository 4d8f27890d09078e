#!/usr/bin/env bash
# Everything .ci/run checks, then the documentation and, where their toolchains are, the GPU features.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.ci/run
echo '== documentation'
RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --locked
if command -v nvcc >/dev/null; then
  echo '== feature cuda'
  cargo check --features cuda --locked
fi
if [[ $(uname) == Darwin ]]; then
  echo '== features metal, accelerate'
  cargo check --features metal,accelerate --locked
fi

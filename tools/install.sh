#!/usr/bin/env bash
# Installs this checkout into an environment that has PyTorch already (NVIDIA's image, a cluster's
# module), and leaves the PyTorch and NumPy that are there as they are.
#
#   tools/install.sh            with the command line and what evaluates; EXTRAS names others [all]
#   PYTHON=/path/to/python tools/install.sh
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
kept=$(mktemp)
trap 'rm -f "$kept"' EXIT

"$python" - > "$kept" << 'PYTHON'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "numpy", "transformer-engine"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        if name == "torch":
            raise SystemExit("install: error: PyTorch is not here (install it first, for your CUDA)")
PYTHON
"$python" -m pip install --disable-pip-version-check --no-build-isolation --constraint "$kept" \
    "${here}[${EXTRAS:-all}]"
"$python" -m megatron_scalebio --version

#!/usr/bin/env bash
# Runs every check that needs a GPU and writes JSON; --rehearse runs the CPU form of each.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=python3
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
exec "${PYTHON:-$python}" "$root/tools/gpu_check.py" "$@"

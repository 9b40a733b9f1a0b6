#!/usr/bin/env bash
# What only a GPU can show, in one call of at most ten minutes, on a machine with one GPU and no network.
#
#   bash benchmarks/gpu.sh                                # all sections, preset XL
#   bash benchmarks/gpu.sh --sections sampling-compiled   # only this one, with all of the time
#   bash benchmarks/gpu.sh --device cpu --preset T        # a dry run on CPU
#
# PYTHON: the interpreter (default: .venv/bin/python if there is one, else python3)
# WHEELS: a folder with wheels of the packages that it lacks (default: benchmarks/wheels)
# OUT:    the folder of the result, gpu-<date>.json (default: benchmarks/results)
# benchmarks/README.md says what is measured, and how to fill WHEELS.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -n "${PYTHON:-}" ] || { PYTHON=python3; [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python; }
wheels=${WHEELS:-$root/benchmarks/wheels}

# A temporary folder for everything that is installed, compiled and written; it is removed at the end.
work=$(mktemp -d -t ecar-gpu-XXXXXX)
trap 'rm -rf "$work"' EXIT

# Missing packages come from the wheels; installed packages are not replaced.
export PYTHONPATH="$root:$work/site${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" "$root/benchmarks/gpu_packages.py" "$wheels" > "$work/install"
[ ! -s "$work/install" ] || "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --no-compile --target "$work/site" --requirement "$work/install"

export PYTHONUNBUFFERED=1
"$PYTHON" "$root/benchmarks/gpu.py" --work "$work" --out "${OUT:-$root/benchmarks/results}" "$@"

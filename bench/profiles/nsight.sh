#!/usr/bin/env bash
# One kernel of the kernel benchmark under Nsight Compute: what bounds it, and where its cycles go.
#
#   bench/profiles/nsight.sh CASE [KERNEL [SECTION...]]
#
#   CASE      an op of bench/kernel_bench/run.py, or the beginning of a case's name: fused_grpo_loss, "token_logps N=8192"
#   KERNEL    regular expression of the kernel's name; default: every kernel of the case
#   SECTION   of ncu --list-sections; default: SpeedOfLight, MemoryWorkloadAnalysis, Occupancy, WarpStateStats
#
# IMPLEMENTATION (default boxgrpo) chooses the side, as the benchmark's rows name it; PYTHON the interpreter. Where nothing
# is installed, PYTHON=python3 takes the packages that bench/bench.py has linked. The report is written to out/nsight/ for
# ncu-ui. Clocks stay as they are: figures are of the chip as the benchmark finds it.
set -euo pipefail

refuse() {
    echo "nsight.sh: $1" >&2
    exit 1
}

[ $# -ge 1 ] || refuse "no case. Name one, such as: bench/profiles/nsight.sh fused_grpo_loss"
case=$1 kernel=${2:-.*}
shift $(($# < 2 ? $# : 2))
[ $# -gt 0 ] || set -- SpeedOfLight MemoryWorkloadAnalysis Occupancy WarpStateStats
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
implementation=${IMPLEMENTATION:-boxgrpo}
command -v "$python" >/dev/null || refuse "there is no $python. Run make install, or name an interpreter with PYTHON=."
has_boxgrpo() { "$python" -P -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('boxgrpo') is None)"; }
has_boxgrpo || export PYTHONPATH="$PWD/out/site${PYTHONPATH:+:$PYTHONPATH}"
has_boxgrpo || refuse "$python has no boxgrpo. Run make install, or bench/bench.py --gpu, which links the checkout."
command -v ncu >/dev/null || refuse "ncu is not on the PATH. It comes with the CUDA toolkit, as Nsight Compute."
"$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" ||
    refuse "torch sees no GPU here, and ncu reads a GPU's counters. Run it where there is one."

sections=()
for section in "$@"; do sections+=(--section "$section"); done
mkdir -p out/nsight
report=out/nsight/$(printf '%s' "$case $implementation" | tr -cs '[:alnum:]_=\n' -)
# The worker runs once to warm up; what it runs between cudaProfilerStart and Stop is profiled.
ncu --profile-from-start off --clock-control none --kernel-name "regex:$kernel" "${sections[@]}" \
    --force-overwrite --export "$report" \
    "$python" -P -m boxgrpo.bench.kernel_bench.run --once "$case" "$implementation"
# With --export nothing but ncu's own messages is printed: this shows the report.
ncu --import "$report.ncu-rep" --print-summary per-kernel

#!/usr/bin/env bash
# Everything that wants a GPU, in at most eight minutes; needs this checkout and a Python with torch and transformers:
#
#     scripts/gpu_check.sh [--dry-run | --rehearse]
#
# Results go to $OUT (default: out/gpu), each as its part ends: summary.txt, a log a part, bench.json, training.json.
# $PYTHON (default: the one of .venv, else python3) runs it. A part passes, fails or is skipped, and the exit code is 1 if one failed; without a
# CUDA device all are skipped. --dry-run prints the commands; --rehearse runs them in a small size on the CPU, which shows
# that they work and measures nothing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

TOTAL=480
KEPT=15 # of these seconds, for ending what is cut and for writing
TRAINING=75
mode=${1:-}
case $mode in
"" | --dry-run | --rehearse) ;;
*)
    echo "usage: scripts/gpu_check.sh [--dry-run | --rehearse]" >&2
    exit 2
    ;;
esac

if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
python=${PYTHON:-$python}
out=${OUT:-out/gpu}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
SECONDS=0
failed=0
ready=""

left() { echo $((TOTAL - KEPT - SECONDS)); }

say() {
    echo "$1"
    if [ "$mode" != --dry-run ]; then echo "$1" >>"$out/summary.txt"; fi
}

# prints what a part lacks: a device, or modules
lacking() {
    if [ "$ready" != yes ]; then
        echo "${ready:-no CUDA device}"
        return
    fi
    "$python" - "$@" <<'PY'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
print("not installed: " + ", ".join(missing) if missing else "", end="")
PY
}

# part NAME SECONDS "MODULES" COMMAND...
part() {
    local name=$1 limit=$2 modules=$3 began=$SECONDS lacks code
    shift 3
    if [ "$mode" = --dry-run ]; then
        echo "$name, at most $limit s: $*"
        return
    fi
    # shellcheck disable=SC2086  # a list of names
    lacks=$(lacking $modules)
    if [ -n "$lacks" ]; then
        say "SKIP $name: $lacks"
    elif [ "$limit" -lt 15 ]; then
        say "SKIP $name: no time is left"
    else
        timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
        code=$?
        case $code in
        0) say "$(verdict "$out/$name.log") $name, $((SECONDS - began)) s$(counts "$out/$name.log")" ;;
        124 | 137) say "FAIL $name, cut after $((SECONDS - began)) s; what was finished by then is in $out" ;;
        *) say "FAIL $name, $((SECONDS - began)) s, exit code $code$(counts "$out/$name.log"); see $out/$name.log" ;;
        esac
        if [ $code -ne 0 ]; then
            failed=1
            tail -n 15 "$out/$name.log"
        fi
    fi
}

# of a part that ended well: a log of pytest may show that all its tests were skipped
verdict() {
    if grep -qE '^[0-9]+ skipped' "$1"; then echo SKIP; else echo PASS; fi
}

# of pytest's log: how many tests passed and were skipped, and why
counts() {
    grep -E '^[0-9]+ (passed|failed|skipped)' "$1" | sed 's/^/: /'
    grep '^SKIPPED' "$1" | sed 's/^/    /'
}

# the smaller and the larger of two numbers
at_most() { echo $(($1 < $2 ? $1 : $2)); }
at_least() { echo $(($1 > $2 ? $1 : $2)); }

# prints the machine and the versions; fails where there is no device
describe() {
    "$python" - "$mode" <<'PY'
import importlib.util, platform, sys
from importlib.metadata import PackageNotFoundError, version

try:
    import torch
except ImportError as error:
    print(f"torch cannot be imported ({error})")
    sys.exit(1)
found = {"python": platform.python_version()}
for name in ("torch", "transformers", "triton", "flash_attn", "pytest", "hypothesis"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "none"
has = torch.cuda.is_available()
device = torch.cuda.get_device_name() if has else "no CUDA device"
print(device + "; " + ", ".join(f"{name} {number}" for name, number in found.items()))
sys.exit(not has and sys.argv[1] != "--rehearse")
PY
}

# --method NAME of each method that random weights can run: without a processor there is no instruction for CLIP to read
methods() {
    "$python" -c 'from ivtp.registry import list_methods, method_class
print(*(f"--method {name}" for name in list_methods() if not method_class(name).reads_clip))'
}

if [ "$mode" = --dry-run ]; then
    ready=yes
else
    mkdir -p "$out" || exit 1
    : >"$out/summary.txt"
    if about=$(describe); then ready=yes; fi
    say "$about"
fi

tests=("$python" -m pytest -q -ra --tb=short --durations=5 -p no:cacheprovider -o addopts= -m gpu)
# the versions of that machine may warn of what those that are tested do not
tests+=(-W default --disable-warnings)
bench=("$python" -c "from ivtp.cli.app import main; main()" bench --keep 64 --tokens 0 --output "$out/bench.json")
training=("$python" benchmarks/training_throughput.py --output "$out/training.json")
if [ "$mode" = --rehearse ]; then
    bench+=(--geometry micro --layers 1,3 --text 64 --batch 1 --repeats 1 --threads 1 --method ivtp)
    training+=(--device cpu --seconds 1 --photos 2 --stored 2)
else
    bench+=(--geometry llava-1.5-7b --device cuda --text 64 --text 512 --batch 1 --batch 8 --repeats 3)
    if [ "$ready" = yes ]; then read -ra all < <(methods) && bench+=("${all[@]}"); fi
fi

part kernel "$(at_most 130 "$(left)")" "pytest hypothesis triton" "${tests[@]}" tests/core/test_rollout_triton.py
part parity "$(at_most 100 "$(left)")" "pytest hypothesis transformers" "${tests[@]}" tests/test_cuda.py
part bench "$(at_most 300 $(($(left) - TRAINING)))" "transformers accelerate typer rich" "${bench[@]}"
if [ "$mode" != --rehearse ]; then # two stages; what is before and between them takes half a minute
    training+=(--device cuda --seconds "$(at_most 45 "$(at_least 5 $((($(left) - 35) / 2)))")")
fi
part training "$(left)" "transformers accelerate typer rich" "${training[@]}"

if [ "$mode" != --dry-run ]; then
    echo
    cat "$out/summary.txt"
    echo "$SECONDS s in all; results in $out"
fi
exit $failed

#!/usr/bin/env bash
# All that wants a GPU, inside ten minutes: builds, tests, looks for races and stray accesses, times.
#
#     benchmarks/gpu_suite.sh OUT [STEP...]
#
# OUT gets summary.txt (what passed), log.txt (all that was printed) and the times, as JSON and as plots. A step that
# fails, or runs out of its time, stops no other; the exit status is the number of steps that did not pass.
# PYTHON: the interpreter, with torch and triton; COMMIT: what to call the code where there is no git.
set -uo pipefail
if [ $# -eq 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 64
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 73
shift
wanted=" $* "
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
unset TRITON_INTERPRET FUSED_CE_BACKEND
: >"$out/log.txt"
: >"$out/summary.txt"
failed=0

say() { echo "$*" | tee -a "$out/log.txt" "$out/summary.txt"; }

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS status=0 verdict
    shift 2
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    if [ -z "$cuda" ]; then
        verdict="FAILED: no CUDA device"
    else
        printf '\n===== %s: %s\n' "$name" "$*" >>"$out/log.txt"
        # An interrupt first: pytest and the benchmark then still report what they have.
        timeout --signal INT --kill-after 8 "$limit" "$@" >>"$out/log.txt" 2>&1 || status=$?
        case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED: over its $limit s" ;;
        *) verdict="FAILED: exit status $status" ;;
        esac
    fi
    [ "$verdict" = passed ] || failed=$((failed + 1))
    say "$(printf '%-10s %3d s  %s' "$name" $((SECONDS - start)) "$verdict")"
}

say "$(date -u '+%Y-%m-%d %H:%M UTC'), commit ${COMMIT:-$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)}"
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader 2>&1 | head -1)"
say "$("$python" -c 'import platform, torch, triton
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}")' 2>&1 | tail -1)"
cuda=$("$python" -c 'import torch; torch.zeros(1, device="cuda"); print("yes")' 2>/dev/null)

pytest=("$python" -m pytest -q -p no:benchmark -p no:cacheprovider)
# Most of the time goes into compiling small kernels: side by side where pytest-xdist is there.
many=("${pytest[@]}")
"$python" -c 'import xdist' 2>/dev/null && many+=(-n auto)
shapes=8192x128256,8192x50257,8192x32000,8192x151936,8192x262144,4096x4096,1000000x10,65536x1000,64x128256
times=("$python" benchmarks/cross_entropy.py --device cuda --shapes "$shapes" --dtype "bf16,f32" --seconds 0.1)
# Without torch's cache of memory, a step beyond a tensor is a step beyond an allocation.
sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes application-only --error-exitcode 9)
small=("${pytest[@]}" tests/test_cuda.py -k "real_sizes and packed")

step build 50 "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
step report 20 "$python" -m fused_ce
step checks 70 "${many[@]}" tests/test_cuda.py -k "not more_logits"
step times 160 "${times[@]}" --json "$out/times.json" --plot "$out/times.png"
step huge 30 "${pytest[@]}" tests/test_cuda.py -k more_logits
step tests 100 "${many[@]}" tests/test_backends.py tests/test_gpu.py -k triton
step third 80 "${times[@]}" --upstream 0.3333333333333333 --json "$out/third.json" --plot "$out/third.png"
if command -v compute-sanitizer >/dev/null; then
    step memcheck 40 "${sanitizer[@]}" --tool memcheck "${small[@]}"
    step racecheck 40 "${sanitizer[@]}" --tool racecheck "${small[@]}"
else
    say "memcheck, racecheck: not done, there is no compute-sanitizer here"
fi
say "$failed did not pass, $SECONDS s in all"
exit "$failed"

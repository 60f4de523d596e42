#!/usr/bin/env bash
# The C++ under sanitizers: `tests/sanitize.sh [SECONDS]`, whose last lines say what ran and for how long.
#
# In a copy of the tree below build/, because an in-place build would replace the fast module. PYTHON picks the
# interpreter, CXX the compiler of the Python part (g++), CLANG that of the threads' part.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
seconds=${1:-60}
tree=$PWD/build/sanitize
export CXX=${CXX:-g++}

mkdir -p "$tree"
# Times are kept, so that ninja compiles again only what changed.
cp -rpu csrc fused_ce tests docs setup.py pyproject.toml LICENSE README.md CONTRIBUTING.md "$tree"
rm -f "$tree"/fused_ce/_C*.so

# What a minute of compiling buys on 2 cores. The checks of null and object-size multiply that time, and
# AddressSanitizer sees what they would. A trap rather than a message for the same reason: faulthandler says which test.
undefined=signed-integer-overflow,shift,bounds,integer-divide-by-zero,float-cast-overflow,bool,enum,alignment
flags="-O1 -g1 -fsanitize=address,$undefined -fsanitize-undefined-trap-on-error"
case $("$CXX" --version) in
    *clang*) flags+=" -shared-libasan -mllvm -asan-instrumentation-with-call-threshold=0" ;;
    *) flags+=" --param asan-instrumentation-with-call-threshold=0" ;;
esac
(
    cd "$tree"
    export FUSED_CE_BUILD_ISAS=${FUSED_CE_BUILD_ISAS:-base} CXXFLAGS="${CXXFLAGS:-} $flags" LDFLAGS="-fsanitize=address"
    "$python" setup.py --quiet build_ext --inplace
    # Python does not free all it holds at its end, and is not itself linked against the sanitizer.
    export ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:abort_on_error=1 PYTHONFAULTHANDLER=1 PYTHONPATH=$tree
    preload="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libstdc++.so)"
    # A module of the same name that is installed would be tested in its place.
    LD_PRELOAD=$preload "$python" -c "import fused_ce._C as m; assert m.__file__.startswith('$tree'), m.__file__"
    LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider tests/test_cpu.py tests/test_parts.py tests/test_entropy.py -k "not triton and not reference"
    LD_PRELOAD=$preload "$python" tests/fuzz.py "$seconds" "${SEED:-1}" cpu
)
echo "AddressSanitizer and UndefinedBehaviorSanitizer ($("$CXX" --version | head -1)): nothing reported in $SECONDS s"

# libgomp's barriers are unknown to ThreadSanitizer, which would report every loop; archer tells it of libomp's.
clang=${CLANG:-$(command -v clang++ || true)}
archer=$([ -n "$clang" ] && find "$(dirname "$(realpath "$clang")")/../lib" -name 'libarcher.so' 2>/dev/null | head -1 || true)
if [ -z "$archer" ]; then
    echo "ThreadSanitizer: skipped, it needs clang++ and libarcher.so (Debian: apt install clang libomp-dev libclang-rt-14-dev)"
    exit
fi
"$clang" -std=gnu++17 -O1 -g1 -w -fsanitize=thread -fopenmp -Icsrc tests/tsan_driver.cpp csrc/cross_entropy.cpp \
    csrc/dispatch.cpp csrc/memory.cpp csrc/isa/base.cpp -o "$tree/tsan_driver"
OMP_TOOL_LIBRARIES=$archer TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 "$tree/tsan_driver" 2000 1
echo "ThreadSanitizer ($("$clang" --version | head -1)): nothing reported"

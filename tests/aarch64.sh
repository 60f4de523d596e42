#!/usr/bin/env bash
# The core for aarch64, and a wheel of it, made on another processor: errors of loss and gradient under qemu's emulator.
# Needs (Debian) g++-aarch64-linux-gnu and qemu-user; PYTHON is an interpreter with setuptools, ninja and auditwheel.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
export CXX=aarch64-linux-gnu-g++ _PYTHON_HOST_PLATFORM=linux-aarch64
for program in "$CXX" qemu-aarch64; do
    command -v "$program" > /dev/null || { echo "$program is missing: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
done
rm -rf build/aarch64
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/aarch64 .
"$python" -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/aarch64/*.whl

objects=$(dirname build/ninja-linux-aarch64-*/build.ninja)
"$CXX" -std=gnu++17 -O2 -fopenmp -Icsrc tests/core_driver.cpp "$objects"/{cross_entropy,dispatch,memory,base}.o \
    -o build/aarch64/core_driver
qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/core_driver

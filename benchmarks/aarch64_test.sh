#!/bin/sh
# Cross-compiles the kernels and the op library for aarch64 and runs the kernels' test program under qemu-user.
#
#     sh benchmarks/aarch64_test.sh [FOLDER]
#
# FOLDER keeps the build (a temporary one is removed). The program runs twice: on a processor with the dot product,
# where the NEON table has to be chosen and is tested against the scalar one, and on one without, where it must not be.
# Ends with one line that says what came out; exit code 77 when a package is missing, 1 when something failed.
set -eu

sources=$(cd "$(dirname "$0")/../engines/ort/kernels" && pwd)
prefix=aarch64-linux-gnu

missing=
command -v "$prefix-g++" >/dev/null || missing="$missing g++-$prefix"
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || missing="$missing qemu-user-static"
command -v cmake >/dev/null || missing="$missing cmake"
if [ -n "$missing" ]; then
    echo "aarch64: not tested, missing:$missing. Debian and Ubuntu: apt-get install$missing" >&2
    exit 77
fi

if [ $# -gt 0 ]; then
    build=$1
else
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    trap 'exit 1' HUP INT TERM
fi
mkdir -p "$build"
log=$build/build.log
# -static: qemu then needs no aarch64 libraries. no-undefined: a symbol that only the x86 build has must not pass. -O2
# reaches the test program only (kernels and op library set -O3 themselves), on which GCC 12 for aarch64 crashes at -O3,
# in its vectoriser.
if ! {
    cmake -S "$sources" -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_CXX_COMPILER="$prefix-g++" -DCMAKE_CXX_FLAGS_RELEASE="-O2 -DNDEBUG" -DCMAKE_EXE_LINKER_FLAGS=-static \
        -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--no-undefined &&
        cmake --build "$build" --parallel "${JOBS:-2}" --target kernels_test gptoss_ort_ops
} >"$log" 2>&1; then
    cat "$log" >&2
    echo "aarch64: FAILED, does not compile" >&2
    exit 1
fi
warnings=$(grep -c 'warning:' "$log" || true)
library=$build/libgptoss_ort_ops.so
if ! "$prefix-nm" -D --defined-only "$library" | grep -q ' RegisterCustomOps$'; then
    echo "aarch64: FAILED, $library does not export RegisterCustomOps" >&2
    exit 1
fi

# on CPU TABLE: the test program on that processor; fails unless TABLE is the one that it chooses there.
on() {
    if ! output=$(env -u GPTOSS_EXPORT_ISA "$qemu" -cpu "$1" "$build/kernels_test" 2>&1) ||
        ! printf '%s\n' "$output" | grep -qx "select(): $2"; then
        printf '%s\n' "$output" | tail -n 20 >&2
        echo "aarch64: FAILED on $1, where $2 has to be chosen" >&2
        exit 1
    fi
    echo "$1: $2 chosen, $(printf '%s\n' "$output" | tail -n 1)"
}

with_dot=$(on max neon)
without=$(on cortex-a53 scalar)
echo "aarch64: op library built ($warnings warnings); kernels_test under $(basename "$qemu"): $with_dot; $without"

#!/usr/bin/env bash
# The self-test of the CPU kernels (kernels/cpu/selftest.cpp) in ways that CI has no time for.
#
#   scripts/check_kernels.sh fuzz [cases]    100 000 random cases under AddressSanitizer and UBSan: ten minutes
#   scripts/check_kernels.sh threads         ThreadSanitizer
#   scripts/check_kernels.sh neon [cases]    cross-compiled for aarch64 and run under qemu; its results have the same
#                                            digest as this machine's
#
# neon needs g++-aarch64-linux-gnu and qemu-user (Debian's names); exit status 77: they are missing.
set -euo pipefail
cd "$(dirname "$0")/.."

# build <folder> <cmake options>: builds the self-test there, says its path.
build() {
  local folder=build/$1
  cmake -S . -B "$folder" -DFLASHMOE_PYTHON=OFF "${@:2}" >/dev/null
  cmake --build "$folder" --target selftest --parallel "$(nproc)" >/dev/null
  echo "$folder/kernels/cpu/selftest"
}

case ${1:-} in
  fuzz)
    test=$(build selftest -DFLASHMOE_SANITIZE=address,undefined)
    "$test" --cases "${2:-100000}"
    ;;
  threads)
    test=$(build selftest-threads -DFLASHMOE_SANITIZE=thread)
    "$test" --cases "${2:-1000}"
    ;;
  neon)
    for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
      command -v $tool >/dev/null || { echo "needs $tool" >&2; exit 77; }
    done
    cases=${2:-1000}
    here=$(build selftest-plain)
    there=$(build selftest-neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
      -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static)
    wanted=$("$here" --cases "$cases") || { echo "$wanted"; exit 1; }
    found=$(qemu-aarch64 -cpu max "$there" --cases "$cases") || { echo "$found"; exit 1; }
    printf '%s\n' "$wanted" "$found"
    expected=$(sed -n 's/.*digest //p' <<<"$wanted")
    grep -q ' neon ' <<<"$found" || { echo "neon did not run" >&2; exit 1; }
    grep -q "^passed: .* digest $expected\$" <<<"$found" || { echo "other results on aarch64" >&2; exit 1; }
    ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac

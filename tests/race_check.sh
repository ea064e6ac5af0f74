#!/usr/bin/env bash
# race_check.sh FOLDER...: are there races for shared memory in the GPU's kernels, of reductions, merges
# and attention? The tests of each folder under compute-sanitizer's racecheck, if it is installed. Says
# what ran. Exit status 1 if a race was found or a test failed.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
sanitizer=$(command -v compute-sanitizer || find /usr/local/cuda/ -name compute-sanitizer -type f 2>/dev/null | head -n 1)
if [ -z "$sanitizer" ]; then
  echo "race_check: compute-sanitizer is not installed: nobody has looked for races"
  exit 0
fi
faults=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
race() {  # race PROGRAM TESTS KERNELS: the kernels with that in their names
  # A kernel that is not there has no races.
  if grep -q "$3" "$1" && "$sanitizer" --tool racecheck --error-exitcode 9 --kernel-name kns="$3" "$1" --gtest_brief=1 \
    --gtest_filter="$2" >"$log" 2>&1 && grep -q 'PASSED.* [1-9]' "$log" && ! grep -q SKIPPED "$log"; then
    echo "racecheck, $1, $2: $(grep -o 'RACECHECK SUMMARY.*' "$log")"
  else
    faults=$((faults + 1)) && echo "FAILED: racecheck, $1, $2" && tail -n 20 "$log"
  fi
}
for folder; do
  race "$folder/math_test" 'Teams.*' team_kernel
  # All of them: where kernels on clusters are left out, racecheck of CUDA 13.0 fails as they begin.
  race "$folder/mvsplit_test" 'Merge.A*' _kernel
  race "$folder/dit_test" 'Attention.OnTensorCores*' attention_
done
[ "$faults" -eq 0 ]

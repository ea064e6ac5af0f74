#!/usr/bin/env bash
# Runs the test programs in the folders $@ and adds up. Last line: "N passed, N failed, N skipped".
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
passed=0 failed=0 skipped=0
for test in ${@/%//*_test}; do
  [ $# -eq 1 ] || echo "== $test"
  log=$(mktemp)
  "$test" --gtest_brief=1 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  count() { sed -n "s/^\[  $1 *\] \([0-9]*\) tests\?[.,].*/\1/p" "$log" | tail -n 1; }
  p=$(count PASSED) f=$(count FAILED) s=$(count SKIPPED)
  # A program that died, or failed without a failed test, counts as one failure.
  [ "$status" -eq 0 ] || [ "${f:-0}" -gt 0 ] || f=1
  passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0})) skipped=$((skipped + ${s:-0}))
  rm -f "$log"
done
[ $((passed + failed)) -gt 0 ] || failed=1
# Each of these counts as one test: NOTES.md's table of equations, the scripts, runs that are killed, a
# run's page, the way to PyTorch and back, training over several processes there, the notebook, samples.
check() {
  bash "tests/$1_check.sh" "${@:2}"
  case $? in
    0) passed=$((passed + 1)) ;;
    77) skipped=$((skipped + 1)) ;;
    *) failed=$((failed + 1)) ;;
  esac
}
check notes
check scripts "$1/mvsplit"
check kill "$1/mvsplit"
check page "$1/mvsplit"
check convert "$1/mvsplit"
check fsdp "$1/mvsplit"
check notebook "$1/mvsplit"
check quality "$1/mvsplit"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]

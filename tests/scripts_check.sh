#!/usr/bin/env bash
# scripts_check.sh PROGRAM: the scripts that run and draw experiments, in a clone whose path has a blank,
# where numbers have decimal commas, with every awk that is there, without gnuplot, and with nvidia-smi
# but no GPU. Exit status 1 and a line a fault otherwise.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
export OMP_NUM_THREADS=1
faults=0
fault() {
  echo "scripts_check: $1"
  faults=$((faults + 1))
}
for script in data/*.sh tests/*.sh .ci/run; do
  grep -q '^export LC_ALL=C' "$script" || fault "$script does not set its locale"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
clone="$work/a clone" bin=$work/bin
mkdir -p "$clone/build" "$bin" "$work/locales"
cp -r data "$clone"
ln -s "$(realpath "$1")" "$clone/build/mvsplit"
ln -sf /bin/* /usr/bin/* "$bin"
printf '#!/bin/sh\necho "NVIDIA-SMI has failed because it has no driver."; exit 9\n' >"$work/nvidia-smi"
rm -f "$bin"/{nvidia-smi,gnuplot}
install -m 755 "$work/nvidia-smi" "$bin"

# A locale with a decimal comma, of ASCII: localedef comes without any.
printf '%s\n' '<code_set_name> ASCII' '<comment_char> %' '<escape_char> /' '<mb_cur_min> 1' '<mb_cur_max> 1' \
  CHARMAP '<U0000>..<U007F> /x00 x' 'END CHARMAP' >"$work/ascii"
printf '%s\n' 'comment_char %' 'escape_char /' LC_NUMERIC 'decimal_point "<U002C>"' 'thousands_sep ""' \
  'grouping -1' 'END LC_NUMERIC' >"$work/comma"
localedef -c -f "$work/ascii" -i "$work/comma" "$work/locales/comma" >/dev/null 2>&1
export LOCPATH=$work/locales
[ "$(LC_ALL=comma locale decimal_point)" = , ] || echo "scripts_check: no locale with a decimal comma: not tried"

experiment() { (cd "$work" && bash "$clone/data/experiment.sh" "$@"); }
# redrawn LOCALE NAME: all tables into $work/NAME, all figures anew.
redrawn() {
  rm -rf "$clone"/data/figures/*.png
  LC_ALL=$1 REDRAW=1 experiment all >"$work/$2" 2>"$work/log" ||
    fault "$2: drawing failed: $(tail -n 1 "$work/log")"
}
redrawn C points
cp -r "$clone/data/figures" "$work/figures"
redrawn comma commas
cmp "$work/points" "$work/commas" || fault "tables change where numbers have commas"
diff -r "$work/figures" "$clone/data/figures" || fault "figures change where numbers have commas"
usual=$(command -v awk)
PATH=$bin
for awk in mawk gawk original-awk busybox; do
  awk=$(command -v $awk) || continue
  ln -sf "$awk" "$bin/awk"
  awk 'BEGIN { print log(2) }' >/dev/null 2>&1 || continue  # a busybox without mathematics
  redrawn comma "$(basename "$awk")"
  cmp "$work/points" "$work/$(basename "$awk")" || fault "tables are others with $awk"
done

ln -sf "$usual" "$bin/awk"
# The numbers that were found are the data's; one that is not fails.
cp README.md "$clone"
results=$clone/data/experiments/RESULTS.md
recomputed() { bash "$clone/data/experiments/results.sh" >"$work/log" 2>&1; }
recomputed || fault "results: $(head -n 1 "$work/log")"
cp "$results" "$work/results"
for wrong in 's/trains to 0.449/trains to 0.448/' 's/^| 316 | 1.15/| 316 | 1.16/' 's/one spike at/one of 3 spikes at/'; do
  sed "$wrong" "$work/results" >"$results"
  cmp -s "$work/results" "$results" && fault "results: nothing to $wrong"
  recomputed && fault "results: passes after $wrong"
done

# A run from its start to its csv files; then there is nothing to do.
LC_ALL=comma SCALE=tiny experiment scream >"$work/log" 2>&1 || fault "scream: $(tail -n 1 "$work/log")"
for file in "$clone"/experiments/tiny/figures/csv/*.csv.gz; do
  gzip -dc "$file" | awk -F, 'NR == 1 { n = NF } NF != n { exit 1 } END { exit NR < 2 }' ||
    fault "a row of $(basename "$file") has not as many fields as the first"
done
SCALE=tiny experiment scream >"$work/again" 2>&1 || fault "scream's second call failed"
grep -q 'runs to do' "$work/again" && fault "scream ran again"

# refused WORD COMMAND...: with a sentence that has the WORD, behind `who`.
who="experiment: "
refused() {
  local word=$1 status=0
  shift
  "$@" >"$work/log" 2>&1 || status=$?
  grep -q "^$who.*$word" "$work/log" || status="no word of it"
  [ "$status" = 2 ] || fault "not refused ($status): $*: $(tail -n 1 "$work/log")"
}
# At this speed all but the quick versions takes days.
printf '%s\n' "CPU, $(nproc) threads" "width=48 heads=2 ffn=144 patch=4 batch=16 10.0 20.0 1.0" >"$clone/experiments/speed"
for name in frontier thousand front one-branch probe ablations pictures lean size; do
  QUICK=1 refused "takes about [1-9].*YES=1" experiment $name
done
refused "takes about [1-9].*YES=1.*QUICK=1" experiment thousand
refused "frontier thousand" experiment screm
refused "frontier thousand" experiment draw
refused "frontier thousand" experiment
JOBS=0 refused "JOBS" experiment scream
[ -z "$(find "$clone/experiments" -name '*.ini' ! -path '*/tiny/*')" ] || fault "what was refused left its configuration"
flock "$clone/experiments/lock" sleep 4 &
sleep 0.5
refused "another" experiment scream
wait
# What is no run, and a page that would take the place of something else.
who="" run=$(dirname "$(find "$clone/experiments/tiny" -name log.csv | head -n 1)")
refused "name the folder" bash data/page.sh
refused "no log.csv" bash data/page.sh "$work"
refused "no regular file" bash data/page.sh "$run" "$work"
refused "no folder" bash data/page.sh "$run" "$work/none/page.html"
refused "no log.csv" bash data/curve.sh "$work"
refused "no log.csv" bash data/curve.sh
(cd "$work" && bash "$clone/data/page.sh" "$run" -page.html >/dev/null && [ -s ./-page.html ]) || fault "no -page.html"
echo "scripts_check: $faults faults"
[ $faults = 0 ]

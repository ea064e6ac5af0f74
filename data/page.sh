#!/usr/bin/env bash
# Writes a run on one page: RUN/page.html, or PAGE, under a TITLE (default: RUN's name), from what train
# left in RUN: config.ini, log.csv, and, if they are there, validation.csv, diagnostics.csv, spike_*.txt
# and samples*.png. data/page.html is the page without a run. Long runs are thinned: the page stays under
# 2 MB.
#   page.sh RUN [PAGE [TITLE]]
set -euo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
die() { echo "$1" >&2; exit 2; }
[ -n "${1:-}" ] || die "page.sh RUN [PAGE [TITLE]]: name the folder of a run"
run=$1
page=${2:-$run/page.html}
case $run in /*) ;; *) run=./$run ;; esac  # awk takes a=b for an assignment
case $page in /*) ;; *) page=./$page ;; esac  # mv takes -q for an option
[ -d "$run" ] || die "there is no folder $1"
[ -s "$run/log.csv" ] || die "$1 has no log.csv: train has not run there"
[ -f "$page" ] || [ ! -e "$page" ] || die "${page#./} is no regular file: name another page"
[ -d "${page%/*}/" ] || die "there is no folder ${page%/*} for the page"
title=${3:-$(basename -- "$(cd -- "$run" && pwd)")}

escaped() { sed 's/&/\&amp;/g; s/</\&lt;/g'; }

# At most 3000 rows of log.csv: of steps taken together the mean loss and the largest norm.
log() {
  awk -F, 'NR == FNR { n = FNR - 1; next }
    FNR == 1 { print; bin = int((n + 2999) / 3000); next }
    { if ($2 !~ /^-?[0-9]/) odd = $2  # NaN, of which each awk makes something else
      sum += $2
      if (norm == "" || $3 !~ /^[0-9]/ || (norm ~ /^[0-9]/ && $3 + 0 > norm + 0)) norm = $3
      if (++k < bin && FNR <= n) next
      print $1 "," (odd != "" ? odd : k > 1 ? sum / k : $2) "," norm (NF > 3 ? "," $4 : "")
      k = sum = 0; norm = odd = "" }' \
    "$run/log.csv" "$run/log.csv" | escaped
}

# diagnostics.csv in short: its comments, the names, "@STEP" and a line "LAYER CODES" for each of its
# layers. At most `most` numbers: if there are more, of 64 layers, and of as many steps as that leaves.
diagnostics() {
  [ -s "$run/diagnostics.csv" ] || return 0
  awk -F, -v most=430000 '
    # Three characters: 0 nan, 1 zero, 2 + 900 (2 (exponent + 99) + sign) + three digits, 262143 infinity.
    function code(x,  s, e, n) {
      if (x ~ /nan/) n = 0
      else if (x ~ /inf/) n = 262143  # of either sign
      else {
        s = sprintf("%.2e", x); negative = sub(/^-/, "", s); e = substr(s, 6) + 0
        if (s ~ /^0/ || e < -99) n = 1
        else if (e > 45) n = 262143
        else n = 2 + 900 * (2 * (e + 99) + negative) + (substr(s, 1, 1) substr(s, 3, 2)) - 100 }
      return digit[int(n / 4096)] digit[int(n / 64) % 64] digit[n % 64] }
    BEGIN { for (i = 0; i < 64; i++)
      digit[i] = substr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", i + 1, 1) }
    # Is the i-th of n one of the m that are kept, evenly from the first to the last?
    function kept(i, n, m,  j) {
      if (m >= n) return 1
      j = m > 1 ? int((i - 1) * (m - 1) / (n - 1) + 0.5) : 0
      return int((m > 1 ? j * (n - 1) / (m - 1) : 0) + 1.5) == i }
    /^#/ { if (NR != FNR) print; next }
    $1 !~ /^[0-9]/ { columns = NF - 2; if (NR != FNR) begin(); next }
    NR == FNR {
      if (!($1 in step)) step[$1] = ++steps
      if (!($2 in layer)) layer[$2] = ++layers
      next }
    kept(step[$1], steps, most_steps) && kept(layer[$2], layers, most_layers) {
      if ($1 != last) print "@" (last = $1)
      row = $2 " "
      for (i = 3; i <= NF; i++) row = row code($i)
      print row }
    function begin() {
      most_layers = layers; most_steps = steps
      if (layers * steps * columns > most) {
        if (layers > 64) most_layers = 64
        most_steps = int(most / columns / most_layers)
        if (most_steps > steps) most_steps = steps
        if (most_steps < 1) most_steps = 1
        print "# This page has " most_layers " of " layers " diagnosed layers and " most_steps " of " steps \
          " diagnosed steps, evenly taken." }
      print }' "$run/diagnostics.csv" "$run/diagnostics.csv" | escaped
}

# The reports of spikes.
spikes() {
  local file
  for file in "$run"/spike_*.txt; do
    [ -s "$file" ] || continue
    echo "<details data-step=\"$(sed -n '1s/^Spike at step \([0-9]*\).*/\1/p' "$file")\"><summary>"
    head -n 2 "$file" | escaped
    echo "</summary><pre>"
    tail -n +3 "$file" | escaped
    echo "</pre></details>"
  done
}

# Samples: those of the end, and, as far as 300 kB allow, those of steps before it.
samples() {
  local file step bytes left=300000 last
  last=$(tail -n 1 "$run/log.csv" | cut -d, -f1)
  for file in "$run/samples.png" "$run"/samples_*.png; do
    [ -s "$file" ] || continue
    bytes=$(wc -c <"$file") step=${file##*/samples} step=${step%.png} step=${step#_}
    [[ $step =~ ^[0-9]*$ ]] || continue  # somebody else's picture
    [ "$bytes" -le "$left" ] || continue
    [ -z "$step" ] || [ ! -s "$run/samples.png" ] || [ "$((10#$step))" != "$last" ] || continue
    left=$((left - bytes))
    echo "<img class=\"sample\" alt=\"samples\" data-step=\"${step:-$last}\" src=\"data:image/png;base64,"
    base64 <"$file"
    echo "\">"
  done
}

put() {
  case $1 in
    title) printf '%s\n' "$title" | escaped ;;
    config) [ ! -s "$run/config.ini" ] || escaped <"$run/config.ini" ;;
    log) log ;;
    validation) [ ! -s "$run/validation.csv" ] || escaped <"$run/validation.csv" ;;
    *) "$1" ;;
  esac
}
trap 'rm -f -- "$page.tmp"' EXIT
while IFS= read -r line; do
  case $line in
    '<!-- put '*' -->') line=${line#<!-- put } && put "${line% -->}" ;;
    *) printf '%s\n' "$line" ;;
  esac
done <"$(dirname "$0")/page.html" >"$page.tmp"
tail -n 1 "$page.tmp" | grep -q '^</html>' || { echo "$page was not written" >&2; exit 1; }
mv -- "$page.tmp" "$page"
echo "the whole run on one page, for a browser: ${page#./}"

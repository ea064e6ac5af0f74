#!/usr/bin/env bash
# Writes a run on one page: RUN/page.html, or PAGE, under a TITLE (default: RUN's name), from what train
# left in RUN: config.ini, log.csv, and, if they are there, validation.csv, diagnostics.csv, spike_*.txt
# and samples*.png. data/page.html is the page without a run. Long runs are thinned, and the page says so:
# it stays under 2 MB.
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
file=$(readlink -f -- "$page") || die "${page#./} leads nowhere: name another page"
title=${3:-$(basename -- "$(cd -- "$run" && pwd)")}

escaped() { sed 's/&/\&amp;/g; s/</\&lt;/g'; }

# The lines of the run's FILE: a last one without its end was cut off, and so may be its last number.
whole() {
  [ -s "$run/$1" ] || return 0
  if [ -z "$(tail -c 1 "$run/$1" | tr -d '\000')" ]; then cat "$run/$1"; else sed '$d' "$run/$1"; fi
}

# Of what is read the lines that BYTES have room for.
at_most() {
  LC_ALL=C awk -v most="$1" '
    full || (n += length($0) + 1) > most { full = 1; next }
    { print }
    END { if (full) print "# The rest is not on this page." }'
}

functions='
  function number(x) { return x ~ /^[-+]?[0-9.]+([eE][-+]?[0-9]+)?\r?$/ }
  # Is the i-th of n one of the m that are kept, evenly from the first to the last?
  function kept(i, n, m,  j) {
    if (m >= n) return 1
    if (m < 2) return m == 1 && i == n
    j = int((i - 1) * (m - 1) / (n - 1) + 0.5)
    return int(j * (n - 1) / (m - 1) + 1.5) == i
  }'

# How many rows of the csv FILE are taken together if there are to be MOST.
together() { whole "$1" | awk -F, -v most="$2" '$1 ~ /^[0-9]+$/ { n++ } END { print int((n + most - 1) / most) }'; }

# At most MOST rows of the csv FILE: of those taken together the last step, the largest norm, the mean of
# what else there is. What is missing stays blank, and what is no number is not hidden by those that are.
thinned() {
  whole "$1" | awk -F, -v bin="$(together "$1" "$2")" "$functions"'
    function row(  i, text) {
      text = step
      for (i = 2; i <= columns; i++) { text = text "," shown[i]; shown[i] = ""; n[i] = sum[i] = 0 }
      print text; k = 0 }
    !columns { columns = NF < 4 ? NF : 4; for (i = 2; i <= columns; i++) name[i] = $i; print; next }
    $1 !~ /^[0-9]+$/ { next }
    { step = $1
      for (i = 2; i <= columns; i++) {
        if ($i == "" || (shown[i] != "" && !number(shown[i]))) continue
        if (!number($i)) shown[i] = $i
        else if (name[i] !~ /norm/) { sum[i] += $i; shown[i] = n[i]++ ? sum[i] / n[i] : $i }
        else if (shown[i] == "" || $i + 0 > shown[i] + 0) shown[i] = $i }
      if (++k == bin) row() }
    END { if (k) row() }' | escaped
}

# Of the lines "BYTES STEP FILE" those that BYTES have room for, evenly from the first step to the last.
chosen() {
  sort -n -k 2,2 | awk -v most="$1" "$functions"'
    NF { line[++n] = $0; bytes[n] = $1 }
    END {
      for (m = n; m; m--) {
        sum = 0
        for (i = 1; i <= n && sum <= most; i++) if (kept(i, n, m)) sum += bytes[i]
        if (sum <= most) break }
      for (i = 1; i <= n; i++) if (kept(i, n, m)) print line[i] }'
}

# The reports of spikes; of each as much as this.
report_bytes=20000
reports() {
  local path step
  for path in "$run"/spike_*.txt; do
    [ -s "$path" ] && [[ $path =~ /spike_[0-9]+\.txt$ ]] || continue
    step=$(sed -n '1s/^Spike at step \([0-9]\{1,\}\).*/\1/p' "$path")
    [ -z "$step" ] || echo "$(escaped <"$path" | at_most "$report_bytes" | wc -c) $step ${path##*/}"
  done
}
spikes() {
  local step name
  while read -r _ step name; do
    echo "<details data-step=\"$step\"><summary>"
    head -n 2 "$run/$name" | escaped | at_most 1000
    echo "</summary><pre>"
    tail -n +3 "$run/$name" | escaped | at_most "$report_bytes"
    echo "</pre></details>"
  done < <(grep . <<<"$chosen_reports")
}

# Samples: those of the end, and those of steps before it.
last=$(whole log.csv | awk -F, '$1 ~ /^[0-9]+$/ { step = $1 } END { print step }')
pictures() {
  local path step
  for path in "$run/samples.png" "$run"/samples_*.png; do
    step=${path##*/samples} step=${step%.png} step=${step#_}
    [ -s "$path" ] && [[ $step =~ ^[0-9]*$ ]] || continue  # somebody else's picture
    step=${step:+$((10#$step))}
    [ -z "$step" ] || [ ! -s "$run/samples.png" ] || [ "$step" != "$last" ] || continue
    echo "$(wc -c <"$path") ${step:-${last:-end}} ${path##*/}"
  done
}
samples() {
  local step name
  while read -r _ step name; do
    echo "<img class=\"sample\" alt=\"samples\" data-step=\"$step\" src=\"data:image/png;base64,"
    base64 <"$run/$name"
    echo "\">"
  done < <(grep . <<<"$chosen_pictures")
}

# diagnostics.csv in short: its comments, the names, "@STEP" and a line "LAYER CODES" for each of its
# layers. At most `most` numbers: if there are more, of 64 layers, and of as many steps as that leaves,
# those with a report of a spike first.
diagnostics() {
  [ -s "$run/diagnostics.csv" ] || return 0
  awk -F, -v most=380000 -v reports="$(cut -d' ' -f2 <<<"$chosen_reports" | xargs)" "$functions"'
    # Three characters: 0 nan, 1 zero, 2 + 900 (2 (exponent + 99) + sign) + three digits, 262143 infinity.
    function code(x,  s, e, n, negative) {
      if (x ~ /inf/) n = 262143  # of either sign
      else if (!number(x)) n = 0
      else {
        s = sprintf("%.2e", x); negative = sub(/^-/, "", s); e = substr(s, 6) + 0
        if (s ~ /^0/ || e < -99) n = 1
        else if (e > 45) n = 262143
        else n = 2 + 900 * (2 * (e + 99) + negative) + (substr(s, 1, 1) substr(s, 3, 2)) - 100 }
      return digit[int(n / 4096)] digit[int(n / 64) % 64] digit[n % 64] }
    BEGIN {
      for (i = 0; i < 64; i++)
        digit[i] = substr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", i + 1, 1)
      for (i = split(reports, list, " "); i; i--) reported[list[i] + 0] }
    /^#/ { if (NR != FNR && ++comments <= 200) print substr($0, 1, 300); next }
    $1 == "step" && !columns { columns = NF - 2 }
    $1 == "step" && NR != FNR && !begun++ { begin() }
    $1 !~ /^[0-9]+$/ || $2 !~ /^[0-9]+$/ { next }
    NR == FNR {
      if (!($1 in step)) { step[$1] = ++steps; if ($1 in reported) spike[$1] = ++spikes }
      if (!($2 in layer)) layer[$2] = ++layers
      next }
    begun && ($1 in shown) && kept(layer[$2], layers, most_layers) {
      if ($1 != last) print "@" (last = $1)
      row = $2 " "
      for (i = 3; i <= columns + 2; i++) row = row code($i)
      print row }
    function begin(  most_steps, most_spikes, s) {
      most_layers = layers; most_steps = steps
      if (layers * steps * (columns + 2) > most) {  # 2: what a row has besides
        if (layers > 64) most_layers = 64
        most_steps = int(most / (columns + 2) / most_layers)
        if (most_steps > steps) most_steps = steps
        if (most_steps < 1) most_steps = 1 }
      most_spikes = spikes < most_steps / 2 ? spikes : int(most_steps / 2)
      for (s in spike) if (kept(spike[s], spikes, most_spikes)) shown[s]
      if (most_steps < steps) most_steps -= most_spikes
      for (s in step) if (kept(step[s], steps, most_steps)) shown[s]
      n = 0
      for (s in shown) n++
      if (n < steps || most_layers < layers)
        print "# This page has " most_layers " of " layers " diagnosed layers and " n " of " steps \
          " diagnosed steps, evenly taken" (most_spikes ? ", and those with a report of a spike." : ".")
      print }' <(whole diagnostics.csv) <(whole diagnostics.csv) | escaped
}

# What is not on the page, beside what diagnostics() says.
counted() {
  local n of
  n=$(together log.csv $most_rows)
  [ "$n" -le 1 ] || echo "Rows of log.csv are taken together, $n at a time: the mean loss, the largest norm."
  n=$(together validation.csv $most_checks)
  [ "$n" -le 1 ] || echo "Rows of validation.csv are means of $n."
  n=$(grep -c . <<<"$chosen_reports") of=$(grep -c . <<<"$all_reports") || true
  [ "$n" = "$of" ] || echo "Here are $n of $of reports of spikes."
  n=$(grep -c . <<<"$chosen_pictures") of=$(grep -c . <<<"$all_pictures") || true
  [ "$n" = "$of" ] || echo "Here are $n of $of pictures of samples."
}

most_rows=3000 most_checks=1000
all_reports=$(reports) all_pictures=$(pictures)
chosen_reports=$(chosen 100000 <<<"$all_reports") chosen_pictures=$(chosen 300000 <<<"$all_pictures")
put() {
  case $1 in
    title) printf '%s\n' "$title" | escaped ;;
    config) [ ! -s "$run/config.ini" ] || escaped <"$run/config.ini" | at_most 20000 ;;
    log) thinned log.csv $most_rows ;;
    validation) thinned validation.csv $most_checks ;;
    *) "$1" ;;
  esac
}
trap 'rm -f -- "$file.$$.tmp"' EXIT  # beside the page, under a name of its own: others may write it too
while IFS= read -r line; do
  case $line in
    '<!-- put '*' -->') line=${line#<!-- put } && put "${line% -->}" ;;
    *) printf '%s\n' "$line" ;;
  esac
done <"$(dirname "$0")/page.html" >"$file.$$.tmp"
tail -n 1 "$file.$$.tmp" | grep -q '^</html>' || { echo "$page was not written" >&2; exit 1; }
mv -- "$file.$$.tmp" "$file"
echo "the whole run on one page, for a browser: ${page#./}"

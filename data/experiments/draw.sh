# What recipes draw with: data/experiment.sh sources it. Everything is read from the packed csv files.
# shellcheck shell=bash disable=SC2154  # root, figures, csv, experiment, work: the driver's

# The packed file $1 (runs, losses, diagnostics) of experiment $2, by default the present one.
unpacked() {
  local file=$csv/${2:-$experiment}_$1.csv.gz
  [ -e "$file" ] || die "there is no $file to draw from: run ${2:-$experiment} first"
  gzip -dc "$file"
}

# Puts one run's losses and diagnostics into $work/RUN as train would have written them: log.csv,
# diagnostics.csv. $2: its experiment.
unpack() {
  local file
  mkdir -p "$work/$1"
  for file in losses diagnostics; do
    [ ! -e "$csv/${2:-$experiment}_$file.csv.gz" ] ||
      unpacked "$file" "${2:-}" | awk -F, -v run="$1" 'NR == 1 || $1 == run { sub(/^[^,]*,/, ""); print }' \
        >"$work/$1/$file.csv"
  done
  mv "$work/$1/losses.csv" "$work/$1/log.csv"
}

# For awk: quantile(a, n, p) of a[1..n], which it sorts; interpolated between neighbours.
statistics='
function sort_numbers(a, n,  i, j, x) {
  for (i = 2; i <= n; i++) {
    x = a[i]
    for (j = i - 1; j > 0 && a[j] > x; j--) a[j + 1] = a[j]
    a[j + 1] = x } }
function quantile(a, n, p,  at, low) {
  sort_numbers(a, n)
  at = 1 + p * (n - 1); low = int(at)
  return low < n ? a[low] + (at - low) * (a[low + 1] - a[low]) : a[n] }
'

# The group of a run: its name without the seed.
group='function group(run) { sub(/_[0-9]+$/, "", run); return run }'

# For gnuplot. Colours are told apart also by those who do not see red and green alike.
style='
set datafile separator ","
set datafile missing "nan"
set style line 1 lw 1.8 lc rgb "#c0392b"
set style line 2 lw 1.8 lc rgb "#e08b1a"
set style line 3 lw 1.8 lc rgb "#1f9e89"
set style line 4 lw 1.8 lc rgb "#3b6fb6"
set style line 5 lw 1.8 lc rgb "#440154"
set style line 6 lw 1.8 lc rgb "#7f7f7f"
set style line 7 lw 1.8 lc rgb "#b0679e"
set style line 8 lw 1.8 lc rgb "#8c9a2b"
set style line 9 lw 1.8 lc rgb "#5ab4d6"
set border 3 lw 0.8 lc rgb "#505050"
set tics nomirror scale 0.5
set grid lw 0.5 lc rgb "#d8d8d8"
set xlabel "step"
set title font ",12"
'

# --- Tables ----------------------------------------------------------------------------------------

# A line for each group of runs: how many seeds, how many of them trained and what became of the
# others, losses as mean and range.
results_table() {
  echo "| run | seeds | trained | collapse at step, or other outcome | loss, last 25 steps | best of 25 steps | validation loss |"
  echo "|---|---|---|---|---|---|---|"
  unpacked runs | awk -F, "$group"'
    NR == 1 { next }
    { g = group($1)
      if (!(g in n)) order[++groups] = g
      n[g]++
      trained[g] += $5 == "trained"
      if ($5 != "trained") others[g] = others[g] (others[g] == "" ? "" : ", ") ($5 == "collapsed" ? $8 : $5)
      add(g, 1, $6); add(g, 2, $7); add(g, 3, $11) }
    function add(g, i, x) {
      if (x !~ /^[0-9]/) return
      sum[g, i] += x
      if (!count[g, i]++) low[g, i] = high[g, i] = x
      if (x + 0 < low[g, i]) low[g, i] = x
      if (x + 0 > high[g, i]) high[g, i] = x }
    function shown(g, i) {
      if (!count[g, i]) return "-"
      if (count[g, i] == 1) return sprintf("%.3f", sum[g, i])
      return sprintf("%.3f (%.3f to %.3f)", sum[g, i] / count[g, i], low[g, i], high[g, i]) }
    END { for (k = 1; k <= groups; k++) { g = order[k]
      printf "| %s | %d | %d | %s | %s | %s | %s |\n", g, n[g], trained[g], (others[g] == "" ? "-" : others[g]),
        shown(g, 1), shown(g, 2), shown(g, 3) } }'
  echo
  made_by
}

# Where, in what time and by which commit the runs were made. (Runs from before the driver have no time.)
made_by() {
  unpacked runs | awk -F, 'NR > 1 { s += $12; if ($12 == "") untimed = 1; n++
      if (!on[$13]++) machines = machines " " $13
      if (!of[$14]++) commits = commits " " $14 }
    END { printf "%d runs, %son%s; commit%s.\n", n, (untimed ? "" : sprintf("%.0f s in all, ", s)), machines, commits }'
  echo
}

# The run of scream that trained longest before it collapsed; nothing if none did.
screamed() {
  unpacked runs scream | awk -F, '$5 == "collapsed" && $8 > at { at = $8; run = $1 } END { print run }'
}

# The step of the collapse of run $1 of experiment $2, by default the present one; nothing if there was none.
collapse_of() { unpacked runs "${2:-}" | awk -F, -v run="$1" '$1 == run { print $8 }'; }

# The step of the event in the run $1 of experiment $2: that of the largest gradient norm from 10 steps
# before the collapse to 25 after it; nothing if there was none.
event() {
  local collapse
  collapse=$(collapse_of "$1" "${2:-}")
  [ -z "$collapse" ] || unpacked losses "${2:-}" | awk -F, -v run="$1" -v c="$collapse" '
    $1 == run && $2 >= c - 10 && $2 <= c + 25 && $4 > most { most = $4; at = $2 } END { print at }'
}

# The losses of run $1 as means of 50 steps, to be held against another implementation's.
trajectory() {
  unpacked losses | awk -F, -v run="$1" '
    $1 == run { sum += $3; n++
      if ($2 % 50 == 0) { head = head " " $2 " |"; line = line "---|"; row = row sprintf(" %.3f |", sum / n); sum = n = 0 } }
    END { if (head != "") printf "| %s: mean of the 50 steps to |%s\n|---|%s\n| loss |%s\n\n", run, head, line, row }'
}

# The report of a spike that run $1 left, for RESULTS.md, after a line that counts which gradients lead.
spike_report() {
  local file=$csv/${experiment}_$1_spike.txt
  [ -e "$file" ] || { echo "No report of a spike of the run $1 is kept."; echo; return 0; }
  echo "The report that train left ($(basename "$file")), its first lines:"
  echo
  echo '```'
  head -n 24 "$file"
  echo '```'
  echo
  awk '/^Largest gradients/ { on = 1; next }
    on && !NF { exit }
    on { sub(/^blocks\.[0-9]+\./, "", $1); if (!n[$1]++) name[++k] = $1 }
    END { printf "Of the largest gradients above:"
      for (i = 1; i <= k; i++) printf "%s %d of %s", (i > 1 ? "," : ""), n[name[i]], name[i]
      print "." }' "$file"
  echo
}

# --- Figures -----------------------------------------------------------------------------------------

# $figures/$2.png: the panels of data/figures.sh for the run unpacked at $1, from step $3 to step $4,
# under the title $5.
diagnostics() {
  bash data/figures.sh "$1" "$3" "$4" "$5" >/dev/null
  [ ! -e "$1/figures/diagnostics.png" ] || cp "$1/figures/diagnostics.png" "$figures/$2.png"
  echo "![$2]($figures/$2.png)"
  echo
}

# $work/RUN.loss: step and the mean loss of the 25 steps that end there.
smooth_losses() {
  unpacked losses | awk -F, -v work="$work" -v smooth=$((25 / bin)) '
    NR == 1 || $3 !~ /^[0-9]/ { next }
    $1 != run { run = $1; rows = sum = 0 }
    { i = rows++ % smooth
      sum += $3 - (rows > smooth ? recent[i] : 0)
      recent[i] = $3
      if (rows >= smooth) printf "%d,%.4f\n", $2, sum / smooth >(work "/" run ".loss") }'
}

# $figures/$1.png: losses of all runs, a line each; seeds of a group have the same colour. $2: title.
draw_losses() {
  local plot="" run g title before="" seeds=""
  smooth_losses
  for run in $(unpacked runs | awk -F, 'NR > 1 { print $1 }'); do
    [ -s "$work/$run.loss" ] || continue
    g=$(awk "$group"'BEGIN { print group(ARGV[1]) }' "$run") title="title '$(label "$g")'"
    case " $before " in *" $g "*) title=notitle seeds=" (a line a seed)" ;; esac
    before+=" $g"
    plot+=" '$work/$run.loss' with lines ls $(number "$g") $title,"
  done
  gnuplot <<G
$style
set terminal pngcairo size 1000,560 font "sans,11" noenhanced
set output "$figures/$1.png"
set title "$2$seeds"
set ylabel "training loss (mean of 25 steps, up to the one shown)"
set key outside right top samplen 1.5
set xrange [0:*]
set yrange [*<0.4:1.8<*<4]
plot $plot 1.44 with lines dt 3 lc rgb "#505050" title "predicting the mean"
G
  echo "![$2]($figures/$1.png)"
  echo
}

# The line style of a group: its place among the groups of the experiment.
number() {
  unpacked runs | awk -F, -v g="$1" "$group"'
    NR > 1 && !(group($1) in seen) { seen[group($1)] = 1; n++; if (group($1) == g) print n }'
}

# The name of a group in a figure.
label() {
  case $1 in
    postnorm) echo "Post-Norm" ;;
    postnorm_*) echo "Post-Norm, lr ${1#postnorm_}" ;;
    prenorm) echo "Pre-Norm" ;;
    layerscale-*) echo "LayerScale ${1#layerscale-}" ;;
    layerscale) echo "LayerScale" ;;
    rezero) echo "ReZero" ;;
    deepnorm) echo "DeepNorm" ;;
    mvsplit) echo "MV-Split" ;;
    mvsplit-noleak) echo "MV-Split, no leaky term" ;;
    mvsplit-global) echo "MV-Split, one mean of all tokens" ;;
    mvsplit-attention) echo "MV-Split on attention only" ;;
    mvsplit-ffn) echo "MV-Split on the FFN only" ;;
    mvsplit-nobias) echo "MV-Split, no bias in the patch embedding" ;;
    mvsplit-*) echo "MV-Split, ${1#mvsplit-}" ;;
    *) echo "$1" ;;
  esac
}

# Where the file of a band is: column $2 of the runs $1.
band() { echo "$work/$1.$2.band"; }
# Makes it, for a run or a group of them: step, median, quartiles over depth and seeds.
depth_band() {
  unpacked diagnostics | awk -F, -v run="$1" -v want="$2" "$group$statistics"'
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == want) c = i; next }
    ($1 != run && group($1) != run) || $c == "nan" { next }
    !($2 in n) { step[++steps] = $2 }
    { value[$2, ++n[$2]] = $c + 0 }
    END {
      for (i = 1; i <= steps; i++) {
        s = step[i]; m = n[s]
        for (j = 1; j <= m; j++) a[j] = value[s, j]
        printf "%d,%.4g,%.4g,%.4g\n", s, quantile(a, m, 0.5), quantile(a, m, 0.25), quantile(a, m, 0.75) } }' >"$(band "$@")"
}

# $figures/$1.png: G_mean and G_ctr of both writers, median and quartiles over what $2 says, for the runs or groups $3...;
# seeds after the first are dashed.
draw_modes() {
  local out=$1 title="Gradients of the writers: median and quartiles over $2" panels="" writer mode one g plot files=() name
  shift 2
  for writer in attention ffn; do
    for mode in g_mean g_ctr; do
      plot=""
      for one in "$@"; do
        depth_band "$one" "${writer}_$mode"
        files+=("$(band "$one" "${writer}_$mode")")
        [ -s "${files[-1]}" ] || continue
        g=$(awk "$group"'BEGIN { print group(ARGV[1]) }' "$one") name=$(label "$g")
        [ "$g" = "$one" ] || name+=", seed ${one##*_}"
        plot+=" '${files[-1]}' using 1:3:4 with filledcurves ls $(number "$g") fs transparent solid 0.2 noborder notitle,"
        plot+=" '' using 1:2 with lines ls $(number "$g") $(case $one in *_[2-9]) echo "dt '-'" ;; esac) title '$name',"
      done
      panels+="set title '$([ $writer = attention ] && echo 'W_O of attention' || echo 'W_2 of the FFN'): $(
        [ $mode = g_mean ] && echo 'G_{mean}' || echo 'G_{ctr}')'
plot ${plot%,}
unset key
"
    done
  done
  # One range for the four panels, down to 1e-7: a collapse takes gradients down to where numbers end.
  gnuplot <<G
$style
set terminal pngcairo size 1200,860 font "sans,11"
set output "$figures/$out.png"
set logscale y
set format y "10^{%L}"
set ylabel "Frobenius norm"
$(awk -F, '{ if ($4 > most) most = $4 + 0; if (!least || $3 < least) least = $3 + 0 }
  END { printf "set yrange [%g:%g]\n", (least > 1e-7 ? least / 1.3 : 1e-7), most * 1.3 }' "${files[@]}")
set multiplot layout 2,2 margins 0.08,0.98,0.07,0.86 spacing 0.1,0.12 title "$title" font ",13"
set key at screen 0.5,0.965 center top maxrows 2 samplen 1.5
$panels
unset multiplot
G
  echo "![$title]($figures/$out.png)"
  echo
}

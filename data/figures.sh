#!/usr/bin/env bash
# Draws RUN/figures/diagnostics.png, the panels of the paper's Fig. 3, and RUN/figures/tcs.png, the
# likeness of tokens over depth and time, from RUN/log.csv and RUN/diagnostics.csv, with gnuplot; from
# step FROM (default 0) to step TO (default: the last), under a TITLE (default: RUN's name), with lines at
# the steps MARKS ("293 316").
#   figures.sh RUN [FROM [TO [TITLE [MARKS]]]]
set -euo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
run=$1 csv=diagnostics.csv from=${2:-0} to=${3:-} title=${4:-$(basename "$1")} marks=${5:-}
if ! command -v gnuplot >/dev/null; then
  echo "gnuplot is missing: nothing was drawn" >&2
  exit 0
fi
cd -- "$run" 2>/dev/null || { echo "there is no folder $run" >&2; exit 2; }
# From there, as a name may hold what gnuplot reads as its own.
title="'${title//\'/\'\'}' noenhanced"
steps=$({ awk -F, '!/^#/ && $1 ~ /^[0-9]+$/ { print $1 }' "$csv" 2>/dev/null || true; } |
  sort -nu | xargs)
if [ "$(wc -w <<<"$steps")" -lt 2 ]; then
  echo "$run/$csv has no two steps to draw: train with --diagnose-every 10, or so" >&2
  exit 2
fi
to=${to:-${steps##* }}
mkdir -p figures
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The number of the column with name $1.
column() {
  awk -F, -v name="$1" '!/^#/ { for (i = 1; i <= NF; i++) if ($i == name) print i; exit }' "$csv"
}

# Five layers at most get a line: a file each, and their numbers in $layers.
all=$(awk -F, '!/^#/ && $2 ~ /^[0-9]+$/ { print $2 }' "$csv" | sort -nu)
layers=$(awk '{ l[NR - 1] = $1 } END { n = NR < 5 ? NR : 5
  for (i = 0; i < n; i++) printf "%s ", l[int(i * (NR - 1) / (n - 1 + !(n - 1)) + 0.5)] }' <<<"$all")
for layer in $layers; do awk -F, -v l="$layer" '!/^#/ && $2 == l' "$csv" >"$work/$layer"; done

# The heat map: a box a row of the csv, to halfway to the next steps and layers. A little overlap hides
# the seams.
awk -F, -v tcs="$(column attention_tcs)" -v steps="$steps" -v layers="$(xargs <<<"$all")" '
  function low(a, i) { return i > 1 ? (a[i - 1] + a[i]) / 2 : a[1] - 0.5 }
  function high(a, i, n) { return i < n ? (a[i] + a[i + 1]) / 2 : a[n] + 0.5 }
  BEGIN {
    m = split(steps, step, " "); for (i = 1; i <= m; i++) place[step[i]] = i
    n = split(layers, layer, " "); for (i = 1; i <= n; i++) height[layer[i]] = i }
  /^#/ || $1 !~ /^[0-9]+$/ { next }
  { i = place[$1 + 0]; j = height[$2 + 0]
    print $1, $2, low(step, i), high(step, i, m) + 0.1, low(layer, j), high(layer, j, n) + 0.1, $tcs }' "$csv" >"$work/map"

# Two columns of the csv against the step for each layer: the first solid, the second dashed.
lines() {
  local plot="plot" first second=${2:-}
  first=$(column "$1")
  local n=0 layer
  for layer in $layers; do
    n=$((n + 1))
    plot+=" '$work/$layer' using 1:$first with lines ls $n title 'layer $layer',"
    [ -z "$second" ] || plot+=" '' using 1:$(column "$second") with lines ls $n dt '-' lw 1.2 notitle,"
  done
  echo "${plot%,}"
}
# The same on a logarithmic axis that ends $3 decades below that of the largest value, if it would go
# deeper: a collapse takes gradients down to where numbers end, and what led to it would be a flat line.
top_decades() {
  local layer
  for layer in $layers; do cat "$work/$layer"; done | awk -F, -v a="$(column "$1")" -v b="$(column "$2")" \
    -v decades="$3" -v from="$from" -v to="$to" '
    function take(x) {
      if (x <= 0 || x > 1e300) return
      if (x > most) most = x + 0
      if (!least || x < least) least = x + 0 }
    $1 >= from && $1 <= to { take($a); take($b) }
    END {
      floor = most ? int(1000 + log(most) / log(10)) - 1000 - decades : 0
      print "set yrange [" (most && least < 10 ^ floor ? "1e" floor : "*") ":*]" }'
  lines "$1" "$2"
}

style='
set datafile separator ","
set datafile missing "nan"
set style line 1 lw 1.8 lc rgb "#440154"
set style line 2 lw 1.8 lc rgb "#3b6fb6"
set style line 3 lw 1.8 lc rgb "#1f9e89"
set style line 4 lw 1.8 lc rgb "#e08b1a"
set style line 5 lw 1.8 lc rgb "#c0392b"
set border 3 lw 0.8 lc rgb "#505050"
set tics nomirror scale 0.5
set grid lw 0.5 lc rgb "#d8d8d8"
set xlabel "step"
set title font ",12"
'
map='
set title "TCS: mean cosine of two token states (1: all alike)"
set ylabel "layer" offset -1
set palette defined (0 "#f7fbff", 0.25 "#9ecae1", 0.5 "#4292c6", 0.75 "#7a4fa3", 1 "#c0392b")
set cbrange [0:1]
set datafile separator whitespace
set yrange ['"$(head -n 1 <<<"$all") - 0.5:$(tail -n 1 <<<"$all") + 0.5"']
unset grid
unset logscale
set format y "%g"
set style fill solid 1.0 noborder
plot "'$work'/map" using 1:2:3:4:5:6:7 with boxxyerror fc palette notitle
'
style+="set xrange [$from:$to]"
for mark in $marks; do
  style+=$'\n'"set arrow from first $mark, graph 0 to first $mark, graph 1 nohead front lw 1 dt 3 lc rgb '#303030'"
done
gnuplot <<G
$style
set terminal pngcairo size 1400,1640 font "sans,10"
set output "figures/diagnostics.png"
set multiplot layout 4,2 margins 0.065,0.935,0.045,0.93 spacing 0.125,0.065 title $title font ",14"
unset key

set title "loss (blue) and norm of the whole gradient (grey)"
set ylabel "loss" textcolor rgb "#08519c"
set y2label "gradient norm" textcolor rgb "#808080"
set y2tics
set border 11
set logscale y2
set format y2 "10^{%L}"
plot "log.csv" using 1:3 every ::1 axes x1y2 with lines lw 1.2 lc rgb "#a0a0a0", \
     "log.csv" using 1:2 every ::1 with lines lw 1.5 lc rgb "#08519c"
unset y2label
unset y2tics
set border 3

set logscale y
set format y "10^{%L}"
set key at screen 0.5,0.967 center horizontal samplen 1.5  # one for all the panels with layers
set title "gradients of queries (solid) and keys (dashed)"
set ylabel "root mean square" textcolor default
$(top_decades q_grad_rms k_grad_rms 7)
unset key
set title "W_O, the writer of attention: G_{mean} (solid), G_{ctr} (dashed)"
set ylabel "Frobenius norm"
$(top_decades attention_g_mean attention_g_ctr 6)
set title "W_2, the writer of the FFN: G_{mean} (solid), G_{ctr} (dashed)"
$(top_decades ffn_g_mean ffn_g_ctr 6)
set yrange [*:*]
set format y "%g"
set title "mean dominance of the trunk: ρ = |μ(X)| / |c(X)|"
set ylabel "ρ"
$(lines attention_rho)
set title "branch to trunk: TR = |F| / |X|, attention (solid), FFN (dashed)"
set ylabel "TR"
$(lines attention_tr ffn_tr)
unset logscale y
set yrange [0:*]
set title "centered gain of attention: μ_{eff} = |P A P|_2"
set ylabel "μ_{eff}"
$(lines mu_eff)
$map
unset multiplot
G
gnuplot <<G
$style
set terminal pngcairo size 1000,600 font "sans,11"
set output "figures/tcs.png"
$map
G
echo "figures: $run/figures/diagnostics.png   $run/figures/tcs.png"

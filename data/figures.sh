#!/usr/bin/env bash
# Draws RUN/figures/diagnostics.png, the panels of the paper's Fig. 3, and RUN/figures/tcs.png, the
# likeness of tokens over depth and time, from RUN/log.csv and RUN/diagnostics.csv, with gnuplot; from
# step FROM (default 0) to step TO (default: the last).   figures.sh RUN [FROM [TO]]
set -euo pipefail
run=$1 csv=$1/diagnostics.csv from=${2:-0} to=${3:-}
if ! command -v gnuplot >/dev/null; then
  echo "gnuplot is missing: nothing was drawn" >&2
  exit 0
fi
steps=$({ awk -F, '!/^#/ && $1 ~ /^[0-9]+$/ { print $1 }' "$csv" 2>/dev/null || true; } |
  sort -nu | wc -l)
if [ "$steps" -lt 2 ]; then
  echo "$csv has no two steps to draw: train with --diagnose-every 10, or so" >&2
  exit 2
fi
mkdir -p "$run/figures"
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

# The heat map: a box a row of the csv, from the step before to this one and halfway to the next
# layers. A little overlap hides the seams.
awk -F, -v tcs="$(column attention_tcs)" '
  NR == FNR { layer[NR] = $1; place[$1] = NR; n = NR; next }
  /^#/ || $1 !~ /^[0-9]+$/ { next }
  $1 != now { before = now; now = $1 }
  { i = place[$2]
    low = i > 1 ? (layer[i - 1] + layer[i]) / 2 : layer[i] - 0.5
    high = i < n ? (layer[i] + layer[i + 1]) / 2 : layer[i] + 0.5
    end = $1 + 0.1 * ($1 - before)
    print ($1 + before) / 2, (low + high) / 2, before + 0, end, low, high + 0.1, $tcs }' \
  <(echo "$all") "$csv" >"$work/map"

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
set ylabel "layer"
set palette defined (0 "#f7fbff", 0.25 "#9ecae1", 0.5 "#4292c6", 0.75 "#7a4fa3", 1 "#c0392b")
set cbrange [0:1]
set datafile separator whitespace
set autoscale noextend
unset grid
unset logscale
set format y "%g"
set style fill solid 1.0 noborder
plot "'$work'/map" using 1:2:3:4:5:6:7 with boxxyerror fc palette notitle
'
style+="set xrange [$from:${to:-$(awk -F, '!/^#/ { last = $1 } END { print last }' "$csv")}]"
gnuplot <<G
$style
set terminal pngcairo size 1400,1640 font "sans,10"
set output "$run/figures/diagnostics.png"
set multiplot layout 4,2 margins 0.065,0.935,0.045,0.94 spacing 0.125,0.065
set key top right samplen 1.5

set title "loss and gradient norm"
set ylabel "loss"
set y2label "gradient norm"
set y2tics
set border 11
set logscale y2
set format y2 "10^{%L}"
plot "$run/log.csv" using 1:3 every ::1 axes x1y2 with lines lw 0.8 lc rgb "#b0b0b0" title "gradient norm", \
     "$run/log.csv" using 1:2 every ::1 with lines lw 1.5 lc rgb "#08519c" title "loss"
unset y2label
unset y2tics
set border 3

set logscale y
set format y "10^{%L}"
set key at screen 0.5,0.982 center horizontal  # one for all the panels with layers
set title "gradients of queries (solid) and keys (dashed)"
set ylabel "root mean square"
$(lines q_grad_rms k_grad_rms)
unset key
set title "W_O, the writer of attention: G_{mean} (solid), G_{ctr} (dashed)"
set ylabel "Frobenius norm"
$(lines attention_g_mean attention_g_ctr)
set title "W_2, the writer of the FFN: G_{mean} (solid), G_{ctr} (dashed)"
$(lines ffn_g_mean ffn_g_ctr)
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
set yrange [*:*]
$map
unset multiplot
G
gnuplot <<G
$style
set terminal pngcairo size 1000,600 font "sans,11"
set output "$run/figures/tcs.png"
$map
G
echo "figures: $run/figures/diagnostics.png   $run/figures/tcs.png"

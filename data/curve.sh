#!/usr/bin/env bash
# Draws RUN/loss.png, the training and validation loss of a run, with gnuplot.
set -euo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
run=${1:-}
[[ -n $run && -s $run/log.csv ]] || { echo "'$run' is no folder of a run: it has no log.csv" >&2; exit 2; }
if ! command -v gnuplot >/dev/null; then
  echo "gnuplot is missing: $run/loss.png was not drawn" >&2
  exit 0
fi
(cd -- "$run" && gnuplot) <<G  # from there, as a name may hold what gnuplot reads as its own
set terminal pngcairo size 900,500 font "sans,11"
set output "loss.png"
set datafile separator ","
set xlabel "step"
set ylabel "loss (mean squared velocity error)"
set y2label "gradient norm"
set y2tics
set logscale y2
set ytics nomirror
set grid
set key top right
plot "log.csv" using 1:3 every ::1 axes x1y2 with lines lc rgb "#c0c0c0" title "gradient norm", \
     "log.csv" using 1:2 every ::1 with lines lc rgb "#9ecae1" title "training loss", \
     "log.csv" using 1:2 every ::1 smooth bezier lw 2 lc rgb "#08519c" title "training loss, smoothed", \
     "validation.csv" using 1:2 every ::1 with points pt 7 ps 1.3 lc rgb "#d94801" title "validation loss"
G
echo "pictures: $run/samples.png   loss curve: $run/loss.png"

# shellcheck shell=bash disable=SC2034,SC2154
# law (Fig. 4): the alignment amplification A of the writers' gradients against its envelope,
# A - 1 <= (T - 1) khat, before and at the event of scream. It has no runs of its own.
runs() { :; }

draw() {
  local run at tokens
  if [ ! -e "$csv/scream_diagnostics.csv.gz" ]; then
    echo "law is drawn from the runs of scream: make experiment NAME=scream"
    return
  fi
  run=$(screamed)
  if [ -z "$run" ]; then
    echo "There was no collapse in scream."
    return
  fi
  at=$(event "$run" scream)
  tokens=$(unpacked runs scream | awk -F, 'NR == 2 { print $15 }')
  points "$run" "$at" "$tokens"
  echo "A point is a layer at a step. Before: 60 to 20 steps before the event at step $at; at it: within 5 steps. Least"
  echo "squares with an intercept; largest: of A - 1; T = $tokens."
  echo
  echo "| writer | when | points | slope | R^2 | median of (A - 1) / ((T - 1) khat) | largest A - 1 |"
  echo "|---|---|---|---|---|---|---|"
  local writer when
  for writer in attention ffn; do
    for when in before at; do fit "$work/$writer.$when" "$writer" "$when"; done
  done
  echo
  draw_law
}

# $work/WRITER.WHEN: (T - 1) khat and A - 1 of each layer and step of run $1.
points() {
  local writer when
  for writer in attention ffn; do
    for when in before at; do : >"$work/$writer.$when"; done
  done
  unpacked diagnostics scream | awk -F, -v run="$1" -v at="$2" -v tokens="$3" -v work="$work" '
    NR == 1 { for (i = 1; i <= NF; i++) c[$i] = i; next }
    $1 != run { next }
    { when = $2 >= at - 60 && $2 <= at - 20 ? "before" : $2 >= at - 5 && $2 <= at + 5 ? "at" : ""
      if (when == "") next
      for (w = 0; w < 2; w++) {
        writer = w ? "ffn" : "attention"
        a = $c[writer "_amplification"]; k = $c[writer "_khat"]
        if (a != "nan" && k != "nan") print (tokens - 1) * k, a - 1 >(work "/" writer "." when) } }'
}

fit() {
  awk -v writer="$2" -v when="$3" "$statistics"'
    { n++; sx += $1; sy += $2; xx += $1 * $1; xy += $1 * $2; yy += $2 * $2
      share[n] = $2 / $1; if (n == 1 || $2 > most) most = $2 }
    END {
      if (n < 3) { printf "| %s | %s | %d | - | - | - | - |\n", writer, when, n; exit }
      cxx = xx - sx * sx / n; cxy = xy - sx * sy / n; cyy = yy - sy * sy / n
      printf "| %s | %s | %d | %.3f | %.3f | %.3f | %.1f |\n", writer, when, n, cxy / cxx,
        (cyy > 0 ? cxy * cxy / (cxx * cyy) : 0), quantile(share, n, 0.5), most }' "$1"
}

draw_law() {
  gnuplot <<G
$style
set terminal pngcairo size 1200,560 font "sans,11"
set output "$figures/law.png"
set datafile separator whitespace
set logscale xy
set xlabel "(T - 1) κ̂"
set ylabel "A - 1"
set key top left samplen 1
set multiplot layout 1,2 title "Amplification against its envelope: a point a layer and step" font ",13"
set title "W_O of attention"
plot x with lines lc rgb "#808080" dt 2 title "envelope", \
     '$work/attention.before' with points pt 7 ps 0.4 lc rgb "#5ab4d6" title "before", \
     '$work/attention.at' with points pt 7 ps 0.5 lc rgb "#c0392b" title "at the event"
set title "W_2 of the FFN"
plot x with lines lc rgb "#808080" dt 2 notitle, \
     '$work/ffn.before' with points pt 7 ps 0.4 lc rgb "#5ab4d6" notitle, \
     '$work/ffn.at' with points pt 7 ps 0.5 lc rgb "#c0392b" notitle
unset multiplot
G
  echo "![law]($figures/law.png)"
  echo
}

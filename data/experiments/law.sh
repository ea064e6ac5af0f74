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
  echo "A point is a layer at a step. Before: 60 to 20 steps before the event at step $at; at it: within 5 steps. The fit"
  echo "is a straight line, A - 1 = slope (T - 1) khat + intercept, by least squares on the numbers as they are, not on their"
  echo "logarithms: the slope is no exponent. The second slope is that of the line through the origin. T = $tokens."
  echo
  echo "| writer | when | points | of them A < 1 | slope | intercept | R^2 | slope through the origin | median of (A - 1) / ((T - 1) khat) | largest A - 1 |"
  echo "|---|---|---|---|---|---|---|---|---|---|"
  local writer when
  for writer in attention ffn; do
    for when in before at; do fit "$work/$writer.$when" "$writer" "$when"; done
  done
  echo
  echo "The median over layers of (A - 1) / ((T - 1) khat), step by step:"
  echo
  for writer in attention ffn; do
    awk -v writer="$writer" "$statistics"'
      { if (!n[$3]++) step[++steps] = $3; value[$3, n[$3]] = $2 / $1 }
      END {
        if (writer == "attention") {
          printf "| step |"; for (i = 1; i <= steps; i++) printf " %d |", step[i]
          printf "\n|---|"; for (i = 1; i <= steps; i++) printf "---|"; print "" }
        printf "| %s |", writer
        for (i = 1; i <= steps; i++) {
          for (j = 1; j <= n[step[i]]; j++) a[j] = value[step[i], j]
          printf " %.2f |", quantile(a, n[step[i]], 0.5) }
        print "" }' "$work/$writer.at"
  done
  echo
  draw_law "$run" "$at"
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
        if (a != "nan" && k != "nan") print (tokens - 1) * k, a - 1, $2 >(work "/" writer "." when) } }'
}

fit() {
  awk -v writer="$2" -v when="$3" "$statistics"'
    { n++; less += $2 < 0; sx += $1; sy += $2; xx += $1 * $1; xy += $1 * $2; yy += $2 * $2
      share[n] = $2 / $1; if (n == 1 || $2 > most) most = $2 }
    END {
      if (n < 3) { printf "| %s | %s | %d | %d | - | - | - | - | - | - |\n", writer, when, n, less; exit }
      cxx = xx - sx * sx / n; cxy = xy - sx * sy / n; cyy = yy - sy * sy / n
      slope = cxy / cxx
      printf "| %s | %s | %d | %d | %.3f | %.1f | %.3f | %.3f | %.3f | %.1f |\n", writer, when, n, less, slope, (sy - slope * sx) / n,
        (cyy > 0 ? cxy * cxy / (cxx * cyy) : 0), xy / xx, quantile(share, n, 0.5), most }' "$1"
}

# law.png: |A - 1|, with a mark of its own where A < 1; nothing closer to 0 than 0.001, the last digit of A.
# Points at the event at step $2 of run $1 have the colour of their step.
draw_law() {
  local size="(abs(\$2) > 1e-3 ? abs(\$2) : 1e-3)" writer title panels="" slope
  for writer in attention ffn; do
    [ $writer = attention ] && title=W_O || title=W_2
    slope=$(awk '{ xy += $1 * $2; xx += $1 * $1 } END { printf "%.2f", xx ? xy / xx : 0 }' "$work/$writer.at")
    panels+="set title '$title: line through the origin A - 1 = $slope (T - 1) κ̂'
plot '$work/$writer.before' using 1:(\$2 < 0 ? NaN : $size) with points pt 7 ps 0.4 lc rgb '#b8b8b8' title 'steps $(($2 - 60)) to $(($2 - 20))', \\
     '' using 1:(\$2 < 0 ? $size : NaN) with points pt 6 ps 0.5 lc rgb '#b8b8b8' title 'A < 1', \\
     '$work/$writer.at' using 1:(\$2 < 0 ? NaN : $size):3 with points pt 7 ps 0.8 lc palette title 'at the event', \\
     '' using 1:(\$2 < 0 ? $size : NaN):3 with points pt 6 ps 0.9 lc palette title 'A < 1', \\
     x with lines lc rgb '#505050' dt 2 title 'envelope, A - 1 = (T - 1) κ̂', \\
     $slope * x with lines lw 1.5 lc rgb '#505050' title 'through the origin'
unset key
set colorbox
"
  done
  gnuplot <<G
$style
set terminal pngcairo size 1300,640 font "sans,11"
set output "$figures/law.png"
set datafile separator whitespace
set logscale xy
set xrange [$(cat "$work"/{attention,ffn}.{before,at} | sort -g | awk 'NR == 1 { print $1 / 1.3 ":" } END { print $1 * 1.3 }' | xargs | tr -d ' ')]
set yrange [7e-4:*]
set xlabel "(T - 1) κ̂"
set ylabel "|A - 1|"
set palette defined (0 "#fde725", 0.25 "#5ec962", 0.5 "#21918c", 0.75 "#3b528b", 1 "#440154")
set cbrange [$(($2 - 5)):$(($2 + 5))]
set cbtics 1
set format cb "%.0f"
set cblabel "step" offset 1.5
set multiplot layout 1,2 margins 0.07,0.92,0.1,0.78 spacing 0.12 title "Amplification against its envelope, a point a layer and step: \
Post-Norm, $(experiment=scream about "" "$1")" font ",13"
unset colorbox
set key at screen 0.5,0.93 center top maxrows 2 samplen 2
$panels
unset multiplot
G
  echo "![law]($figures/law.png)"
  echo
}

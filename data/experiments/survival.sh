# shellcheck shell=bash disable=SC2034,SC2154
# survival: how many seeds still train, against steps. All for 700 steps:
#   postnorm-100, postnorm-200        100 and 200 layers, lr 1e-3, warm-up 100, seeds 1 to 16
#   postnorm-400                      400 layers, lr 7e-4, warm-up 300, seeds 1 to 8
#   mvsplit-200, layerscale-200, keel-200   200 layers, lr 1e-3, warm-up 100, seeds 1 to 8
#   bias-...   all the same with the paper's bias in the patch embedding
# Keel is norm(2 L X + F), the same as norm(X + F / (2 L)).
columns="" reports=yes

runs() {
  local seed seeds=16 few=8 shared="lr=1e-3 warmup=100 steps=700 save-every=0 save=weights columns=1 val-images=32"
  if [ "$SCALE" = tiny ]; then seeds=2 few=1 shared="steps=40 save=weights"; fi
  for ((seed = 1; seed <= seeds; seed++)); do
    lived postnorm-200 200 residual=postnorm
    lived postnorm-100 100 residual=postnorm
    [ "$seed" -le $few ] || continue
    lived mvsplit-200 200
    lived layerscale-200 200 residual=layerscale lambda=1e-2
    lived keel-200 200 residual=rezero lambda=2.5e-3 fix=lambda writer-std=0
    lived postnorm-400 400 residual=postnorm lr=7e-4 warmup=300
  done
}
# Later options take the place of the same ones before.
# shellcheck disable=SC2086
lived() {
  local depth=$2
  if [ "$SCALE" = tiny ]; then depth=$((depth / 50)); fi
  run "$1_$seed" $shared seed=$seed "depth=$depth" "${@:3}"
  run "bias-$1_$seed" $shared seed=$seed "depth=$depth" no-patch-bias=false "${@:3}"
}

draw() {
  survival_table
  without=bias- failures_table postnorm-200
  only=bias- failures_table bias-postnorm-200
  without=bias- draw_survival
  without=bias- leads mvsplit-200 layerscale-200 keel-200
  reports_table
}

# When each run failed: the step of its collapse; 0 of one that failed without having learned. $work/GROUP:
# step, share that still trains, and its exact 95% interval.
survival_table() {
  echo "Runs that failed, the share that still trains at the end with its exact 95% interval (Clopper and Pearson), and the"
  echo "steps of the collapses (0: never learned). A run that relapsed, which may be one cut off in its collapse, counts as"
  echo "one that still trains. Warm-up 100, at 400 layers 300."
  echo
  echo "| runs | lr | seeds | failed | relapsed | still train | 95% interval | collapsed at |"
  echo "|---|---|---|---|---|---|---|---|"
  unpacked runs | awk -F, -v work="$work" "$group$statistics$exact"'
    NR == 1 { next }
    { g = group($1); if (!(g in n)) order[++groups] = g
      n[g]++; lr[g] = $3; relapsed[g] += $5 == "relapsed"; if ($4 > last) last = $4
      if ($5 != "trained" && $5 != "relapsed") at[g, ++k[g]] = $8 + 0 }
    END {
      for (i = 1; i <= groups; i++) {
        g = order[i]; steps = ""
        for (j = 1; j <= k[g]; j++) a[j] = at[g, j]
        sort_numbers(a, k[g] + 0)
        for (j = 1; j <= k[g]; j++) steps = steps (j > 1 ? ", " : "") a[j]
        for (j = 0; j <= k[g]; j++) {
          alive = n[g] - j; from = j ? a[j] : 0; to = j < k[g] ? a[j + 1] : last
          row = sprintf("%.4f,%.4f,%.4f", alive / n[g], low(alive, n[g]), high(alive, n[g]))
          print from "," row "\n" to "," row >(work "/" g) }
        printf "| %s | %s | %d | %d | %d | %.2f | %.2f to %.2f | %s |\n", g, lr[g], n[g], k[g], relapsed[g],
          alive / n[g], low(alive, n[g]), high(alive, n[g]), (steps == "" ? "-" : steps) } }'
  echo
  made_by
}

# survival.png: a panel for Post-Norm at three depths, one for the merges at 200 layers. A group has one colour in
# both; what lies on one another is told apart by width; each line has its interval at its end.
draw_survival() {
  local panel g n panels="" plot style_of widths=(0 6 4 2 2)
  for panel in "postnorm-100 postnorm-200 postnorm-400" "mvsplit-200 layerscale-200 keel-200 postnorm-200"; do
    plot="" n=0
    for g in $panel; do
      n=$((n + 1))
      [ -s "$work/$g" ] || continue
      style_of="ls $(number "$g") lw ${widths[n]}"
      [ "$g" != postnorm-400 ] || style_of+=" dt (4, 2)"
      plot+=" '$work/$g' using 1:2 with lines $style_of title '$(named "$g")',"
      plot+=" '< tail -n 1 $work/$g' using (\$1 + 12 * $n):2:3:4 with yerrorbars ls $(number "$g") lw 1.5 pt 7 ps 0.7 notitle,"
    done
    [ -z "$plot" ] || panels+="plot ${plot%,}"$'\n'
  done
  gnuplot <<G
$style
set terminal pngcairo size 1200,520 font "sans,11"
set output "$figures/survival.png"
set xrange [0:760]
set yrange [0:1.03]
set ylabel "share of seeds that still train"
set key left bottom spacing 1.3
set multiplot layout 1,2 title "Share of seeds that still train, with its exact 95% interval at the end (step 700).\n\
lr 1e-3, warm-up 100; 400 layers: 7e-4, warm-up 300" font ",13"
$panels
unset multiplot
G
  echo "![seeds that still train]($figures/survival.png)"
  echo
}
# The label of group $1 with its seeds, and how many of them relapse.
named() {
  echo "$(label "$1")$([ "$1" != postnorm-400 ] || echo ", lr 7e-4"), $(unpacked runs |
    awk -F, -v g="$1_" 'index($1, g) == 1 { n++; r += $5 == "relapsed" } END { printf "%d seeds%s", n, (r ? " (" r " relapsing at the end)" : "") }')"
}

# shellcheck shell=bash disable=SC2034,SC2154
# leak: does MV-Split need its leaky term and a learned alpha? The setting of `ablations`: lr 1e-3, warm-up 100,
# 500 steps, seeds 1 to 10 of MV-Split, of it without the leaky term, and of it with alpha fixed at 0.
#   again-mvsplit-alpha=0   the last once more, diagnosed: another card rounds otherwise, and the runs take another course
#   bias-...                with the paper's bias in the patch embedding, diagnosed
# Diagnosed are the first layers and a few of the others.
columns="attention_g_ctr ffn_g_ctr attention_tr ffn_tr" reports=yes

runs() {
  local seed seeds=10 shared="lr=1e-3 warmup=100 steps=500 save-every=0 save=weights columns=1 val-images=32"
  local diagnosed="diagnose-every=5 diagnose-layers=0,1,2,4,8,16,25,50,100,200,399" held="alpha=0 fix=alpha"
  if [ "$SCALE" = tiny ]; then seeds=1 shared="steps=40 save=weights" diagnosed="diagnose-every=5 diagnose-layers=all"; fi
  for ((seed = 1; seed <= seeds; seed++)); do
    leaking mvsplit
    leaking mvsplit-noleak residual=mvsplit-noleak
    leaking mvsplit-alpha=0 $held
    leaking again-mvsplit-alpha=0 $held $diagnosed
    leaking bias-mvsplit no-patch-bias=false $diagnosed
    leaking bias-mvsplit-noleak residual=mvsplit-noleak no-patch-bias=false $diagnosed
    leaking bias-mvsplit-alpha=0 no-patch-bias=false $held $diagnosed
  done
}
# shellcheck disable=SC2086
leaking() { run "$1_$seed" $shared seed=$seed "${@:2}"; }

draw() {
  results_table
  without=bias- failures_table mvsplit
  only=bias- failures_table bias-mvsplit
  only=mvsplit draw_losses leak_loss "MV-Split; without its leaky term; with alpha held at 0" 100
  only=bias- draw_losses leak_bias_loss "MV-Split, and what it may need, with the paper's bias" 100
  first_table
  draw_first
  reports_table
}

# The largest |F| / |X| of layers 0 to 25 and of the deeper ones, of attention and of the FFN together: of each group the
# largest that a run that trains ever has; of each other run when it passed 0.25 and 1. $work/first.RUN: step and the
# first layers' value.
first_table() {
  echo "The largest |F| / |X| among the branches of layers 0, 1, 2, 4, 8, 16 and 25, and of 50, 100, 200 and 399, every fifth"
  echo "step, four samples: the steps at which it passed 0.25 and 1 in runs that failed or relapsed, and what it is at most in"
  echo "those that train."
  echo
  echo "| run | outcome | collapse at | first layers: 0.25 at | 1 at | largest | deeper: 0.25 at | 1 at | largest |"
  echo "|---|---|---|---|---|---|---|---|---|"
  { unpacked runs | sed "s/^/runs,/"; unpacked diagnostics; } | awk -F, -v work="$work" "$group"'
    $1 == "runs" { outcome[$2] = $6; at[$2] = $9; next }
    $1 == "run" { for (i = 1; i <= NF; i++) c[$i] = i; next }
    { if (!n[$1]++) name[++runs] = $1
      deep = $3 > 25; x = $c["attention_tr"] > $c["ffn_tr"] ? $c["attention_tr"] + 0 : $c["ffn_tr"] + 0
      if (!seen[$1, $2]++) step[$1, ++steps[$1]] = $2
      if (x > most[$1, $2, deep]) most[$1, $2, deep] = x }
    END {
      for (i = 1; i <= runs; i++) {
        r = name[i]; row = ""
        for (deep = 0; deep <= 1; deep++) {
          top[deep] = quarter = one = 0
          for (j = 1; j <= steps[r]; j++) {
            s = step[r, j]; x = most[r, s, deep]
            if (!deep) print s "," x >(work "/first." r)
            if (x > top[deep]) top[deep] = x
            if (x > 0.25 && !quarter) quarter = s
            if (x > 1 && !one) one = s }
          row = row sprintf(" %s | %s | %.2f |", quarter ? quarter : "-", one ? one : "-", top[deep]) }
        if (outcome[r] != "trained") { printf "| %s | %s | %s |%s\n", r, outcome[r], (at[r] == "" ? "-" : at[r]), row; continue }
        g = group(r); if (!k[g]++) order[++groups] = g
        for (deep = 0; deep <= 1; deep++) if (top[deep] > largest[g, deep]) largest[g, deep] = top[deep] }
      for (i = 1; i <= groups; i++) { g = order[i]
        printf "| %s | %d trained | - | - | - | at most %.2f | - | - | at most %.2f |\n", g, k[g], largest[g, 0], largest[g, 1] } }'
  echo
}

# leak_first.png: these, without the bias and with it.
draw_first() {
  local run bias style_of panels="" plot
  for bias in again- bias-; do
    plot=""
    for run in $(only=$bias unpacked runs | awk -F, 'NR > 1 { print $1 "=" $5 }'); do
      [ -s "$work/first.${run%=*}" ] || continue
      case $run in
        *alpha=0*=trained) style_of="ls 4" ;; *alpha=0*) style_of="ls 1" ;; *=trained) style_of="ls 6 lw 1" ;; *) style_of="ls 2" ;;
      esac
      plot+=" '$work/first.${run%=*}' using 1:2 with lines $style_of notitle,"
    done
    [ -z "$plot" ] || panels+="set title '$([ $bias = bias- ] && echo with the bias in the patch embedding || echo without a bias)'
plot $plot 1 with lines dt 3 lc rgb 'black' title '1: as large as the trunk', NaN with lines ls 1 title 'alpha held at 0: fails or relapses', NaN with lines ls 4 title 'alpha held at 0: trains'$([ $bias = again- ] || echo ", NaN with lines ls 2 title 'alpha learned, leaky or not: fails', NaN with lines ls 6 title 'alpha learned, leaky or not: trains'")
"
  done
  gnuplot <<G
$style
set terminal pngcairo size 1200,520 font "sans,11"
set output "$figures/leak_first.png"
set logscale y
set yrange [0.005:90]
set xrange [0:500]
set ylabel "largest |F| / |X| of layers 0 to 25"
set key left top spacing 1.2
set multiplot layout 1,2 title "Branches of the first layers against the trunk: MV-Split, 400 layers, lr 1e-3, warm-up 100, ten seeds of each" font ",13"
$panels
unset multiplot
G
  echo "![first layers]($figures/leak_first.png)"
  echo
}

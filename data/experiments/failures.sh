# shellcheck shell=bash disable=SC2034,SC2154
# failures: failures of MV-Split, diagnosed, and rates at which Post-Norm is held.
#   mvsplit-alpha=0   lr 1e-3, warm-up 100, seed 1, 700 steps: failed in `ablations`, near step 295
#   bias-mvsplit-alpha=0   likewise with the paper's bias in the patch embedding, seed 5, which ends on the plateau in `leak`
#   mvsplit-warmup50  lr 1e-3, warm-up 50, seeds 1 to 4, 200 steps: seed 1 failed in `frontier`, near step 73;
#   bias-mvsplit-warmup50   likewise with the bias
# Those that fail are made again, every step diagnosed from 60 before the collapse (without one: the largest gradient)
# to 60 after it, 17 layers and five more of the first ones, all 32 samples.
#   saved             the first of them up to step 240, before anything rises
#   saved-lr=RATE     from there at this rate for good, to step 700: does it still fail?
#   saved-clip=0.1    from there at 1e-3, with a clip of 0.1
#   save              Post-Norm as in `scream` at 1e-3, warm-up 300, to step 270, where the rate is 9e-4; the
#                     scream's first sign is at step 293, at 9.77e-4
#   held-RATE         from there at this rate for good, to step 500: 7e-4, 9e-4, 9.5e-4, 1e-3
#   bias-save         Post-Norm with the bias, at 1.4e-3, warm-up 300, seed 3, to step 110, where the rate is 5.1e-4: it
#                     collapses at 152 in `cure1e3`, at 7.1e-4, and trains in `appendixj`, on another card
#   bias-held-RATE    from there at this rate for good: 5e-4, 7e-4, 1e-3, 1.4e-3
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_rho attention_tr ffn_tr attention_tcs
  mu_eff q_grad_rms k_grad_rms"
bin=1
failing="mvsplit-alpha=0_1 bias-mvsplit-alpha=0_5 mvsplit-warmup50_1 mvsplit-warmup50_2 mvsplit-warmup50_3 mvsplit-warmup50_4"
spikes=$failing

# shellcheck disable=SC2086
runs() {
  local lr seed steps=500 longer=700 short=200 saved=270 quiet=240 before=110
  if [ "$SCALE" = tiny ]; then steps=40 longer=40 short=40 saved=20 quiet=20 before=20; fi
  local held="alpha=0 fix=alpha lr=1e-3 warmup=100 save-every=0" early="lr=1e-3 warmup=50 save-every=0 steps=$short"
  run mvsplit-alpha=0_1 $held "steps=$longer"
  run bias-mvsplit-alpha=0_5 $held "steps=$longer" no-patch-bias=false seed=5
  for seed in 1 2 3 4; do run "mvsplit-warmup50_$seed" $early "seed=$seed"; done
  for seed in 1 2 3 4; do run "bias-mvsplit-warmup50_$seed" $early "seed=$seed" no-patch-bias=false; done
  run saved $held "steps=$quiet" keep=state
  for lr in 7e-4 5e-4 2.5e-4; do run "saved-lr=$lr" from=saved $held "steps=$longer" "lr=$lr"; done
  run saved-clip=0.1 from=saved $held "steps=$longer" clip=0.1
  run save residual=postnorm lr=1e-3 warmup=300 "steps=$saved" save-every=0 keep=state
  for lr in 9e-4 9.5e-4 1e-3 7e-4; do
    run "held-$lr" from=save residual=postnorm "lr=$lr" warmup=1 "steps=$steps" save-every=0
  done
  local bias="residual=postnorm seed=3 no-patch-bias=false save-every=0"
  run bias-save $bias lr=1.4e-3 "steps=$before" keep=state
  for lr in 5e-4 7e-4 1e-3 1.4e-3; do
    run "bias-held-$lr" from=bias-save $bias "lr=$lr" warmup=1 "steps=$steps"
  done
}

after() {
  local at
  is_in "${1##*/}" "$failing" || return 0
  case $(judge "$1/log.csv") in trained*) return 0 ;; esac
  at=$(judge "$1/log.csv" | awk -F, '{ print ($4 == "" ? $6 : $4) }')  # of the collapse, or of the largest norm
  diagnose_event "$1" "$at" 60 60 --diagnose-samples 32 --diagnose-layers "$(layers 17)$([ "$SCALE" = tiny ] || echo ,1,2,4,8,16)"
}

draw() {
  local one at g before=""
  results_table
  without='(bias-)?(save,|held)' draw_losses failures_loss "Failures of MV-Split, lr 1e-3" "100 (alpha 0) or 50"
  only='bias-(save,|held)' draw_losses failures_held "Post-Norm with the bias, seed 3, held at four rates from step 110 on" "300 until there"
  for one in $failing; do
    at=$(collapse_of "$one") g=${one%_*}
    [ -n "$at" ] || continue
    echo "**$one**: collapse at step $at, the largest gradient norm within 25 steps of it at $(event "$one")."
    echo
    unpack "$one"
    where_table "$one" "$at"
    is_in "$g" "$before" && continue
    before+=" $g"
    page "$one" "failures_$g" "A failure: $(label "$g"), 400 layers, lr 1e-3, seed ${one##*_}"
    draw_where "$one" "$at"
    rise_and_fall "$one" "$at"
    spike_report "$one"
  done
  [ -e "$csv/scream_runs.csv.gz" ] || return 0
  one=$(screamed)
  echo "**For comparison, Post-Norm in \`scream\`**: collapse at step $(collapse_of "$one" scream)."
  echo
  where_table "$one" "$(collapse_of "$one" scream)" scream
}

# Where run $1 of experiment $3 (by default this one) fails: the branches of each diagnosed layer before and after its
# collapse at step $2, and when they rise. $work/where: step, layer, the larger |F| / |X| of the two branches, and the
# larger of the writers' G_ctr, each in times its median before.
where_table() {
  echo "Where it fails: the larger |F| / |X| of a layer's two branches, and TCS, as medians over the steps from 60 to 20 before"
  echo "the collapse at $2, and over the last 20 of the 60 after it (or that the run has). Then the first steps from which on,"
  echo "for five steps, |F| / |X| is above 0.5, and G_ctr of one of the layer's writers five times its median before."
  echo
  echo "| layer | branch by trunk, before | after | TCS before | after | branch above 0.5 from | G_ctr five times from |"
  echo "|---|---|---|---|---|---|---|"
  unpacked diagnostics "${3:-}" | awk -F, -v run="$1" -v at="$2" -v work="$work" "$statistics"'
    NR == 1 { for (i = 1; i <= NF; i++) c[$i] = i; next }
    $1 != run || $2 < at - 60 || $2 > at + 60 { next }
    { if (!seen_step[$2]++) step[++steps] = $2
      if (!seen_layer[$3]++) layer[++layers] = $3
      a = $c["attention_tr"] + 0; b = $c["ffn_tr"] + 0; x["size", $2, $3] = a > b ? a : b
      x["tcs", $2, $3] = $c["attention_tcs"] + 0
      x["W_O", $2, $3] = $c["attention_g_ctr"] + 0; x["W_2", $2, $3] = $c["ffn_g_ctr"] + 0 }
    function median(what, l, from, to,  i, n, v) {
      for (i = 1; i <= steps; i++) if (step[i] >= from && step[i] <= to) v[++n] = x[what, step[i], l]
      return n ? quantile(v, n, 0.5) : 0 }
    function first(what, l, least,  i, row) {
      for (i = 1; i <= steps; i++) {
        row = x[what, step[i], l] > least ? row + 1 : 0
        if (row == 5) return step[i - 4] }
      return "-" }
    END {
      end = step[steps]
      for (j = 1; j <= layers; j++) {
        l = layer[j]; o = median("W_O", l, at - 60, at - 20); w = median("W_2", l, at - 60, at - 20)
        for (i = 1; i <= steps; i++) {
          s = step[i]; a = o ? x["W_O", s, l] / o : 0; b = w ? x["W_2", s, l] / w : 0; x["rise", s, l] = a > b ? a : b
          printf "%d,%d,%.4g,%.4g\n", s, l, x["size", s, l], x["rise", s, l] >(work "/where") }
        if (index(" 0 1 2 4 8 16 25 50 100 200 299 374 399 ", " " l " "))
          printf "| %d | %.3f | %.3f | %.2f | %.2f | %s | %s |\n", l, median("size", l, at - 60, at - 20),
            median("size", l, end - 19, end), median("tcs", l, at - 60, at - 20), median("tcs", l, end - 19, end),
            first("size", l, 0.5), first("rise", l, 5) } }'
  echo
}

# failures_RUN.png: what `where_table` has left of run $1, and its loss, around its collapse at step $2.
draw_where() {
  local layers title
  title="A failure: $(label "${1%_*}"), 400 layers, lr 1e-3, seed ${1##*_}"
  case $title in *warm-up*) ;; *) title+=", warm-up 100" ;; esac
  layers=$(awk -F, -v dir="$work" '!n[$2]++ { row[$2] = rows + 0; if (rows % 2 == 0) tics = tics (rows ? ", " : "") "\"" $2 "\" " rows + 0; rows++ }
    { print $1 "," row[$2] "," log($3 + 1e-9) / log(10) "," log($4 + 1e-9) / log(10) >(dir "/where_rows") }
    END { print tics }' "$work/where")
  gnuplot <<G
$style
set terminal pngcairo size 1000,960 font "sans,11"
set output "$figures/failures_${1%_*}.png"
set multiplot layout 3,1 margins 0.09,0.88,0.06,0.93 spacing 0.08 title "$title" font ",13"
set xrange [$(head -n 1 "$work/where" | cut -d, -f1) - 0.5:$(tail -n 1 "$work/where" | cut -d, -f1) + 0.5]
unset xlabel
set ylabel "loss"
set key left top
set arrow from $2, graph 0 to $2, graph 1 nohead dt 2 lc rgb "#505050" front
plot '$work/$1/log.csv' using 1:2 with lines ls 1 title "loss; dashed: the collapse, step $2"
unset grid
set ylabel "layer (not to scale)"
set ytics ($layers)
set yrange [-0.5:*] noextend
set title "the larger |F| / |X| of a layer's branches (dark: a branch outweighs the trunk)"
set palette defined (-2 "#f4f4f4", -1 "#e08b1a", 0 "#c0392b", 1.2 "#440154")
set cbrange [-2:1.2]
set cbtics ("0.01" -2, "0.1" -1, "1" 0, "10" 1)
plot '$work/where_rows' using 1:2:3 with image notitle
set xlabel "step"
set title "G_{ctr} of W_O or W_2, the larger, each in times its median before"
set palette defined (-4 "#3b6fb6", 0 "#f4f4f4", 1.4 "#e08b1a", 2.6 "#c0392b", 4 "#440154")
set cbrange [-4:4]
set cbtics ("1/10000" -4, "1/100" -2, "1" 0, "100" 2, "10000" 4)
plot '$work/where_rows' using 1:2:4 with image notitle
unset multiplot
G
  echo "![where $(label "${1%_*}") fails]($figures/failures_${1%_*}.png)"
  echo
}

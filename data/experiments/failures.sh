# shellcheck shell=bash disable=SC2034,SC2154
# failures: two failures of MV-Split, diagnosed, and the rate at which Post-Norm fails.
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
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_rho attention_tr ffn_tr attention_tcs
  mu_eff q_grad_rms k_grad_rms"
bin=1
failing="mvsplit-alpha=0_1 bias-mvsplit-alpha=0_5 mvsplit-warmup50_1 mvsplit-warmup50_2 mvsplit-warmup50_3 mvsplit-warmup50_4"
spikes=$failing

# shellcheck disable=SC2086
runs() {
  local lr seed steps=500 longer=700 short=200 saved=270 quiet=240
  if [ "$SCALE" = tiny ]; then steps=40 longer=40 short=40 saved=20 quiet=20; fi
  local alpha="alpha=0 fix=alpha lr=1e-3 warmup=100 save-every=0" early="lr=1e-3 warmup=50 save-every=0 steps=$short"
  run mvsplit-alpha=0_1 $alpha "steps=$longer"
  run bias-mvsplit-alpha=0_5 $alpha "steps=$longer" no-patch-bias=false seed=5
  for seed in 1 2 3 4; do run "mvsplit-warmup50_$seed" $early "seed=$seed"; done
  for seed in 1 2 3 4; do run "bias-mvsplit-warmup50_$seed" $early "seed=$seed" no-patch-bias=false; done
  run saved $alpha "steps=$quiet" keep=state
  for lr in 7e-4 5e-4 2.5e-4; do run "saved-lr=$lr" from=saved $alpha "steps=$longer" "lr=$lr"; done
  run saved-clip=0.1 from=saved $alpha "steps=$longer" clip=0.1
  run save residual=postnorm lr=1e-3 warmup=300 "steps=$saved" save-every=0 keep=state
  for lr in 9e-4 9.5e-4 1e-3 7e-4; do
    run "held-$lr" from=save residual=postnorm "lr=$lr" warmup=1 "steps=$steps" save-every=0
  done
}

after() {
  local at
  is_in "${1##*/}" "$failing" && case $(judge "$1/log.csv") in trained*) false ;; esac || return 0
  at=$(judge "$1/log.csv" | awk -F, '{ print ($4 == "" ? $6 : $4) }')
  diagnose_event "$1" "$at" 60 60 --diagnose-samples 32 --diagnose-layers "$(layers 17)$([ "$SCALE" = tiny ] || echo ,1,2,4,8,16)"
}

draw() {
  local one at g before=""
  results_table
  draw_losses failures_loss "Failures of MV-Split, and Post-Norm at held rates" "100 (alpha 0), 50, 300 (Post-Norm)"
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
}

# Where run $1 fails: the branches of each diagnosed layer before and after its collapse at step $2, and when they rise.
# $work/where: step, layer, TR of the FFN, and W_2's G_ctr in times its median before.
where_table() {
  echo "Where it fails. TR = |F| / |X|: medians over the steps from 60 to 20 before the collapse at $2, and over the last 20 of"
  echo "the 60 after it (or that the run has). Then the first steps from which on, for five steps, the larger TR is above 0.5,"
  echo "and W_2's G_ctr five times its median before."
  echo
  echo "| layer | TR of attention, before | after | of the FFN, before | after | above 0.5 | G_ctr five times |"
  echo "|---|---|---|---|---|---|---|"
  unpacked diagnostics | awk -F, -v run="$1" -v at="$2" -v work="$work" "$statistics"'
    NR == 1 { for (i = 1; i <= NF; i++) c[$i] = i; next }
    $1 != run { next }
    { if (!seen_step[$2]++) step[++steps] = $2
      if (!seen_layer[$3]++) layer[++layers] = $3
      tr[1, $2, $3] = $c["attention_tr"] + 0; tr[2, $2, $3] = $c["ffn_tr"] + 0; tr[3, $2, $3] = $c["ffn_g_ctr"] + 0 }
    function median(k, l, from, to,  i, n, a) {
      for (i = 1; i <= steps; i++) if (step[i] >= from && step[i] <= to) a[++n] = tr[k, step[i], l]
      return n ? quantile(a, n, 0.5) : 0 }
    function first(k, l, least,  i, s, row) {
      for (i = 1; i <= steps; i++) {
        s = step[i]
        row = tr[k, s, l] > least || (k == 2 && tr[1, s, l] > least) ? row + 1 : 0
        if (row == 5) return step[i - 4] }
      return "-" }
    END {
      end = step[steps]
      for (j = 1; j <= layers; j++) {
        l = layer[j]; before = median(3, l, at - 60, at - 20)
        if (index(" 0 1 2 4 8 16 25 50 100 200 299 399 ", " " l " "))
          printf "| %d | %.3f | %.3f | %.3f | %.3f | %s | %s |\n", l, median(1, l, at - 60, at - 20), median(1, l, end - 19, end),
            median(2, l, at - 60, at - 20), median(2, l, end - 19, end), first(2, l, 0.5), first(3, l, 5 * before)
        for (i = 1; i <= steps; i++)
          printf "%d,%d,%.4g,%.4g\n", step[i], l, tr[2, step[i], l], (before ? tr[3, step[i], l] / before : 1) >(work "/where") } }'
  echo
}

# failures_RUN.png: what `where_table` has left of run $1, and its loss, around its collapse at step $2.
draw_where() {
  local layers title
  title="A failure: $(label "${1%_*}"), 400 layers, lr 1e-3, seed ${1##*_}"
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
set arrow from $2, graph 0 to $2, graph 1 nohead dt 2 lc rgb "#505050"
plot '$work/$1/log.csv' using 1:2 with lines ls 1 title "loss; dashed: the collapse, step $2"
unset grid
set ylabel "layer"
set ytics ($layers)
set yrange [-0.5:*] noextend
set title "|F| / |X| of the FFN (dark: the branch outweighs the trunk)"
set cblabel "log10"
set palette defined (-2.5 "#f4f4f4", -1 "#e08b1a", 0 "#c0392b", 0.5 "#440154")
set cbrange [-2.5:0.5]
plot '$work/where_rows' using 1:2:3 with image notitle
set xlabel "step"
set title "G_{ctr} of W_2, in times its median before"
set palette defined (-2 "#3b6fb6", 0 "#f4f4f4", 0.7 "#e08b1a", 1.3 "#c0392b", 2 "#440154")
set cbrange [-4:4]
plot '$work/where_rows' using 1:2:4 with image notitle
unset multiplot
G
  echo "![where $(label "${1%_*}") fails]($figures/failures_${1%_*}.png)"
  echo
}

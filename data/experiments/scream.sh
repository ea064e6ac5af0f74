# shellcheck shell=bash disable=SC2034,SC2154
# scream (Fig. 2, 3): a Post-Norm network trains, then its mean mode takes over. Nobody knows when: so a
# run that collapsed is made again, bit for bit the same, with every step diagnosed around that step.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_amplification attention_khat
  ffn_amplification ffn_khat attention_rho attention_tr ffn_tr attention_tcs mu_eff q_grad_rms k_grad_rms
  attention_g_mean_author attention_g_ctr_author ffn_g_mean_author ffn_g_ctr_author attention_amplification_author
  attention_kappa_author ffn_amplification_author ffn_kappa_author mu_eff_author"
bin=1
rates=$(option lr)
# The reference collapses near step 570 of the lowest rate: 900 steps are room for an event 1.5 times later.
if [ "$SCALE" = full ]; then rates="7e-4 1e-3 1.4e-3 2e-3"; fi
spikes="postnorm_${rates// / postnorm_}"

runs() {
  local lr steps
  for lr in $rates; do
    steps=$(option steps)
    if [ "$SCALE $lr" = "full 7e-4" ]; then steps=900; fi
    run "postnorm_$lr" residual=postnorm "lr=$lr" "steps=$steps" diagnose-every=10 diagnose-layers="$(layers 17)"
  done
}

after() {
  local at
  at=$(judge "$1/log.csv" | cut -d, -f4)
  [ -z "$at" ] || diagnose_event "$1" "$at" 100 100
}

# The samples are those of the run that screamed.
packed() { pictures=$(screamed); }

draw() {
  local run at collapse first
  results_table
  draw_losses scream_loss "Post-Norm at several learning rates"
  run=$(screamed)
  if [ -z "$run" ]; then
    echo "There was no collapse."
    return
  fi
  at=$(event "$run") collapse=$(collapse_of "$run") first=$(onset "$run" "$at")
  trajectory "$run"
  unpack "$run"
  echo "Three steps of $run have names. The onset is at ${first:-no step}: G_mean or G_ctr of a writer is above 5 times its"
  echo "median over the steps from 60 to 20 before the event, all diagnosed layers together. The collapse is at"
  echo "$collapse: the first step whose loss, and the mean of the 25 losses from it on, is above half of the way from the"
  echo "best mean of 25 back to 1.44. The event is at $at: the largest gradient norm from 10 steps before the collapse"
  echo "to 25 after it."
  echo
  first=${first:-$collapse}
  page "$run" scream "The scream: $(label "$run"), $(option depth) layers"
  draw_three "$run" $((first - 8)) $((at + 10)) "$first" "$collapse" "$at"
  rise_table "$run" "$at"
  rise_and_fall "$run" "$at"
  spike_report "$run"
}

# scream_three.png: loss, the writers' gradients and the likeness of tokens in run $1 from step $2 to $3,
# with the steps $4... marked.
draw_three() {
  local mark marks="" from=$2 to=$3 half
  likeness "$1" "$from" "$to"
  half=$(awk -F, '!n[$2]++ { k++; last = $2 } END { print (k > 1 ? last / (k - 1) / 2 : 1) }' "$work/likeness")
  for mark in "${@:4}"; do
    marks+="set arrow from first $mark, graph 0 to first $mark, graph 1 nohead front lw 1 dt 3 lc rgb '#303030'"$'\n'
  done
  gnuplot <<G
$style
set terminal pngcairo size 1000,860 font "sans,12"
set output "$figures/scream_three.png"
set xrange [$from:$to]
unset xlabel
set format x ""
$marks
set multiplot layout 3,1 margins 0.085,0.9,0.065,0.915 spacing 0.02,0.06 \\
  title "Post-Norm, $(about "" "$1"): onset $4, collapse $5, largest gradient $6 (dotted)" font ",13"
set title "loss (blue) and norm of the whole gradient (grey)"
set ylabel "loss" textcolor rgb "#08519c"
set y2label "gradient norm" textcolor rgb "#808080"
set y2tics
set logscale y2
set format y2 "10^{%L}"
plot "$work/$1/log.csv" using 1:3 every ::1 axes x1y2 with lines lw 1.2 lc rgb "#a0a0a0" notitle, \\
     "" using 1:2 every ::1 with lines lw 2 lc rgb "#08519c" notitle
unset y2tics
unset y2label
set title "gradients of the writers, all layers together, in times their usual size (medians of steps $(($6 - 60)) to $(($6 - 20)))"
set ylabel "times" textcolor default
set logscale y
set yrange [0.01:300]
set format y "%g"
set key left bottom samplen 2
plot "$work/rise" using 1:2 with lines ls 1 title "W_O, G_{mean}", "" using 1:3 with lines ls 1 dt '-' title "W_O, G_{ctr}", \\
     "" using 1:4 with lines ls 4 title "W_2, G_{mean}", "" using 1:5 with lines ls 4 dt '-' title "W_2, G_{ctr}", \\
     1 with lines lw 0.8 lc rgb "#808080" notitle
unset key
unset logscale y
unset grid
set title "TCS: mean cosine of two token states (1: all tokens alike)"
set ylabel "layer"
set xlabel "step" offset 0,0.5
set format x "%g"
set yrange [0:$(($(unpacked runs | awk -F, 'NR == 2 { print $2 }') - 1))]
set palette defined (0 "#f7fbff", 0.25 "#9ecae1", 0.5 "#4292c6", 0.75 "#7a4fa3", 1 "#c0392b")
set cbrange [0:1]
set style fill solid 1 noborder
plot "$work/likeness" using 1:2:(\$1 - 0.5):(\$1 + 0.6):(\$2 - $half):(\$2 + 1.05 * $half):3 with boxxyerror fc palette notitle
unset multiplot
G
  echo "![the event in three panels]($figures/scream_three.png)"
  echo
}

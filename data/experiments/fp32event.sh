# shellcheck shell=bash disable=SC2034,SC2154
# fp32event: is the scream one of bf16? Post-Norm at 1e-3, warm-up 300, seed 2, which in `appendixj` screamed
# from step 414 on, to step 400; from this state, which has fp32 master weights and moments, to step 480 in bf16
# as before and in fp32, every step diagnosed, 9 layers. (Other code or another card rounds otherwise, and may
# move the event.)
#   bias-...     with the paper's bias in the patch embedding, at 1.4e-3, seed 3, likewise from step 110 to 240
#   bias-whole   in fp32 from its start
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_rho attention_tcs q_grad_rms k_grad_rms"
bin=1

runs() {
  local saved=400 steps=480 precision
  if [ "$SCALE" = tiny ]; then saved=20 steps=40; fi
  run save seed=2 residual=postnorm lr=1e-3 "steps=$saved" save-every=0 precision=bf16 keep=state
  for precision in bf16 fp32; do
    run $precision seed=2 from=save residual=postnorm lr=1e-3 "steps=$steps" save-every=0 "precision=$precision" state=fp32 \
      diagnose-every=1 diagnose-layers="$(layers 9)"
  done
  if [ "$SCALE" != tiny ]; then saved=110 steps=240; fi
  local bias="residual=postnorm lr=1.4e-3 seed=3 no-patch-bias=false save-every=0"
  # shellcheck disable=SC2086
  {
    run bias-save $bias "steps=$saved" precision=bf16 keep=state
    for precision in bf16 fp32; do
      run bias-$precision $bias from=bias-save "steps=$steps" "precision=$precision" state=fp32 diagnose-every=1 diagnose-layers="$(layers 9)"
    done
    run bias-whole $bias "steps=$steps" precision=fp32 diagnose-every=1 diagnose-layers="$(layers 9)"
  }
}

draw() {
  results_table
  both_table
  without=bias- draw_both
}

# $work/PRECISION: step, loss, norm, G_mean of W_O of all layers together, median TCS.
both() {
  { unpacked diagnostics; echo; unpacked losses; } | awk -F, -v run="$1" "$statistics"'
    NF == 0 { losses = 1; next }
    $1 != run { next }
    !losses { n[$2]++; g[$2] += $4 ^ 2; tcs[$2, n[$2]] = $9 + 0; next }
    $2 in n { for (i = 1; i <= n[$2]; i++) a[i] = tcs[$2, i]
      print $2 "," $3 "," $4 "," sqrt(g[$2]) "," quantile(a, n[$2], 0.5) }' >"$work/$1"
}

both_table() {
  both bf16
  both fp32
  echo "Every tenth step; G_mean of W_O of all diagnosed layers together, TCS the median over them."
  echo
  echo "| step | loss in bf16 | in fp32 | norm in bf16 | in fp32 | G_mean in bf16 | in fp32 | TCS in bf16 | in fp32 |"
  echo "|---|---|---|---|---|---|---|---|---|"
  paste -d , "$work/bf16" "$work/fp32" | awk -F, 'NF == 10 && $1 % 10 == 0 {
    printf "| %d | %.3f | %.3f | %.3g | %.3g | %.2g | %.2g | %.2f | %.2f |\n", $1, $2, $7, $3, $8, $4, $9, $5, $10 }'
  echo
}

draw_both() {
  gnuplot <<G
$style
set terminal pngcairo size 1000,820 font "sans,11"
set output "$figures/fp32event.png"
set multiplot layout 3,1 margins 0.085,0.97,0.065,0.915 spacing 0.02,0.06 \\
  title "Post-Norm, seed 2, in bf16 and in fp32 from one state: $(about)" font ",13"
set key left top
unset xlabel
set format x ""
set ylabel "loss"
plot "$work/bf16" using 1:2 with lines ls 4 title "bf16", "$work/fp32" using 1:2 with lines ls 1 title "fp32"
unset key
set ylabel "G_{mean} of W_O"
set logscale y
set format y "10^{%L}"
plot "$work/bf16" using 1:4 with lines ls 4, "$work/fp32" using 1:4 with lines ls 1
unset logscale y
set format y "%g"
set ylabel "TCS, median over depth"
set xlabel "step"
set format x "%g"
set yrange [0:1]
plot "$work/bf16" using 1:5 with lines ls 4, "$work/fp32" using 1:5 with lines ls 1
unset multiplot
G
  echo "![the scream in bf16 and in fp32]($figures/fp32event.png)"
  echo
}

# shellcheck shell=bash disable=SC2034,SC2154
# failures: two failures of MV-Split, diagnosed, and the rate at which Post-Norm fails.
#   mvsplit-alpha=0   lr 1e-3, warm-up 100, seed 1, 500 steps: failed in `ablations`, near step 295
#   mvsplit-warmup50  lr 1e-3, warm-up 50, seed 1, 150 steps: failed in `frontier`, near step 73
# Both are made again, every step diagnosed from 60 before the collapse (without one: the largest gradient) to
# 10 after it, 17 layers, all 32 samples.
#   save              Post-Norm as in `scream` at 1e-3, warm-up 300, to step 270, where the rate is 9e-4; the
#                     scream's first sign is at step 293, at 9.77e-4
#   held-RATE         from there at this rate for good, to step 500: 7e-4, 9e-4, 9.5e-4, 1e-3
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_rho attention_tr ffn_tr attention_tcs
  mu_eff q_grad_rms k_grad_rms"
bin=1
failing="mvsplit-alpha=0_1 mvsplit-warmup50_1"
spikes=$failing

runs() {
  local lr steps=500 short=150 saved=270
  if [ "$SCALE" = tiny ]; then steps=40 short=40 saved=20; fi
  run mvsplit-alpha=0_1 alpha=0 fix=alpha lr=1e-3 warmup=100 "steps=$steps" save-every=0
  run mvsplit-warmup50_1 lr=1e-3 warmup=50 "steps=$short" save-every=0
  run save residual=postnorm lr=1e-3 warmup=300 "steps=$saved" save-every=0 keep=state
  for lr in 9e-4 9.5e-4 1e-3 7e-4; do
    run "held-$lr" from=save residual=postnorm "lr=$lr" warmup=1 "steps=$steps" save-every=0
  done
}

after() {
  local at
  is_in "${1##*/}" "$failing" || return 0
  at=$(judge "$1/log.csv" | awk -F, '{ print ($4 == "" ? $6 : $4) }')
  diagnose_event "$1" "$at" 60 10 --diagnose-samples 32 --diagnose-layers "$(layers 17)"
}

draw() {
  local one at
  results_table
  draw_losses failures_loss "Failures of MV-Split, and Post-Norm at held rates" "100 (alpha 0), 50, 300 (Post-Norm)"
  for one in $failing; do
    unpacked runs | awk -F, -v run="$one" '$1 == run && $5 != "trained" { f = 1 } END { exit !f }' || continue
    at=$(event "$one")
    [ -n "$at" ] || at=$(unpacked runs | awk -F, -v run="$one" '$1 == run { print $10 }')
    echo "**$one**: onset at step $(onset "$one" "$at"), by the rule of \`scream\`; largest gradient norm at $at."
    echo
    unpack "$one"
    page "$one" "failures_${one%%_*}" "A failure: $(label "${one%_*}"), 400 layers, lr 1e-3, seed 1"
    rise_table "$one" "$at"
    rise_and_fall "$one" "$at"
    spike_report "$one"
  done
}

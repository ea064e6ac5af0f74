# shellcheck shell=bash disable=SC2034,SC2154
# demo: what QUICK=1 shows without a GPU, five seeds of it: small.ini behind Post-Norm and behind MV-Split. Seed 1 of
# Post-Norm is made again with every step diagnosed around its collapse. With a GPU nothing is run: its bits are
# others, and so are the steps of its collapses.
#   bias-...   the same with the paper's bias in the patch embedding
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_rho attention_tr ffn_tr attention_tcs
  mu_eff q_grad_rms k_grad_rms"
bin=1

runs() {
  local seed residual settings
  [ "$machine" = CPU ] || return 0
  settings=$(grep '^[a-z]' "$recipes/small.ini")
  if [ "$SCALE" = tiny ]; then settings="steps=40"; fi
  for residual in postnorm mvsplit; do
    for seed in 1 2 3 4 5; do
      # shellcheck disable=SC2086
      run "${residual}_$seed" $settings residual=$residual seed=$seed save-every=0
      # shellcheck disable=SC2086
      run "bias-${residual}_$seed" $settings residual=$residual seed=$seed save-every=0 no-patch-bias=false
    done
  done
}

after() {
  local at
  [ "${1##*/}" = postnorm_1 ] || return 0
  at=$(judge "$1/log.csv" | cut -d, -f4)
  [ -z "$at" ] || diagnose_event "$1" "$at" 70 70 --diagnose-layers "$(layers 17 48)"
}

draw() {
  local at
  results_table
  without=bias- failures_table mvsplit
  only=bias- failures_table bias-mvsplit
  without=bias- draw_losses demo_loss "Without a GPU: 48 layers while the rate rises to 9e-3" 500
  at=$(event postnorm_1)
  [ -n "$at" ] || return 0
  unpack postnorm_1
  echo "postnorm_1: onset at step $(onset postnorm_1 "$at"), by the rule of \`scream\`; largest gradient norm at $at."
  echo
  rise_table postnorm_1 "$at"
  rise_and_fall postnorm_1 "$at"
}

# shellcheck shell=bash disable=SC2034,SC2154
# one-branch (App. F): MV-Split on attention's merges only, at the rate at which Post-Norm collapses. The
# paper's spike moves to the FFN's writer.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_tcs attention_rho"
spikes="mvsplit-attention_1 mvsplit-attention_2 mvsplit-ffn_1 mvsplit-ffn_2"

runs() {
  local seed seeds="1 2" lr=1e-3
  if [ "$SCALE" = tiny ]; then seeds=1 lr=1e-2; fi
  for seed in $seeds; do
    for branch in attention ffn; do
      run "mvsplit-${branch}_$seed" "residual=mvsplit-$branch" "seed=$seed" "lr=$lr" diagnose-every=5 \
        diagnose-layers="$(layers 9)"
    done
  done
}

draw() {
  local run
  results_table
  draw_losses one-branch_loss "MV-Split on one branch"
  # shellcheck disable=SC2086
  draw_modes one-branch_modes depth $spikes
  for run in $spikes; do spike_report "$run"; done
}

# shellcheck shell=bash disable=SC2034,SC2154
# long1000: 1000 layers for longer than the frontier's 150 steps: MV-Split with the paper's beta there and LayerScale,
# each at its best rate by `frontier`, 3,000 steps, warm-up 300, two seeds; the rate falls to zero over the last 600.
columns="" reports=yes
spikes="layerscale-lr=4e-3_1 layerscale-lr=4e-3_2"

runs() {
  local seed shared="depth=1000 steps=3000 decay-steps=600"
  if [ "$SCALE" = tiny ]; then shared="depth=12 steps=60 decay-steps=20"; fi
  shared+=" save-every=0 save=weights columns=1 val-images=256"
  # shellcheck disable=SC2086
  for seed in 1 2; do
    run mvsplit-lr=1e-3_$seed $shared beta=0.03 lr=1e-3 seed=$seed
    run layerscale-lr=4e-3_$seed $shared residual=layerscale lambda=1e-2 lr=4e-3 seed=$seed
  done
}

draw() {
  local run
  results_table
  reports_table
  draw_losses long1000_loss "LayerScale, at four times MV-Split's rate, collapses" 300
  both=yes leads mvsplit-lr=1e-3 layerscale-lr=4e-3
  for run in $spikes; do spike_report "$run"; done
}

# shellcheck shell=bash disable=SC2034,SC2154
# size32: does beta 1 burst at D 1024 because of `size`'s batch of 4? 400 layers of D 1024 at batch 32, the paper's
# rate 1e-3 / (0.2 sqrt(D)), warm-up 100, 300 steps; two seeds of what collapses. About 141 GB with the fp32 state,
# which all share.
columns="" bin=1
spikes="mvsplit_1 mvsplit_2 mvsplit-beta=0.05_1 layerscale-1e-2_1"

runs() {
  sized32 mvsplit_1
  sized32 mvsplit_2
  sized32 mvsplit-beta=0.05_1 beta=0.05  # 1/sqrt(400)
  sized32 layerscale-1e-2_1 residual=layerscale lambda=1e-2
}
sized32() {
  local shared=(lr=1.56e-4 warmup=100 steps=300 no-patch-bias=false save=weights save-every=0 columns=1)
  if [ "$SCALE" = full ]; then shared+=(width=1024 heads=8 ffn=3072 state=fp32); fi
  run "$1" "${shared[@]}" "seed=${1##*_}" "${@:2}"
}

draw() {
  local run
  results_table
  draw_losses size32_loss "D 1024, batch 32: MV-Split with beta 1 collapses, with 0.05 it trains" 100
  for run in $spikes; do spike_report "$run"; done
}

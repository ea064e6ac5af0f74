# shellcheck shell=bash disable=SC2034,SC2154
# leak: does MV-Split need its leaky term and a learned alpha? The setting of `ablations`: lr 1e-3, warm-up 100,
# 500 steps, seeds 1 to 10 of MV-Split, of it without the leaky term, and of it with alpha fixed at 0.
columns="" reports=yes

runs() {
  local seed seeds=10 shared="lr=1e-3 warmup=100 steps=500 save-every=0 save=weights columns=1 val-images=32"
  if [ "$SCALE" = tiny ]; then seeds=1 shared="steps=40 save=weights"; fi
  for ((seed = 1; seed <= seeds; seed++)); do
    leaking mvsplit
    leaking mvsplit-noleak residual=mvsplit-noleak
    leaking mvsplit-alpha=0 alpha=0 fix=alpha
  done
}
# shellcheck disable=SC2086
leaking() { run "$1_$seed" $shared seed=$seed "${@:2}"; }

draw() {
  results_table
  failures_table mvsplit
  reports_table
  draw_losses leak_loss "MV-Split; without its leaky term; with alpha held at 0" 100
}

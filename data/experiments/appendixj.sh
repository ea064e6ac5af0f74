# shellcheck shell=bash disable=SC2034,SC2154
# appendixj (App. J): what the paper says did not stop the scream, at the scream's setting: 1e-3, warm-up 300,
# 500 steps, seeds 1 and 2 of each. Post-Norm clips at a gradient norm of 1, as all runs here do; `clip0.1`
# clips ten times as hard, `noclip` not at all; `centered` is Z = X + P F, hard centering.
columns=""

runs() {
  local seed seeds="1 2" shared="lr=1e-3 steps=500 save-every=0 save=weights columns=1"
  if [ "$SCALE" = tiny ]; then seeds=1 shared="steps=40 save=weights"; fi
  for seed in $seeds; do
    here "postnorm_$seed" residual=postnorm
    here "centered_$seed" residual=centered
    here "clip0.1_$seed" residual=postnorm clip=0.1
    here "noclip_$seed" residual=postnorm clip=0
  done
}
# shellcheck disable=SC2086
here() { run "$1" seed="${1##*_}" $shared "${@:2}"; }

draw() {
  results_table
  draw_losses appendixj_loss "Hard centering and clipping against the scream"
}

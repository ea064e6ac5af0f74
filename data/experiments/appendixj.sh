# shellcheck shell=bash disable=SC2034,SC2154
# appendixj (App. J): what the paper says did not stop the scream, at the scream's setting: 1e-3, warm-up 300,
# 500 steps, seeds 1 and 2 of each. Post-Norm clips at a gradient norm of 1, as all runs here do; `clip0.1`
# clips ten times as hard, `noclip` not at all; `centered` is Z = X + P F, hard centering.
#   bias-...   with the paper's bias in the patch embedding, seeds 1 to 4, at 1.4e-3: with it one of six seeds of
#              Post-Norm fails at 1e-3, six of six at 1.4e-3 (`cure1e3`)
columns=""

runs() {
  local seed shared="lr=1e-3 steps=500 save-every=0 save=weights columns=1"
  if [ "$SCALE" = tiny ]; then shared="steps=40 save=weights"; fi
  for seed in 1 $([ "$SCALE" = tiny ] || echo 2); do four ""; done
  if [ "$SCALE" != tiny ]; then shared+=" lr=1.4e-3"; fi
  for seed in 1 $([ "$SCALE" = tiny ] || echo 2 3 4); do four bias- no-patch-bias=false; done
}
# shellcheck disable=SC2086
four() {
  run "$1postnorm_$seed" $shared "seed=$seed" residual=postnorm "${@:2}"
  run "$1centered_$seed" $shared "seed=$seed" residual=centered "${@:2}"
  run "$1clip0.1_$seed" $shared "seed=$seed" residual=postnorm clip=0.1 "${@:2}"
  run "$1noclip_$seed" $shared "seed=$seed" residual=postnorm clip=0 "${@:2}"
}

draw() {
  results_table
  without=bias- draw_losses appendixj_loss "Hard centering and clipping against the scream"
  only=bias- draw_losses appendixj_bias "Hard centering and clipping with the paper's bias, at a higher rate"
}

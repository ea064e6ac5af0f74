# shellcheck shell=bash disable=SC2034,SC2154
# appendixj (App. J): what the paper says did not stop the scream, at the scream's setting: 1e-3, warm-up 300,
# 500 steps, seeds 1 and 2 of each. Post-Norm clips at a gradient norm of 1, as all runs here do; `clip0.1`
# clips ten times as hard, `noclip` not at all; `centered` is Z = X + P F, hard centering.
#   bias-...   with the paper's bias in the patch embedding, seeds 1 to 4, at 1.4e-3: with it one of six seeds of
#              Post-Norm fails at 1e-3, six of six at 1.4e-3 (`cure1e3`)
columns=""

runs() {
  local seed few="1 2" more="1 2 3 4" shared="steps=500 save-every=0 save=weights columns=1"
  if [ "$SCALE" = tiny ]; then few=1 more=1 shared="steps=40 save=weights"; fi
  for seed in $few; do four "" lr=1e-3; done
  for seed in $more; do four bias- lr=1.4e-3 no-patch-bias=false; done
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

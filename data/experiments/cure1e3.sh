# shellcheck shell=bash disable=SC2034,SC2154
# cure1e3: the merges at the rate at which Post-Norm screams: 1e-3, warm-up 300, 700 steps, seeds 1 to 6 of each.
# MV-Split with beta 1 and 1/sqrt(400), LayerScale 1e-2, Keel (norm(2 L X + F)) and DeepNorm (norm((2 L)^(1/4) X +
# F)), of which RMSNorm sees X + F / a alone.
columns=""
others="postnorm mvsplit-beta=0.05 layerscale-1e-2 keel deepnorm"

runs() {
  local seed seeds=6 shared="lr=1e-3 save-every=0 save=weights columns=1 val-images=32"
  if [ "$SCALE" = tiny ]; then seeds=1 shared="steps=60 save=weights"; fi
  for ((seed = 1; seed <= seeds; seed++)); do
    cured1e3 postnorm residual=postnorm
    cured1e3 mvsplit
    cured1e3 mvsplit-beta=0.05 beta=0.05
    cured1e3 layerscale-1e-2 residual=layerscale lambda=1e-2
    cured1e3 keel residual=rezero lambda=1.25e-3 fix=lambda writer-std=0
    cured1e3 deepnorm residual=rezero lambda=0.188 fix=lambda writer-std=0
  done
}
# shellcheck disable=SC2086
cured1e3() { run "$1_$seed" $shared seed=$seed "${@:2}"; }

# shellcheck disable=SC2086
draw() {
  results_table
  draw_losses cure1e3_loss "Behind other merges, where Post-Norm screams"
  leads mvsplit $others
  draw_leads cure1e3_difference mvsplit $others
}

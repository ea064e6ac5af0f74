# shellcheck shell=bash disable=SC2034,SC2154
# cure1e3: the merges at the rate at which Post-Norm screams: 1e-3, warm-up 300, 700 steps, seeds 1 to 6 of each.
# MV-Split with beta 1 and 1/sqrt(400), LayerScale 1e-2, Keel and DeepNorm.
columns="" reports=yes
others="postnorm mvsplit-beta=0.05 layerscale-1e-2 keel deepnorm"

runs() {
  local one seed seeds=6 shared="lr=1e-3 save-every=0 save=weights columns=1 val-images=32"
  if [ "$SCALE" = tiny ]; then seeds=1 shared="steps=60 save=weights"; fi
  for ((seed = 1; seed <= seeds; seed++)); do
    # shellcheck disable=SC2046,SC2086
    for one in postnorm mvsplit ${others#postnorm }; do run "${one}_$seed" $shared seed=$seed $(merge "$one"); done
  done
}

# shellcheck disable=SC2086
draw() {
  results_table
  failures_table postnorm
  reports_table
  draw_losses cure1e3_loss "Post-Norm collapses, five other merges train"
  leads mvsplit ${others#postnorm }
  draw_leads cure1e3_difference mvsplit ${others#postnorm }
}

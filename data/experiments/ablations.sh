# shellcheck shell=bash disable=SC2034,SC2154
# ablations: MV-Split a piece at a time, and two merges that the paper left out, at the rate at which
# Post-Norm collapses.
columns=""

runs() {
  local seed seeds="1 2" layers beta lambda lr=1e-3
  if [ "$SCALE" = tiny ]; then seeds=1 lr=1e-2; fi
  layers=$(option depth)
  beta=$(awk -v l="$layers" 'BEGIN { printf "%.4g", l ^ -0.5 }')
  # DeepNorm is norm(a X + F) with a = (2 L)^(1/4). RMSNorm does not see a common factor, so it
  # is norm(X + F / a). (Its smaller start of the writers says nothing here: they start at zero.)
  lambda=$(awk -v l="$layers" 'BEGIN { printf "%.4g", (2 * l) ^ -0.25 }')
  for seed in $seeds; do
    run "mvsplit_$seed" seed="$seed" lr="$lr"
    run "mvsplit-noleak_$seed" seed="$seed" lr="$lr" residual=mvsplit-noleak
    run "mvsplit-alpha=0_$seed" seed="$seed" lr="$lr" alpha=0 fix=alpha
    run "mvsplit-alpha=0.1_$seed" seed="$seed" lr="$lr" alpha=0.1 fix=alpha
    run "mvsplit-beta=${beta}_$seed" seed="$seed" lr="$lr" beta="$beta"
    run "mvsplit-global_$seed" seed="$seed" lr="$lr" means=global
    run "deepnorm_$seed" seed="$seed" lr="$lr" residual=rezero lambda="$lambda" fix=lambda
    run "prenorm_$seed" seed="$seed" lr="$lr" residual=prenorm
  done
}

draw() {
  results_table
  draw_losses ablations_loss "MV-Split a piece at a time, and other merges"
}

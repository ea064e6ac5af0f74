# shellcheck shell=bash disable=SC2034,SC2154
# ablations: MV-Split a piece at a time, and two merges that the paper left out, where Post-Norm collapses
# at once: the setting of the reference trajectory of MV-Split.
columns=""

runs() {
  local seed seeds="1 2" layers beta lambda shared="lr=1e-3 warmup=100 steps=500"
  if [ "$SCALE" = tiny ]; then seeds=1 shared=lr=1e-2; fi
  layers=$(option depth)
  beta=$(awk -v l="$layers" 'BEGIN { printf "%.4g", l ^ -0.5 }')
  # DeepNorm is norm(a X + F) with a = (2 L)^(1/4). RMSNorm does not see a common factor, so it
  # is norm(X + F / a). (Its smaller start of the writers says nothing here: they start at zero.)
  lambda=$(awk -v l="$layers" 'BEGIN { printf "%.4g", (2 * l) ^ -0.25 }')
  for seed in $seeds; do
    ablated postnorm residual=postnorm
    ablated mvsplit
    ablated mvsplit-noleak residual=mvsplit-noleak
    ablated mvsplit-alpha=0 alpha=0 fix=alpha
    ablated mvsplit-alpha=0.1 alpha=0.1 fix=alpha
    ablated "mvsplit-beta=${beta}" beta="$beta"
    ablated mvsplit-global means=global
    ablated deepnorm residual=rezero lambda="$lambda" fix=lambda writer-std=0
    ablated prenorm residual=prenorm
  done
}
# shellcheck disable=SC2086
ablated() { run "$1_$seed" seed="$seed" $shared "${@:2}"; }

draw() {
  results_table
  draw_losses ablations_loss "MV-Split a piece at a time, and other merges" 100
}

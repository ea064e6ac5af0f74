# shellcheck shell=bash disable=SC2034,SC2154
# pictures: what 400 layers draw (a row a class, guidance 2, 25 steps) when they have been
# trained for longer, and when they have collapsed (the run of scream).
columns="" pictures=mvsplit

runs() {
  local steps=3000
  if [ "$SCALE" = tiny ]; then steps=60; fi
  run mvsplit "steps=$steps" lr=1e-3 warmup=100 no-patch-bias=false ema=0.999 columns=8 keep=weights
}

draw() {
  results_table
  draw_losses pictures_loss "MV-Split with the bias of the patch embedding" 100
  echo "![samples]($figures/pictures_mvsplit.png)"
  local collapsed
  collapsed=$(screamed 2>/dev/null || true)
  [ -z "$collapsed" ] || echo "![samples of a collapsed network]($figures/scream_$collapsed.png)"
  echo
}

# shellcheck shell=bash disable=SC2034,SC2154
# thousand: 1000 layers behind MV-Split, with the paper's beta and the bias of the patch embedding.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_tcs attention_rho"
pictures=mvsplit spikes=mvsplit

runs() {
  local depth=1000 steps=3000
  if [ "$SCALE" = tiny ]; then depth=12 steps=120; fi
  run mvsplit depth=$depth "steps=$steps" beta=0.03 no-patch-bias=false columns=8 diagnose-every=50 \
    diagnose-layers="$(layers 17 $depth)" save-every=500
}

draw() {
  results_table
  largest_norm
  draw_losses thousand_loss "MV-Split"
  draw_modes thousand_modes depth mvsplit
  echo "![samples of 1000 layers]($figures/thousand_mvsplit.png)"
  echo
  spike_report mvsplit
}

# How far the gradient's norm ever was above its usual size.
largest_norm() {
  unpacked losses | awk -F, -v warmup="$(option warmup)" "$statistics"'
    $2 > warmup { a[++n] = $4 + 0; if ($4 + 0 > most) { most = $4 + 0; at = $2 } }
    END { m = quantile(a, n, 0.5)
      printf "Largest gradient norm after the warm-up: %.3g, in the steps to %d, %.2g times the median %.3g (of the largest of 5 steps each).\n\n",
        most, at, most / m, m }'
}

# shellcheck shell=bash disable=SC2034,SC2154
# cure (Fig. 2, 5, 6): the same network at the same learning rate behind other merges.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr"
pictures=mvsplit_1

runs() {
  local seed seeds="1 2 3" lambdas="1e-2 1e-3 1e-4 1e-5" lambda
  if [ "$SCALE" != full ]; then seeds=1 lambdas=1e-2; fi
  for seed in $seeds; do
    cured "postnorm_$seed" residual=postnorm
    if [ "$seed" != 1 ]; then lambdas=1e-2; fi  # the others: one seed, to see which is best
    for lambda in $lambdas; do cured "layerscale-${lambda}_$seed" residual=layerscale "lambda=$lambda"; done
    cured "rezero_$seed" residual=rezero
    cured "mvsplit_$seed" residual=mvsplit
  done
}
cured() { run "$@" seed="${1##*_}" diagnose-every=20 diagnose-layers="$(layers 17)"; }

draw() {
  results_table
  draw_losses cure_loss "The same network behind other merges"
  leads mvsplit postnorm layerscale-1e-2 rezero
  draw_leads cure_difference mvsplit postnorm layerscale-1e-2 rezero
  unpack mvsplit_1
  page mvsplit_1 cure "The cure: $(label mvsplit), $(option depth) layers, lr $(option lr)"
  modes_table
  draw_modes cure_modes "depth and seeds" postnorm layerscale-1e-2 rezero mvsplit
}

# Medians over depth, the steps after the warm-up and seeds; of a run that collapsed until 20 steps
# before.
modes_table() {
  echo "| run | G_mean of W_O | G_ctr of W_O | ratio | G_mean of W_2 | G_ctr of W_2 | ratio |"
  echo "|---|---|---|---|---|---|---|"
  { unpacked runs; echo; unpacked diagnostics; } | awk -F, -v warmup="$(option warmup)" "$group$statistics"'
    NF == 0 { diagnostics = 1; getline; next }  # the second header
    !diagnostics { g = group($1); if (NR > 1 && !(g in n)) { n[g] = 0; order[++groups] = g }
      end[$1] = $8 == "" ? 1e9 : $8 - 20; next }
    $2 > warmup && $2 < end[$1] { g = group($1); n[g]++; for (c = 4; c <= 7; c++) value[c, g, n[g]] = $c + 0 }
    END { for (k = 1; k <= groups; k++) { g = order[k]
      if (!n[g]) continue
      for (c = 4; c <= 7; c++) {
        for (i = 1; i <= n[g]; i++) a[i] = value[c, g, i]
        m[c] = quantile(a, n[g], 0.5) }
      printf "| %s | %.3g | %.3g | %.3g | %.3g | %.3g | %.3g |\n", g, m[4], m[5], m[5] ? m[4] / m[5] : 0,
        m[6], m[7], m[7] ? m[6] / m[7] : 0 } }'
  echo
}

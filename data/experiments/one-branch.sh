# shellcheck shell=bash disable=SC2034,SC2154
# one-branch (App. F): MV-Split on attention's merges only, at the rate at which Post-Norm collapses. The
# paper's spike moves to the FFN's writer.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_tcs attention_rho"
spikes="mvsplit-attention_1 mvsplit-attention_2 mvsplit-ffn_1 mvsplit-ffn_2"

runs() {
  local seed seeds="1 2" lr=1e-3
  if [ "$SCALE" = tiny ]; then seeds=1 lr=1e-2; fi
  for seed in $seeds; do
    for branch in attention ffn; do
      run "mvsplit-${branch}_$seed" "residual=mvsplit-$branch" "seed=$seed" "lr=$lr" diagnose-every=5 \
        diagnose-layers="$(layers 9)"
    done
  done
}

draw() {
  local run
  results_table
  moved_table
  draw_losses one-branch_loss "MV-Split on one branch"
  # shellcheck disable=SC2086
  draw_modes one-branch_modes depth $spikes
  for run in $spikes; do spike_report "$run"; done
}

# What the collapse of a run raises: for each column the median over layers, its largest value from 10 steps
# before the collapse to 30 after it against its median over the 40 steps before.
moved_table() {
  echo "What rises in the median layer at the collapse: the largest value from 10 steps before it to 30 after it, and in"
  echo "times the median of the 40 steps before these."
  echo
  echo "| run | collapse at | G_mean of W_O | G_ctr of W_O | G_mean of W_2 | G_ctr of W_2 | TCS |"
  echo "|---|---|---|---|---|---|---|"
  { unpacked runs; echo; unpacked diagnostics; } | awk -F, "$statistics"'
    NF == 0 { diagnostics = 1; getline; next }
    !diagnostics { if ($8 + 0) collapse[$1] = $8 + 0; next }
    !($1 in collapse) { next }
    $1 "," $2 != now { flush(); now = $1 "," $2; run = $1; away = $2 - collapse[run] }
    { n++; for (c = 4; c <= 8; c++) value[c, n] = $c + 0 }
    function flush(  c, j, m) {
      for (c = 4; n && c <= 8; c++) {
        for (j = 1; j <= n; j++) a[j] = value[c, j]
        m = quantile(a, n, 0.5)
        if (away < -10 && away >= -50) before[c, ++k[c]] = m
        if (away >= -10 && away <= 30 && m > most[c]) most[c] = m }
      if (n && away > 30 && k[4]) {
        printf "| %s | %d |", run, collapse[run]
        for (c = 4; c <= 8; c++) {
          for (j = 1; j <= k[c]; j++) a[j] = before[c, j]
          m = quantile(a, k[c], 0.5)
          if (c < 8) printf " %.2g, %.1f times |", most[c], most[c] / m
          else printf " %.2f to %.2f |\n", m, most[c]
          k[c] = most[c] = 0 } }
      n = 0 }
    END { flush() }'
  echo
}

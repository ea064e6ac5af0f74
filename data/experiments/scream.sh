# shellcheck shell=bash disable=SC2034,SC2154
# scream (Fig. 2, 3): a Post-Norm network trains, then its mean mode takes over. Every step is
# diagnosed from some way before the event on.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_amplification attention_khat
  ffn_amplification ffn_khat attention_rho attention_tr ffn_tr attention_tcs mu_eff q_grad_rms k_grad_rms"
bin=1 spikes=postnorm pictures=postnorm

runs() {
  local window=480 steps
  steps=$(option steps)
  case ${base##*/} in small.ini) window=200 ;; tiny.ini) window=80 ;; esac
  # The reference collapses near step 570. Room for an event that comes 1.5 times earlier or later.
  if [ "$SCALE" = full ]; then window=380 steps=900; fi
  run postnorm residual=postnorm "steps=$steps" diagnose-every=10 diagnose-layers="$(layers 17)" window=$window
}

draw() {
  local at
  results_table
  trajectory postnorm
  unpack postnorm
  diagnostics "$work/postnorm" scream
  at=$(event postnorm)
  if [ -z "$at" ]; then
    echo "There was no collapse."
    return
  fi
  diagnostics "$work/postnorm" scream_event $((at > 60 ? at - 60 : 0))
  rise_and_fall "$at"
  spike_report postnorm
}

# What the event at step $1 changed. Before: medians over the steps from 60 to 20 before
# it. After: of writers' gradients the largest value within 20 steps; of the rest the median
# of the last 20 steps of the run. Gradients are norms over all diagnosed layers together,
# states medians over them.
rise_and_fall() {
  echo "The event is at step $1 (largest gradient norm near the collapse)."
  echo
  echo "| | before | at or after | factor | orders of magnitude |"
  echo "|---|---|---|---|---|"
  unpacked diagnostics | awk -F, -v at="$1" "$statistics"'
    NR == 1 {
      for (i = 4; i <= NF; i++) name[i] = $i
      columns = NF
      for (i = 4; i <= NF; i++) if ($i ~ /rho|tcs/) { name[++columns] = $i ", deepest layer"; from[columns] = i }
      next }
    $2 != step { flush(); step = $2; n = 0 }
    { n++; for (i = 4; i <= columns; i++) row[i, n] = $(i in from ? from[i] : i) + 0 }
    function flush(  i, j, s, a) {
      if (!n) return
      for (i = 4; i <= columns; i++) {
        if (name[i] ~ /_g_|grad/) { s = 0; for (j = 1; j <= n; j++) s += row[i, j] ^ 2; s = sqrt(s) }
        else if (i in from) s = row[i, n]
        else { for (j = 1; j <= n; j++) a[j] = row[i, j]; s = quantile(a, n, 0.5) }
        if (step >= at - 60 && step <= at - 20) before[i, ++b[i]] = s
        if (name[i] ~ /_g_/ && step >= at - 20 && step <= at + 20 && s > peak[i]) peak[i] = s
        series[i, ++m[i]] = s } }
    END { flush()
      for (i = 4; i <= columns; i++) {
        if (name[i] ~ /amplification|khat/ || !b[i]) continue
        for (j = 1; j <= b[i]; j++) a[j] = before[i, j]
        x = quantile(a, b[i], 0.5)
        last = m[i] < 20 ? m[i] : 20
        for (j = 1; j <= last; j++) c[j] = series[i, m[i] - last + j]
        y = name[i] ~ /_g_/ ? peak[i] : quantile(c, last, 0.5)
        printf "| %s | %.3g | %.3g | %.3g | %s |\n", name[i], x, y, x ? y / x : 0,
          (x > 0 && y > 0 ? sprintf("%+.1f", log(y / x) / log(10)) : "-") } }'
  echo
}

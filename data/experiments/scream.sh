# shellcheck shell=bash disable=SC2034,SC2154
# scream (Fig. 2, 3): a Post-Norm network trains, then its mean mode takes over. Nobody knows when: so a
# run that collapsed is made again, bit for bit the same, with every step diagnosed around that step.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_amplification attention_khat
  ffn_amplification ffn_khat attention_rho attention_tr ffn_tr attention_tcs mu_eff q_grad_rms k_grad_rms"
bin=1
rates=$(option lr)
# The reference collapses near step 570 of the lowest rate: 900 steps are room for an event 1.5 times later.
if [ "$SCALE" = full ]; then rates="7e-4 1e-3 1.4e-3 2e-3"; fi
pictures="postnorm_${rates// / postnorm_}" spikes=$pictures

runs() {
  local lr steps
  for lr in $rates; do
    steps=$(option steps)
    if [ "$SCALE $lr" = "full 7e-4" ]; then steps=900; fi
    run "postnorm_$lr" residual=postnorm "lr=$lr" "steps=$steps" diagnose-every=10 diagnose-layers="$(layers 17)"
  done
}

# Puts the diagnostics of every step from 100 before the collapse to 100 after it among those of every tenth.
after() {
  local dir=$1/event at first last steps
  at=$(judge "$1/log.csv" | cut -d, -f4) steps=$(option steps "$1/config.ini")
  [ -n "$at" ] || return 0
  first=$((at > 100 ? at - 100 : 1)) last=$((at + 100 < steps ? at + 100 : steps))
  rm -rf "$dir"
  mkdir "$dir" && cp "$1/config.ini" "$dir" &&
    train "$dir" --steps $((first - 1)) && train "$dir" --steps $last --diagnose-every 1 &&
    cmp "$dir/log.csv" <(head -n $((last + 1)) "$1/log.csv") &&
    {
      grep '^[^0-9]' "$1/diagnostics.csv"
      rows "$1" 1 $((first - 1)) && rows "$dir" $first $last && rows "$1" $((last + 1)) "$steps"
    } >"$1/merged" && mv "$1/merged" "$1/diagnostics.csv" && rm -r "$dir"
}
# The diagnostics of the run in folder $1 from step $2 to step $3.
rows() { awk -F, -v from="$2" -v to="$3" '/^[0-9]/ && $1 >= from && $1 <= to' "$1/diagnostics.csv"; }

draw() {
  local run at
  results_table
  draw_losses scream_loss "Post-Norm at several learning rates"
  run=$(screamed)
  if [ -z "$run" ]; then
    echo "There was no collapse."
    return
  fi
  at=$(event "$run")
  trajectory "$run"
  unpack "$run"
  diagnostics "$work/$run" scream
  diagnostics "$work/$run" scream_event $((at > 60 ? at - 60 : 0)) $((at + 60))
  rise_and_fall "$run" "$at"
  spike_report "$run"
}

# What the event at step $2 changed in run $1. Before: medians over the steps from 60 to 20 before
# it. After: of writers' gradients the largest value within 20 steps; of the rest the median
# of the last 20 steps of the run. Gradients are norms over all diagnosed layers together,
# states medians over them.
rise_and_fall() {
  echo "$1: the event is at step $2 (largest gradient norm near the collapse)."
  echo
  echo "| | before | at or after | factor | orders of magnitude |"
  echo "|---|---|---|---|---|"
  unpacked diagnostics | awk -F, -v run="$1" -v at="$2" "$statistics"'
    NR > 1 && $1 != run { next }
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

# shellcheck shell=bash disable=SC2034,SC2154
# scream (Fig. 2, 3): a Post-Norm network trains, then its mean mode takes over. Nobody knows when: so a
# run that collapsed is made again, bit for bit the same, with every step diagnosed around that step.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_amplification attention_khat
  ffn_amplification ffn_khat attention_rho attention_tr ffn_tr attention_tcs mu_eff q_grad_rms k_grad_rms"
bin=1
rates=$(option lr)
# The reference collapses near step 570 of the lowest rate: 900 steps are room for an event 1.5 times later.
if [ "$SCALE" = full ]; then rates="7e-4 1e-3 1.4e-3 2e-3"; fi
spikes="postnorm_${rates// / postnorm_}"

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
  at=$(judge "$1/log.csv" | cut -d, -f4) steps=$(option steps "$1/recipe.ini")
  [ -n "$at" ] || return 0
  first=$((at > 100 ? at - 100 : 1)) last=$((at + 100 < steps ? at + 100 : steps))
  rm -rf "$dir"
  mkdir "$dir" && cp "$1/recipe.ini" "$dir" &&
    train "$dir" --steps $((first - 1)) && train "$dir" --steps $last --diagnose-every 1 &&
    cmp "$dir/log.csv" <(head -n $((last + 1)) "$1/log.csv") &&
    {
      grep '^[^0-9]' "$1/diagnostics.csv"
      rows "$1" 1 $((first - 1)) && rows "$dir" $first $last && rows "$1" $((last + 1)) "$steps"
    } >"$1/merged" && mv "$1/merged" "$1/diagnostics.csv" && rm -r "$dir"
}
# The diagnostics of the run in folder $1 from step $2 to step $3.
rows() { awk -F, -v from="$2" -v to="$3" '/^[0-9]/ && $1 >= from && $1 <= to' "$1/diagnostics.csv"; }

# The samples are those of the run that screamed.
packed() { pictures=$(screamed); }

draw() {
  local run at collapse
  results_table
  draw_losses scream_loss "Post-Norm at several learning rates"
  run=$(screamed)
  if [ -z "$run" ]; then
    echo "There was no collapse."
    return
  fi
  at=$(event "$run") collapse=$(collapse_of "$run")
  trajectory "$run"
  unpack "$run"
  echo "Two steps of $run have names. The collapse is at $collapse: the first step whose loss, and the mean of the 25 losses"
  echo "from it on, is above half of the way from the best mean of 25 back to 1.44. The event is at $at: the largest"
  echo "gradient norm from 10 steps before the collapse to 25 after it."
  echo
  diagnostics "$work/$run" scream_event $((at > 20 ? at - 20 : 0)) $((at + 10)) \
    "$(label "$run"): steps $((at > 20 ? at - 20 : 0)) to $((at + 10)); collapse at $collapse, largest gradient at $at"
  rise_and_fall "$run" "$at"
  spike_report "$run"
}

# What the event at step $2 changed in run $1.
rise_and_fall() {
  echo "What the event at $2 changes. Gradients are norms over all diagnosed layers together, states medians over them."
  echo "Before: medians over the steps from 60 to 20 before the event. After: of the writers' gradients the largest"
  echo "within 20 steps of it, of the rest the median of the last 20 diagnosed steps of the run."
  echo
  echo "| | before | at the event, or after | factor | orders of magnitude |"
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

# shellcheck shell=bash disable=SC2034,SC2154
# table1: does MV-Split's lead last (the paper's Table 1)? Three parts, the second of which needs the first:
#   scan-MERGE-RATE     four rates for LayerScale 1e-2, MV-Split with beta 1/sqrt(400), Keel and DeepNorm: 400 steps,
#                       warm-up 100, one seed
#   MERGE-lr=RATE_SEED  MV-Split and the best of the others, each at its best rate by the scan: 5,000 steps, warm-up
#                       300, seeds 1 to 3; the rate falls to zero over the last 1,000
#   layerscale-lr=...   the same of LayerScale, added when the best of the others, Keel, and MV-Split's seed 2 had
#                       collapsed: at its own best rate, and at MV-Split's in the seeds that train there
#   bias-...            the first two with the paper's bias in the patch embedding
# Until a scan is over here its packed best rates are taken; without those the same command, again, goes on with the
# long runs when the scan is over.
columns="" reports=yes
spikes="mvsplit-lr=2.5e-3_2 keel-lr=1.6e-2_1 keel-lr=1.6e-2_2 keel-lr=1.6e-2_3 layerscale-lr=6.3e-3_1"
merges="mvsplit layerscale keel deepnorm" rates="1e-3 2.5e-3 6.3e-3 1.6e-2"

# shellcheck disable=SC2086
runs() {
  local merge lr seed one bias unknown="" seeds=3 shared="save-every=0 save=weights columns=1 val-images=256"
  local short="steps=400 warmup=100" long="steps=5000 decay-steps=1000"
  if [ "$SCALE" = tiny ]; then seeds=1 short="steps=40" long="steps=60 decay-steps=20"; fi
  for bias in "" bias-; do
    for merge in $merges; do
      for lr in $rates; do scanned "${bias}scan-$merge-$lr" "$merge" "lr=$lr" $short; done
    done
    best_rates >"$root/table1.best" || { unknown=yes; continue; }
    while read -r merge lr _; do
      for ((seed = 1; seed <= seeds; seed++)); do scanned "$bias$merge-lr=${lr}_$seed" "$merge" "lr=$lr" $long "seed=$seed"; done
    done <"$root/table1.best"
  done
  [ -z "$unknown" ] || return 0
  bias=""
  for one in 6.3e-3_1 2.5e-3_1 2.5e-3_3; do
    scanned "layerscale-lr=$one" layerscale "lr=${one%_*}" $long "seed=${one#*_}"
  done
}
# shellcheck disable=SC2046,SC2086
scanned() {
  local name=$2
  case $2 in mvsplit) name=mvsplit-beta=0.05 ;; layerscale) name=layerscale-1e-2 ;; esac
  run "$1" $shared ${bias:+no-patch-bias=false} $(merge $name) "${@:3}"
}

# "MERGE RATE LOSS" of MV-Split's best run of the scan, and of the best other's; of runs that are not over here, as
# packed. Fails while one of them is neither.
best_rates() {
  local merge lr verdict run
  for merge in $merges; do
    for lr in $rates; do
      run=${bias}scan-$merge-$lr
      if [ -s "$root/table1/$run/result" ]; then verdict=$(judge "$root/table1/$run/log.csv")
      elif [ ! -e "$csv/table1_runs.csv.gz" ]; then return 1
      else verdict=$(unpacked runs table1 | awk -F, -v run="$run" '$1 == run { print $5 "," $6 }')
      fi
      [ -n "$verdict" ] || return 1
      case $verdict in trained,*) echo "$merge $lr $(cut -d, -f2 <<<"$verdict")" ;; esac
    done
  done | sort -k3 -g | awk '{ kind = $1 == "mvsplit" } !n[kind]++'
}

draw() {
  local others run bias
  for bias in "" bias-; do scan_table; done
  without='(bias-)?scan-'
  others=$(unpacked runs | awk -F, "$group"'NR > 1 && $1 !~ /^(bias|mvsplit)/ && !n[group($1)]++ { print group($1) }')
  [ -n "$others" ] || return 0
  results_table
  reports_table
  without='((bias-)?scan-|bias-)' top=2 draw_losses table1_loss "5,000 steps at rates that are best for 400, and LayerScale at MV-Split's" 300
  # shellcheck disable=SC2086
  both=yes leads mvsplit-lr=2.5e-3 $others
  both=yes leads bias-mvsplit-lr=2.5e-3 bias-layerscale-lr=2.5e-3
  of_name="MV-Split (beta 0.05, bias)" bottom=-0.008 top=0.02 draw_leads table1_bias bias-mvsplit-lr=2.5e-3 bias-layerscale-lr=2.5e-3
  for run in $spikes; do spike_report "$run"; done
}

# The scan: loss of the last 25 steps by merge and rate, or what became of the run; the lowest of a merge in bold.
scan_table() {
  local lr
  echo "The scan$([ -z "$bias" ] || echo ", with the bias"): loss of the last 25 of 400 steps, one seed."
  echo
  echo "| merge |$(for lr in $rates; do printf ' %s |' "$lr"; done)"
  echo "|---|$(for lr in $rates; do printf -- '---|'; done)"
  unpacked runs | awk -F, -v merges="$merges" -v rates="$rates" -v scan="${bias}scan-" '
    index($1, scan) == 1 { outcome[$1] = $5; loss[$1] = $6 }
    END {
      m = split(merges, merge, " "); n = split(rates, rate, " ")
      for (i = 1; i <= m; i++) {
        best = ""
        for (j = 1; j <= n; j++) { run = scan merge[i] "-" rate[j]
          if (outcome[run] == "trained" && (best == "" || loss[run] < loss[best])) best = run }
        printf "| %s |", merge[i]
        for (j = 1; j <= n; j++) { run = scan merge[i] "-" rate[j]; mark = run == best ? "**" : ""
          printf " %s%s%s |", mark, (outcome[run] == "trained" ? sprintf("%.3f", loss[run]) : outcome[run] == "" ? "-" : outcome[run]), mark }
        print "" } }'
  echo
}

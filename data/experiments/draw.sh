# What recipes draw with: data/experiment.sh sources it. Everything is read from the packed csv files.
# shellcheck shell=bash disable=SC2154  # root, figures, csv, experiment, work: the driver's

# The packed file $1 (runs, losses, diagnostics) of experiment $2, by default the present one; less the rows
# that begin with $without, if that is set, and with $only none but those.
unpacked() {
  local file=$csv/${2:-$experiment}_$1.csv.gz
  [ -e "$file" ] || die "there is no $file to draw from: run ${2:-$experiment} first"
  gzip -dc "$file" | sed -E "${without:+/^$without/d;}${only:+/^(run,|$only)/!d}"
}

# Puts one run's losses and diagnostics into $work/RUN as train would have written them: log.csv,
# diagnostics.csv. $2: its experiment.
unpack() {
  local file
  mkdir -p "$work/$1"
  for file in losses diagnostics; do
    [ ! -e "$csv/${2:-$experiment}_$file.csv.gz" ] ||
      unpacked "$file" "${2:-}" | awk -F, -v run="$1" 'NR == 1 || $1 == run { sub(/^[^,]*,/, ""); print }' \
        >"$work/$1/$file.csv"
  done
  mv "$work/$1/losses.csv" "$work/$1/log.csv"
}

# For awk: quantile(a, n, p) of a[1..n], which it sorts; interpolated between neighbours.
statistics='
function sort_numbers(a, n,  i, j, x) {
  for (i = 2; i <= n; i++) {
    x = a[i]
    for (j = i - 1; j > 0 && a[j] > x; j--) a[j + 1] = a[j]
    a[j + 1] = x } }
function quantile(a, n, p,  at, low) {
  sort_numbers(a, n)
  at = 1 + p * (n - 1); low = int(at)
  return low < n ? a[low] + (at - low) * (a[low + 1] - a[low]) : a[n] }
# Half of the 95% interval of the mean of a[1..n], by Student; 0 of one number.
function half_interval(a, n,  i, m, s, t) {
  split("0 12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262", t, " ")
  for (i = 1; i <= n; i++) m += a[i] / n
  for (i = 1; i <= n; i++) s += (a[i] - m) ^ 2
  return n > 1 ? t[n < 10 ? n : 10] * sqrt(s / (n - 1) / n) : 0 }
'

# For awk: low(k, n) and high(k, n), the exact 95% interval (Clopper and Pearson) of a share of which k of n
# were seen; fisher(a, n, b, m), the two-sided p of Fisher's exact test of a of n against b of m.
# shellcheck disable=SC2034  # for recipes
exact='
function choose(n, k,  i, c) { c = 1; for (i = 1; i <= k; i++) c = c * (n - k + i) / i; return c }
function at_most(k, n, p,  i, s) { for (i = 0; i <= k; i++) s += choose(n, i) * p ^ i * (1 - p) ^ (n - i); return s }
function solve(k, n, tail,  a, b, i, p) {
  a = 0; b = 1
  for (i = 0; i < 50; i++) { p = (a + b) / 2; if (at_most(k, n, p) > tail) a = p; else b = p }
  return p }
function high(k, n) { return k == n ? 1 : solve(k, n, 0.025) }
function low(k, n) { return k == 0 ? 0 : solve(k - 1, n, 0.975) }
function fisher(a, n, b, m,  k, s, p, one) {
  one = choose(n, a) * choose(m, b)
  for (k = 0; k <= a + b; k++) if (k <= n && a + b - k <= m) {
    p = choose(n, k) * choose(m, a + b - k)
    if (p <= one * 1.0000001) s += p }
  return s / choose(n + m, a + b) }
'

# What the runs of the groups $2... (by default all) have in common, for the title of a figure: depth,
# rate (if they share it), warm-up $1 (by default the scale's), how many seeds.
about() {
  unpacked runs | awk -F, -v warmup="${1:-$(option warmup)}" -v only=" ${*:2} " "$group"'
    NR == 1 || (only ~ /[^ ]/ && !index(only, " " group($1) " ")) { next }
    !depths[$2]++ { depth = depth (depth == "" ? "" : ", ") $2 }
    !rates[$3]++ { rate = $3; n++ }
    ++of[group($1)] > most { most = of[group($1)] }
    END {
      for (g in of) if (of[g] < fewest || !fewest) fewest = of[g]
      printf "%s layers, %swarm-up %s, %s", depth, (n == 1 ? "lr " rate ", " : ""), warmup,
        (most == 1 ? "one seed" : (fewest < most ? fewest " to " : "") most " seeds") }'
}

# The group of a run: its name without the seed.
group='function group(run) { sub(/_[0-9]+$/, "", run); return run }'

# For gnuplot. Colours are told apart also by those who do not see red and green alike.
style='
set datafile separator ","
set datafile missing "nan"
set style line 1 lw 1.8 lc rgb "#c0392b"
set style line 2 lw 1.8 lc rgb "#e08b1a"
set style line 3 lw 1.8 lc rgb "#1f9e89"
set style line 4 lw 1.8 lc rgb "#3b6fb6"
set style line 5 lw 1.8 lc rgb "#440154"
set style line 6 lw 1.8 lc rgb "#7f7f7f"
set style line 7 lw 1.8 lc rgb "#b0679e"
set style line 8 lw 1.8 lc rgb "#8c9a2b"
set style line 9 lw 1.8 lc rgb "#5ab4d6"
set border 3 lw 0.8 lc rgb "#505050"
set tics nomirror scale 0.5
set grid lw 0.5 lc rgb "#d8d8d8"
set xlabel "step"
set title font ",12"
'

# --- Tables ----------------------------------------------------------------------------------------

# A line for each group of runs: how many seeds, how many of them trained and what became of the
# others, losses as mean and range; where some trained and some did not, each seed's.
results_table() {
  echo "| run | seeds | trained | others, with the steps of their collapses | loss, last 25 steps | best of 25 steps | validation loss |"
  echo "|---|---|---|---|---|---|---|"
  unpacked runs | awk -F, "$group"'
    NR == 1 { next }
    { g = group($1)
      if (!(g in n)) order[++groups] = g
      n[g]++
      trained[g] += $5 == "trained"
      became[g, $5]++
      if ($8 != "") steps[g, $5] = steps[g, $5] (steps[g, $5] == "" ? " at " : ", ") $8
      add(g, 1, $6); add(g, 2, $7); add(g, 3, $11) }
    function add(g, i, x) {
      if (x !~ /^[0-9]/) return
      each[g, i] = each[g, i] (each[g, i] == "" ? "" : "; ") sprintf("%.3f", x)
      sum[g, i] += x
      if (!count[g, i]++) low[g, i] = high[g, i] = x
      if (x + 0 < low[g, i]) low[g, i] = x
      if (x + 0 > high[g, i]) high[g, i] = x }
    function shown(g, i) {
      if (!count[g, i]) return "-"
      if (trained[g] > 0 && trained[g] < n[g]) return n[g] > 3 ? sprintf("%.3f to %.3f", low[g, i], high[g, i]) : each[g, i]
      if (count[g, i] == 1) return sprintf("%.3f", sum[g, i])
      return sprintf("%.3f (%.3f to %.3f)", sum[g, i] / count[g, i], low[g, i], high[g, i]) }
    END { m = split("failed plateau relapsed diverged short", kind, " ")
      for (k = 1; k <= groups; k++) { g = order[k]; others = ""
      for (j = 1; j <= m; j++) if (became[g, kind[j]])
        others = others (others == "" ? "" : "; ") became[g, kind[j]] " " kind[j] steps[g, kind[j]]
      printf "| %s | %d | %d | %s | %s | %s | %s |\n", g, n[g], trained[g], (others == "" ? "-" : others),
        shown(g, 1), shown(g, 2), shown(g, 3) } }'
  echo
  made_by
}

# Failures of each group, with the exact interval of their share, and Fisher's p against group $1.
failures_table() {
  echo "| runs | failed | share, with its exact 95% interval | Fisher's p against $(label "$1"), two-sided |"
  echo "|---|---|---|---|"
  unpacked runs | awk -F, -v of="$1" "$group$exact"'
    NR == 1 { next }
    { g = group($1); if (!(g in n)) order[++groups] = g
      n[g]++; k[g] += $5 != "trained" && $5 != "relapsed" }
    END { for (i = 1; i <= groups; i++) { g = order[i]
      printf "| %s | %d of %d | %.2f (%.2f to %.2f) | %s |\n", g, k[g], n[g], k[g] / n[g], low(k[g], n[g]), high(k[g], n[g]),
        (g == of || !(of in n) ? "-" : sprintf("%.3f", fisher(k[g], n[g], k[of], n[of]))) } }'
  echo
}

# What the spike reports of each group say: of the runs that failed the largest from 60 steps before the
# collapse to 25 after it, of the others the largest of all; then those of each run that failed, with the first.
# Of runs packed without their reports nothing is known.
reports_table() {
  echo "Spike reports, by what they call a spike: of runs that failed the largest from 60 steps before the collapse to 25"
  echo "after it, of those that did not the largest of all."
  echo
  echo "| runs with reports packed | failed: mean mode | both modes | neither | no report | not failed: mean mode | both modes | neither | no report |"
  echo "|---|---|---|---|---|---|---|---|---|"
  for_reports '
    { g = group(run); if (!(g in n)) order[++groups] = g
      n[g]++; count[g, lost, verdict[largest]]++ }
    END { for (i = 1; i <= groups; i++) { g = order[i]
      if (count[g, 0, ""] == n[g]) { quiet = quiet (quiet == "" ? "" : ", ") g " (" n[g] ")"; continue }
      printf "| %s: %d |", g, n[g]
      for (lost = 1; lost >= 0; lost--)
        printf " %d | %d | %d | %d |", count[g, lost, "mean mode"], count[g, lost, "both modes"],
          count[g, lost, "not the writers'"'"' mean mode"], count[g, lost, ""]
      print "" }
      if (quiet != "") print "\nNone failed or has a report: " quiet "." }'
  echo
  echo "Of each run that failed the first of these reports and the largest: the gradient's norm in times the median of the"
  echo "100 steps before, and of the writer whose G_mean rose by the largest amount how often G_mean and G_ctr are their"
  echo "running medians."
  echo
  echo "| run | collapse at | report of | norm | called | writer | G_mean | G_ctr |"
  echo "|---|---|---|---|---|---|---|---|"
  for_reports '
    lost { row(first); if (largest != first) row(largest) }
    function row(step) {
      if (step != "") printf "| %s | %d | %d | %s | %s | %s, layer %d | %s | %s |\n", run, collapse, step, times[step],
        verdict[step], writer[step], layer[step], g_mean[step], g_ctr[step] }'
  echo
}
# awk $1 on a line for each run whose reports are packed, with `run`, whether it is `lost`, its `collapse`, and the
# `first` and `largest` of the reports that count (steps, or "") of times, verdict, writer, layer, g_mean, g_ctr.
for_reports() {
  { unpacked runs; unpacked reports; } | awk -F, '
    $1 == "run" { file++; next }
    file == 1 { lost[$1] = $5 != "trained" && $5 != "relapsed"; at[$1] = $8; next }
    { if ($1 != run) { if (run != "") print line first "," largest reports; run = $1; first = largest = reports = ""; most = 0
        line = run "," lost[run] "," at[run] "," }
      if ($2 == "" || lost[run] && at[run] != "" && ($2 < at[run] - 60 || $2 > at[run] + 25)) next
      if (first == "") first = $2
      if ($3 + 0 > most) { most = $3 + 0; largest = $2 }
      reports = reports "," $2 "," $3 "," $4 "," $5 "," $6 "," $7 "," $8 }
    END { if (run != "") print line first "," largest reports }' |
    awk -F, "$group"'{
      run = $1; lost = $2; collapse = $3; first = $4; largest = $5; verdict[""] = ""
      for (i = 6; i < NF; i += 7) { s = $i; times[s] = $(i + 1); verdict[s] = $(i + 2); writer[s] = $(i + 3)
        layer[s] = $(i + 4); g_mean[s] = $(i + 5); g_ctr[s] = $(i + 6) } }'"$1"
}

# Where, in what time and by which commit the runs were made. (Runs from before the driver have no time.)
made_by() {
  unpacked runs | awk -F, 'NR > 1 { s += $12; if ($12 == "") untimed = 1; n++
      if (!on[$13]++) machines = machines " " $13
      if (!of[$14]++) commits = commits " " $14 }
    END { printf "%d run%s, %son%s; commit%s.\n", n, (n > 1 ? "s" : ""), (untimed ? "" : sprintf("%.0f s in all, ", s)), machines, commits }'
  echo
}

# The run of scream that trained longest before it collapsed; nothing if none did.
screamed() {
  unpacked runs scream | awk -F, 'NR > 1 && $8 + 0 > at { at = $8 + 0; run = $1 } END { print run }'
}

# The step of the collapse of run $1 of experiment $2, by default the present one; nothing if there was none.
collapse_of() { unpacked runs "${2:-}" | awk -F, -v run="$1" '$1 == run { print $8 }'; }

# The step of the event in the run $1 of experiment $2: that of the largest gradient norm from 10 steps
# before the collapse to 25 after it; nothing if there was none.
event() {
  local collapse
  collapse=$(collapse_of "$1" "${2:-}")
  [ -z "$collapse" ] || unpacked losses "${2:-}" | awk -F, -v run="$1" -v c="$collapse" '
    $1 == run && $2 >= c - 10 && $2 <= c + 25 && $4 > most { most = $4; at = $2 } END { print at }'
}

# The onset of the event at step $2 in run $1 of experiment $3: the first step from 60 before it on at which
# G_mean or G_ctr of either writer, all diagnosed layers together, is above 5 times its median over the steps
# from 60 to 20 before. $work/rise: step and the four in times these medians (W_O's two, then W_2's).
onset() {
  unpacked diagnostics "${3:-}" | awk -F, -v run="$1" -v at="$2" -v work="$work" "$statistics"'
    NR == 1 { for (i = 1; i <= NF; i++) c[$i] = i; next }
    $1 != run || $2 < at - 60 || $2 > at + 20 { next }
    !($2 in seen) { seen[$2]; step[++n] = $2 }
    { s[$2, 1] += $c["attention_g_mean"] ^ 2; s[$2, 2] += $c["attention_g_ctr"] ^ 2
      s[$2, 3] += $c["ffn_g_mean"] ^ 2; s[$2, 4] += $c["ffn_g_ctr"] ^ 2 }
    END {
      for (k = 1; k <= 4; k++) {
        m = 0
        for (i = 1; i <= n; i++) if (step[i] <= at - 20) a[++m] = sqrt(s[step[i], k])
        if (m) median[k] = quantile(a, m, 0.5) }
      for (i = 1; i <= n; i++) {
        row = step[i]
        for (k = 1; k <= 4; k++) {
          x = median[k] > 0 ? sqrt(s[step[i], k]) / median[k] : 0; row = row "," x
          if (x > 5 && first == "") first = step[i] }
        print row >(work "/rise") }
      print first }'
}

# $work/likeness: step, layer and TCS in run $1 from step $2 to step $3, and a step on either side.
likeness() {
  unpacked diagnostics | awk -F, -v run="$1" -v from="$2" -v to="$3" '
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == "attention_tcs") c = i; next }
    $1 == run && $2 >= from - 1 && $2 <= to + 1 { print $2 "," $3 "," $c }' >"$work/likeness"
}

# The writers' gradients around the event at step $2 of run $1, for which `onset` and `unpack` have been called, and
# the tokens' likeness.
rise_table() {
  likeness "$1" $(($2 - 60)) $(($2 + 5))
  echo "The writers' gradients in times their medians over the steps from 60 to 20 before $2, all diagnosed layers together,"
  echo "at steps where one is above 5 times, until 5 steps after $2. TCS: smallest, median and largest of these layers."
  echo
  echo "| step | loss | norm | W_O: G_mean | G_ctr | W_2: G_mean | G_ctr | TCS |"
  echo "|---|---|---|---|---|---|---|---|"
  { cat "$work/rise"; echo; cat "$work/$1/log.csv"; echo; cat "$work/likeness"; } | awk -F, -v at="$2" "$statistics"'
    NF == 0 { part++; next }
    !part { for (k = 2; k <= 5; k++) rise[$1, k] = $k }
    part == 1 { loss[$1] = $2; norm[$1] = $3 }
    part == 2 { if (!n[$1]++) step[++steps] = $1; tcs[$1, n[$1]] = $3 + 0 }
    END { for (i = 2; i < steps; i++) { s = step[i]
      for (k = 2; k <= 5 && rise[s, k] <= 5; k++);
      if (k > 5 || s > at + 5) continue
      for (j = 1; j <= n[s]; j++) a[j] = tcs[s, j]
      printf "| %d | %.2f | %.3g | %.1f | %.2g | %.1f | %.2g | %.2f, %.2f, %.2f |\n", s, loss[s], norm[s], rise[s, 2], rise[s, 3],
        rise[s, 4], rise[s, 5], quantile(a, n[s], 0), quantile(a, n[s], 0.5), quantile(a, n[s], 1) } }'
  echo
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
        if (name[i] ~ /amplification|khat|kappa/ || !b[i]) continue
        for (j = 1; j <= b[i]; j++) a[j] = before[i, j]
        x = quantile(a, b[i], 0.5)
        last = m[i] < 20 ? m[i] : 20
        for (j = 1; j <= last; j++) c[j] = series[i, m[i] - last + j]
        y = name[i] ~ /_g_/ ? peak[i] : quantile(c, last, 0.5)
        printf "| %s | %.3g | %.3g | %.3g | %s |\n", name[i], x, y, x ? y / x : 0,
          (x > 0 && y > 0 ? sprintf("%+.1f", log(y / x) / log(10)) : "-") } }'
  echo
}

# The losses of run $1 as means of 50 steps, to be held against another implementation's.
trajectory() {
  unpacked losses | awk -F, -v run="$1" '
    $1 == run { sum += $3; n++
      if ($2 % 50 == 0) { head = head " " $2 " |"; line = line "---|"; row = row sprintf(" %.3f |", sum / n); sum = n = 0 } }
    END { if (head != "") printf "| %s: mean of the 50 steps to |%s\n|---|%s\n| loss |%s\n\n", run, head, line, row }'
}

# What the report of a spike that run $1 left says: its verdict, and which gradients lead.
spike_report() {
  local file=$csv/${experiment}_$1_spike.txt
  [ -e "$file" ] || return 0
  awk -v run="$1" -v file="$file" '
    NR == 1 { sub(/ \(reported.*/, ""); spike = $0 }
    /^Verdict/ { verdict = $0 }
    /^Largest gradients/ { on = 1; next }
    on && !NF { exit }
    on { sub(/^blocks\.[0-9]+\./, "", $1); if (!n[$1]++) name[++k] = $1; all++ }
    END { printf "[The report](%s) that %s left nearest to it. %s. %s Of the %d largest gradients", file, run, spike, verdict, all
      for (i = 1; i <= k; i++) printf "%s %d %s of %s", (i > 1 ? "," : ""), n[name[i]], (n[name[i]] > 1 ? "are" : "is"), name[i]
      print "." }' "$file"
  echo
}

# --- Figures -----------------------------------------------------------------------------------------

# $figures/$2.html: the run $1, unpacked before, on one page under the title $3.
page() {
  local run=$1 out=$2 title=$3 lr warmup dir=$work/$1
  echo "[$title, on one page]($figures/$out.html)"
  echo
  [ -z "${TABLES:-}" ] || return 0
  recipe_of "$run" >"$dir/config.ini"
  lr=$(option lr "$dir/config.ini") warmup=$(option warmup "$dir/config.ini")
  awk -F, -v lr="$lr" -v warmup="$warmup" 'NR == 1 { print $0 ",lr"; next }
    { print $0 "," lr * ($1 < warmup ? $1 / warmup : 1) }' "$dir/log.csv" >"$dir/log.tmp"
  mv "$dir/log.tmp" "$dir/log.csv"
  unpacked runs | awk -F, -v run="$run" 'BEGIN { print "step,loss" } $1 == run { print $4 "," $11 }' >"$dir/validation.csv"
  cp "$csv/${experiment}_${run}_spike.txt" "$dir/spike_1.txt" 2>/dev/null || true
  cp "$figures/${experiment}_$run.png" "$dir/samples.png" 2>/dev/null || true
  bash data/page.sh "$dir" "$figures/$out.html" "$title" >/dev/null
}
# The options of run $1, as the recipe has them.
recipe_of() (
  wanted=$1
  run() { [ "$1" != "$wanted" ] || recipe "${@:2}"; }
  runs
)

# $work/RUN.loss: step and the mean loss of the 25 steps that end there.
smooth_losses() {
  unpacked losses | awk -F, -v work="$work" -v smooth=$((25 / bin)) '
    NR == 1 || $3 !~ /^[0-9]/ { next }
    $1 != run { run = $1; rows = sum = 0 }
    { i = rows++ % smooth
      sum += $3 - (rows > smooth ? recent[i] : 0)
      recent[i] = $3
      if (rows >= smooth) printf "%d,%.4f\n", $2, sum / smooth >(work "/" run ".loss") }'
}

# For gnuplot's plot: the smoothed losses of the runs on standard input, each under the name that sed -E makes of it by
# $1; of a name the first has a title, and all have its colour.
loss_lines() {
  local run name before=""
  while read -r run; do
    [ -s "$work/$run.loss" ] || continue
    name=$(sed -E "$1" <<<"$run")
    echo -n " '$work/$run.loss' with lines ls $(number "$name") $(is_in "$name" "$before" && echo notitle || echo "title '$(label "$name")'"),"
    before+=" $name"
  done
}

# $figures/$1.png: losses of all runs, a line each; seeds of a group have the same colour. $2: title; $3:
# the warm-up, if it is not the scale's.
draw_losses() {
  local plot seeds=""
  smooth_losses
  plot=$(unpacked runs | awk -F, 'NR > 1 { print $1 }' | loss_lines 's/_[0-9]+$//')
  case $plot in *" notitle,"*) seeds=" (a line a seed)" ;; esac
  gnuplot <<G
$style
set terminal pngcairo size 1000,560 font "sans,11" noenhanced
set output "$figures/$1.png"
set title "$2\n$(about "${3:-}")$seeds"
set ylabel "training loss (mean of 25 steps, up to the one shown)"
set key outside right top samplen 1.5
set xrange [0:*]
set yrange [*<0.4:1.8<*<${top:-4}]
plot $plot 1.44 with lines dt 3 lc rgb "#505050" title "1.44: the mean of all pixels", \
  1.2665 with lines dt 2 lc rgb "#909090" title "1.27: each position's average"
G
  echo "![$2]($figures/$1.png)"
  echo
}

# $work/lead.GROUP, for each of the groups $2... : step, and mean, smallest and largest over the seeds of its
# loss less that of group $1 with the same seed; losses are means of the 50 steps that end there. Prints a table:
# every hundredth step from 200 on (of long runs, every tenth part), with the 95% interval of the mean. With `both`, a pair
# counts until one of it collapses, and steps at which not all count are left open. $work/pairs: how many seeds each
# group shares with $1.
leads() {
  local last every at
  last=$(last_step)
  [ "${last:-0}" -ge 200 ] || return 0
  every=$((last > 1000 ? last / 10 : 100))
  at=$(seq $((every < 200 ? 200 : every)) $every "$last" | xargs)
  # shellcheck disable=SC2086
  echo "| loss less that of $(label "$1"), same seed; means of 50 steps to | seeds |$(printf ' %s |' $at)"
  # shellcheck disable=SC2086
  echo "|---|---|$(printf -- '---|%.0s' $at)"
  { unpacked runs | sed "s/^/runs,/"; unpacked losses; } |
    awk -F, -v work="$work" -v of="$1" -v others="${*:2}" -v bin="$bin" -v both="${both:-}" -v at="$at" "$group$statistics"'
    BEGIN { m = split(others, other, " "); rows = 50 / bin; columns = split(at, column, " ")
      for (i = 1; i <= columns; i++) shown[column[i]] }
    $1 == "runs" { end[$2] = $6 == "trained" ? 1e9 : $9 + 0; next }
    $1 == "run" || (both && $2 >= end[$1]) { next }
    $1 != run { run = $1; n = sum = 0; g = group(run); seed = run; sub(/.*_/, "", seed)
      if (seed + 0 > seeds) seeds = seed + 0 }
    { i = n++ % rows; sum += $3 - (n > rows ? recent[i] : 0); recent[i] = $3
      if (n >= rows) loss[g, seed, $2] = sum / rows; if ($2 > last) last = $2 }
    END {
      for (j = 1; j <= m; j++) {
        g = other[j]; row = ""; most = 0
        for (s = 50; s <= last; s += bin) {
          k = mean = 0
          for (seed = 1; seed <= seeds; seed++) if ((g, seed, s) in loss && (of, seed, s) in loss) {
            a[++k] = loss[g, seed, s] - loss[of, seed, s]; mean += a[k] }
          if (k < most && s in shown) row = row " - |"
          if (!k) continue
          if (k > most) most = k
          mean /= k; half = half_interval(a, k); sort_numbers(a, k)
          print s "," mean "," a[1] "," a[k] >(work "/lead." g)
          if (k == most && s in shown) row = row (k > 1 ? sprintf(" %.4f ± %.4f |", mean, half) : sprintf(" %.4f |", mean)) }
        if (most) printf "| %s | %d |%s\n", g, most, row
        if (most) print most >(work "/pairs") } }'
  echo
}
last_step() { unpacked losses | awk -F, '$2 + 0 > s { s = $2 + 0 } END { print s }'; }

# $figures/$1.png: what `leads` has left for group $2 and the groups $3..., as line and band.
draw_leads() {
  local plot="" g out=$1 of=$2 pairs name
  shift 2
  name=${of_name:-$(label "$of")}
  [ -s "$work/pairs" ] || return 0
  pairs=$(sort -n "$work/pairs" | awk '{ if (NR == 1) least = $1; most = $1 }
    END { print (least < most ? least " to " : "") most (most > 1 ? " seeds" : " seed") }')
  for g in "$@"; do
    [ -s "$work/lead.$g" ] || continue
    plot+=" '$work/lead.$g' using 1:3:4 with filledcurves ls $(number "$g") fs transparent solid 0.2 noborder notitle,"
    plot+=" '' using 1:2 with lines ls $(number "$g") title '$(label "$g")',"
  done
  gnuplot <<G
$style
set terminal pngcairo size 1000,560 font "sans,11" noenhanced
set output "$figures/$out.png"
set title "Loss minus that of $name with the same seed\n$(about "" "$of" | sed 's/, [^,]* seeds*$//'), $pairs\n(means of 50 steps; band: range of seeds; above 0 is worse, above ${top:-0.16} not shown)"
set ylabel "difference of training losses"
set key outside right top samplen 1.5
set xrange [150:*]
set yrange [${bottom:--0.02}:${top:-0.16}]
plot $plot 0 with lines lw 1.5 dt 2 lc rgb "black" title "$name"
G
  echo "![loss less that of $(label "$of")]($figures/$out.png)"
  echo
}

# The line style of a group. A merge has the same colour in every figure; its variants, and what is no merge, have
# what the others leave.
number() {
  unpacked runs | awk -F, -v g="$1" "$group"'
    NR > 1 && !(group($1) in place) { name[++n] = group($1); place[name[n]] = n }
    END {
      m = split("postnorm 1 mvsplit 2 layerscale 4 keel 5 deepnorm 6", own, " ")
      for (i = 1; i <= n; i++)
        for (j = 1; j < m; j += 2)
          if (name[i] ~ "^(bias-|again-)?" own[j] "(-|$)" && !(own[j + 1] in taken)) { style[i] = own[j + 1]; taken[style[i]]; break }
      m = split("3 7 8 9 2 4 5 6 1", left, " ")
      for (i = j = 1; i <= n; i++) {
        while (!style[i] && j <= m) if (!(left[j++] in taken)) style[i] = left[j - 1]
        if (!style[i]) style[i] = i }
      print style[place[g]] }'
}

# The name of a group in a figure.
label() {
  case $1 in
    bias-*) echo "$(label "${1#bias-}"), bias" ;;
    saved) echo "MV-Split, alpha=0, up to step 240" ;;
    saved-*) echo "MV-Split, alpha=0, from there, ${1#saved-}" ;;
    again-*) echo "$(label "${1#again-}"), again" ;;
    *-lr=*) echo "$(label "${1%%-*}"), ${1#*-}" ;;
    postnorm) echo "Post-Norm" ;;
    postnorm_*) echo "Post-Norm, lr ${1#postnorm_}" ;;
    prenorm) echo "Pre-Norm" ;;
    layerscale-[0-9]00) echo "LayerScale 1e-2, ${1#*-} layers" ;;
    layerscale-*) echo "LayerScale ${1#layerscale-}" ;;
    layerscale) echo "LayerScale" ;;
    rezero) echo "ReZero" ;;
    deepnorm) echo "DeepNorm, factor alone" ;;
    deepnorm-own) echo "DeepNorm with its own start" ;;
    keel) echo "Keel" ;;
    centered) echo "Hard centering" ;;
    clip0.1) echo "Post-Norm, clipped at 0.1" ;;
    noclip) echo "Post-Norm, not clipped" ;;
    save) echo "Post-Norm, up to the save" ;;
    held-*) echo "Post-Norm, held at ${1#held-}" ;;
    postnorm-[0-9]*) echo "Post-Norm, ${1#*-} layers" ;;
    keel-*) echo "Keel, ${1#*-} layers" ;;
    mvsplit-[0-9]00) echo "MV-Split, ${1#*-} layers" ;;
    mvsplit) echo "MV-Split" ;;
    mvsplit-noleak) echo "MV-Split, no leaky term" ;;
    mvsplit-global) echo "MV-Split, one mean of all tokens" ;;
    mvsplit-attention) echo "MV-Split on attention only" ;;
    mvsplit-ffn) echo "MV-Split on the FFN only" ;;
    mvsplit-warmup50) echo "MV-Split, warm-up 50" ;;
    mvsplit-nobias) echo "MV-Split, no bias in the patch embedding" ;;
    mvsplit-*) echo "MV-Split, ${1#mvsplit-}" ;;
    *) echo "$1" ;;
  esac
}

# Where the file of a band is: column $2 of the runs $1.
band() { echo "$work/$1.$2.band"; }
# Makes it, for a run or a group of them: step, median, quartiles over depth and seeds.
depth_band() {
  unpacked diagnostics | awk -F, -v run="$1" -v want="$2" "$group$statistics"'
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == want) c = i; next }
    ($1 != run && group($1) != run) || $c == "nan" { next }
    !($2 in n) { step[++steps] = $2 }
    { value[$2, ++n[$2]] = $c + 0 }
    END {
      for (i = 1; i <= steps; i++) {
        s = step[i]; m = n[s]
        for (j = 1; j <= m; j++) a[j] = value[s, j]
        printf "%d,%.4g,%.4g,%.4g\n", s, quantile(a, m, 0.5), quantile(a, m, 0.25), quantile(a, m, 0.75) } }' >"$(band "$@")"
}

# $figures/$1.png: G_mean and G_ctr of both writers, median and quartiles over what $2 says, for the runs or groups $3...;
# seeds after the first are dashed.
draw_modes() {
  local out=$1 title panels="" writer mode one g plot files=() name
  # shellcheck disable=SC2046
  title="Gradients of the writers, $(about "" $(printf '%s\n' "${@:3}" | awk "$group"'{ print group($0) }')): median and quartiles over $2"
  shift 2
  for writer in attention ffn; do
    for mode in g_mean g_ctr; do
      plot=""
      for one in "$@"; do
        depth_band "$one" "${writer}_$mode"
        files+=("$(band "$one" "${writer}_$mode")")
        [ -s "${files[-1]}" ] || continue
        g=$(awk "$group"'BEGIN { print group(ARGV[1]) }' "$one") name=$(label "$g")
        [ "$g" = "$one" ] || name+=", seed ${one##*_}"
        plot+=" '${files[-1]}' using 1:3:4 with filledcurves ls $(number "$g") fs transparent solid 0.2 noborder notitle,"
        plot+=" '' using 1:2 with lines ls $(number "$g") $(case $one in *_[2-9]) echo "dt '-'" ;; esac) title '$name',"
      done
      panels+="set title '$([ $writer = attention ] && echo 'W_O of attention' || echo 'W_2 of the FFN'): $(
        [ $mode = g_mean ] && echo 'G_{mean}' || echo 'G_{ctr}')'
plot ${plot%,}
unset key
"
    done
  done
  # One range for the four panels, down to 1e-7: a collapse takes gradients down to where numbers end.
  gnuplot <<G
$style
set terminal pngcairo size 1200,860 font "sans,11"
set output "$figures/$out.png"
set logscale y
set format y "10^{%L}"
set ylabel "Frobenius norm"
$(awk -F, '{ if ($4 > most) most = $4 + 0; if (!least || $3 < least) least = $3 + 0 }
  END { printf "set yrange [%g:%g]\n", (least > 1e-7 ? least / 1.3 : 1e-7), most * 1.3 }' "${files[@]}")
set multiplot layout 2,2 margins 0.08,0.98,0.07,0.86 spacing 0.1,0.12 title "$title" font ",13"
set key at screen 0.5,0.965 center top maxrows 2 samplen 1.5
$panels
unset multiplot
G
  echo "![gradients of the writers]($figures/$out.png)"
  echo
}

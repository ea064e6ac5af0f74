#!/usr/bin/env bash
# make results: computes the losses, factors and steps of events of RESULTS.md (up to "Not packed") and of what README.md says was found
# again from data/figures/csv alone, and fails where the text has another.
# What stands between `<!-- NAME: by make results -->` and `<!-- end -->` is what drawing NAME prints; WRITE=1
# writes it there. In the prose, `says` puts what it is given for the %s of a text, which the prose must have;
# `given` is for numbers that are no result: settings, definitions, the paper's. A number in neither fails,
# but for code, the verdicts' column of the paper and what a run was given: rates, sizes, steps, seeds.
set -euo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
cd "$(dirname "$0")/../.."
csv=data/figures/csv results=data/experiments/RESULTS.md faults=0 said=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fault() { echo "results: $*" >&2; faults=$((faults + 1)); }

# --- Tables: $work/NAME is what drawing NAME prints -----------------------------------------------------

TABLES=1 REDRAW=1 bash data/experiment.sh all | awk -v work="$work" '
  /^### / { file = work "/" $2; getline; next }
  { gsub(/\]\(data\/figures\//, "](../figures/"); print >file }'
unpacked() { gzip -dc "$csv/$2_$1.csv.gz"; }
{
  echo "| run | layers | rate | best loss | collapse at | loss, last 25 steps | validation |"
  echo "|---|---|---|---|---|---|---|"
  for name in frontier ablations size leak failures table1 size32 cure1e3 deep appendixj; do
    unpacked runs $name | awk -F, -v name=$name '$5 == "plateau" {
      printf "| %s: %s | %d | %s | %.3f | %s | %.3f | %s |\n", name, $1, $2, $3, $7, ($8 == "" ? "-" : $8), $6,
        ($11 == "" ? "-" : sprintf("%.3f", $11)) }'
  done
  echo
} >"$work/plateau"

awk -v work="$work" '
  on && /^<!-- end -->$/ { on = 0 }
  !on { print }
  /^<!-- [a-z0-9-]+: by make results -->$/ {
    name = $2; sub(/:$/, "", name); on = 1; rows = 0
    while ((getline line <(work "/" name)) > 0) row[++rows] = line
    for (; rows && row[rows] == ""; rows--);
    print ""; for (i = 1; i <= rows; i++) print row[i]; print "" }' $results >"$work/new"
if [ -n "${WRITE:-}" ]; then cp "$work/new" $results; fi
diff $results "$work/new" >"$work/diff" ||
  fault "tables of $results are not those of the csv files (WRITE=1 writes them): $(head -n 12 "$work/diff")"

# --- Prose ----------------------------------------------------------------------------------------------

# The words of both files in one line; of the verdicts without the column of the paper's own numbers.
prose=$({
  awk '/^## Not packed/ { exit }
    /^<!-- .*by make results/ { on = 1 } !on && !/^#/ { print } /^<!-- end/ { on = 0 }' $results |
    awk -F' [|] ' '/^[|].* [|] .* [|] .* [|] /{ print $1, "|", $3, "|", $4; next } { print }'
  awk '/^!\[the collapse/ || /^## What was found/ { on = 1; next } /^## / { on = 0 } on' README.md
} | tr -s ' \n' ' ')
says() {
  local text
  # shellcheck disable=SC2059
  printf -v text "$@"
  case $prose in
    *"$text"*) said=$((said + 1)) ;;
    *) fault "no text says: $text" ;;
  esac
  prose=${prose//"$text"/ }
}
given() { says "${1//\%/%%}"; said=$((said - 1)); }

# Column $3 of run $2 in the packed runs of $1, by printf's $4.
of() {
  unpacked runs "$1" | awk -F, -v run="$2" -v want="$3" -v f="${4:-%s}" '
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == want) c = i }
    $1 == run { printf f, $c }'
}
# Cell $3 of the $6-th row (default: first) of $1's tables that begins with the cells $2, by printf's $4, times $5.
cell() {
  awk -F' *[|] *' -v row="| $2 |" -v c="$3" -v f="${4:-%s}" -v times="${5:-}" -v nth="${6:-1}" '
    index($0, row) == 1 && ++n == nth { printf f, (times == "" ? $(c + 1) : $(c + 1) * times); exit }' "$work/$1"
}
# The value of the expression $2 by printf's $1.
shown() { awk "BEGIN { printf \"$1\", $2 }"; }

# "LEAST to MOST" of numbers, each by printf's $1.
spread() { sort -g | awk -v f="${1:-%.4g}" '{ if (NR == 1) least = $1; most = $1 } END { printf f " to " f, least, most }'; }

# shellcheck source=data/experiments/draw.sh
eval "$(source data/experiments/draw.sh && declare -p exact statistics)"

# The verdicts, and the README.
best=$(of scream postnorm_1e-3 best %.3f) collapse=$(of scream postnorm_1e-3 collapse)
event=$(of scream postnorm_1e-3 norm_step) onset=$(sed -n 's/.*The onset is at \([0-9]*\):.*/\1/p' "$work/scream")
says 'trains to %s and collapses at %s, or holds for %s' "$best" "$collapse" "$(of appendixj postnorm_1 steps)"
[ "$(of appendixj postnorm_1 outcome)" = trained ] || fault "seed 1 of appendixj has not held"
in_bf16=$(of fp32event bf16 collapse) in_fp32=$(of fp32event fp32 collapse)
says 'in bf16 at %s and in fp32 at %s.' "$in_bf16" "$in_fp32"
says 'in fp32 %s steps later (the' "$((in_fp32 - in_bf16))"
says 'seed 3, which on another card collapses at %s (' "$(of cure1e3 bias-postnorm-lr=1.4e-3_3 collapse)"
says 'of step 110 it ends at %s and %s, in fp32 from the first step (bias-whole) at %s: of formats' "$(of fp32event bias-bf16 loss %.3f)" \
  "$(of fp32event bias-fp32 loss %.3f)" "$(of fp32event bias-whole loss %.3f)"
[ "$(unpacked runs fp32event | grep -c '^bias-.*,trained,')" = 4 ] || fault "with the bias a run of fp32event has failed"
rho() {
  unpacked diagnostics fp32event | awk -F, -v run="$1" '$1 == run && $2 > 470 { print $8 }' | sort -g |
    awk '{ a[NR] = $1 } END { printf "%.3g", (a[int((NR + 1) / 2)] + a[int(NR / 2) + 1]) / 2 }'
}
says 'ends at %s in bf16 and at %s in fp32.' "$(rho bf16)" "$(rho fp32)"
fails() { unpacked runs appendixj | awk -F, -v of="$1_" 'index($1, of) == 1 && $5 != "trained" { n++ } END { print n == 1 ? "one" : n == 2 ? "both" : "none" }'; }
says 'at 1e-3 %s fails with Post-Norm as it is, %s with hard centering, %s with a clip of 0.1, and %s without' \
  "$(fails postnorm)" "$(fails centered)" "$(fails clip0.1)" "$(fails noclip)"
[ "$(unpacked runs failures | grep -c '^held-.*,trained,')" = 4 ] || fault "a held rate has failed"
says 'its loss is %s and its rate %s: at' "$(of failures bias-save loss %.3f)" "$(awk 'BEGIN { printf "%.1fe-4", 1.4e-3 * 110 / 300 * 1e4 }')"
says 'it trains, to %s and %s; with the rate set at once to 1e-3 or 1.4e-3 it collapses, at %s and %s. On' "$(of failures bias-held-5e-4 loss %.3f)" \
  "$(of failures bias-held-7e-4 loss %.3f)" "$(of failures bias-held-1e-3 collapse)" "$(of failures bias-held-1.4e-3 collapse)"
says 'gets to 1.4e-3 and trains to %s (`appendixj`)' "$(of appendixj bias-postnorm_3 loss %.3f)"
says 'a jump ten steps after a norm of %s is' "$(unpacked losses failures | awk -F, '$1 == "bias-save" && $2 == 100 { printf "%.1f", $4 }')"
says '%s of %s seeds have gone by step 700, the first at %s, the last at %s (`survival`)' $(awk -F' *[|] *' '
  $2 == "postnorm-200" && NF == 10 { n = split($9, at, ", "); print $5, $4, at[1], at[n] }' "$work/survival")
# The failures of MV-Split. Cell $2 of the row of layer $3 in table $1 of the where-tables of $work/failures; the sixth is
# Post-Norm's.
where() { awk -F' *[|] *' -v nth="$1" -v c="$2" -v l="$3" '/^Where it fails/ { n++ } n == nth && NF == 9 && $2 == l { print $(c + 1) }' "$work/failures"; }
# The smallest and largest of cell $1 in the tables $2 and the layers $3, by printf's $4.
among() { for n in $2; do for l in $3; do where "$n" "$1" "$l"; done; done | spread "$4"; }
says 'in layers 0, 1 and 2 is %s before and %s at the end.' "$(among 2 '1 2 3 4 5' '0 1 2' %.3f)" "$(among 3 '1 2 3 4 5' '0 1 2' %.3f)"
says 'In layers 200 and 299 it ends at %s.' "$(among 3 '1 2 3 4 5' '200 299' %.3f)"
says 'such a rise too, to %s in layer 0:' "$(where 6 3 0)"
says 'TCS falls from %s to %s, the contrary' "$(among 4 '1 2 3 4 5' 25 %.2f | sed 's/ to / - /')" "$(among 5 '1 2 3 4 5' 25 %.2f | sed 's/ to / - /')"
says 'In layer 399 they stay apart with alpha at 0 and become alike behind a warm-up of 50, %s.' "$(among 5 '3 4 5' 399 %.2f)"
says 'with alpha at 0 it is rounding, %s times below G_ctr before and %s times at the event' \
  "$(shown %.0f "$(cell failures attention_g_ctr 2) / $(cell failures attention_g_mean 2)")" \
  "$(shown %.0f "$(cell failures attention_g_ctr 3) / $(cell failures attention_g_mean 3)")"
# In which of the five a branch is above half of the trunk before any G_ctr is five times what it was, and by how many steps.
[ "$(awk -F' *[|] *' '/^Where it fails/ { n++ } NF == 9 && /^[|] [0-9]+ [|]/ && n <= 5 {
    if ($7 > 0 && (!a[n] || $7 < a[n])) a[n] = $7; if ($8 > 0 && (!b[n] || $8 < b[n])) { b[n] = $8; layer[n] = $2 } }
  END { for (i = 1; i <= 5; i++) { if (a[i] < b[i]) print i ":" b[i] - a[i]; if (layer[i] > 50) print "deep" } }' "$work/failures" | xargs)" = 2:3 ] ||
  fault "of the five failures others begin with a branch, or in deep layers"
orders() { for nth in 1 2 3; do cell failures attention_g_ctr 5 '%s ' "" $nth; done | tr -d + | tr ' ' '\n' | grep . | spread %.1f; }
says 'G_ctr, by %s orders of magnitude (W_O,' "$(orders)"
says 'trains on this card, to %s. With the bias three' "$(of failures mvsplit-warmup50_1 loss %.3f)"
[ "$(unpacked runs failures | awk -F, '/^bias-mvsplit-warmup50/ && $5 != "trained"' | wc -l)" = 3 ] || fault "with the bias other seeds fail behind a warm-up of 50"
says 'Alpha at 0, seed 1, collapses at %s (in runs that round otherwise at %s and %s). Continued' "$(of failures mvsplit-alpha=0_1 collapse)" \
  "$(of ablations mvsplit-alpha=0_1 collapse)" "$(of leak mvsplit-alpha=0_1 collapse)"
[ "$(unpacked runs failures | grep -c '^saved-.*,700,trained,')" = 4 ] || fault "a run from step 240 of alpha = 0 has failed"
says '(medians: rho from %s to %s, TCS from %s to %s, mu_eff from %s to %s)' \
  $(for column in attention_rho attention_tcs mu_eff; do cell failures $column 2 '%s ' "" 2; cell failures $column 3 '%s ' "" 2; done)
# Of W_2's G_ctr of bias-mvsplit-alpha=0_5 at step $1, in times its medians before: the largest of layers $2 to $3.
gone=$(of failures bias-mvsplit-alpha=0_5 collapse)
left() {
  unpacked diagnostics failures | awk -F, -v gone="$gone" -v at="$1" -v from="$2" -v to="$3" "$statistics"'
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == "ffn_g_ctr") c = i }
    $1 == "bias-mvsplit-alpha=0_5" && $3 >= from && $3 <= to { l[$3]; if ($2 >= gone - 60 && $2 <= gone - 20) v[$3, ++n[$3]] = $c + 0; if ($2 == at) x[$3] = $c }
    END { for (k in l) { for (i = 1; i <= n[k]; i++) a[i] = v[k, i]; y = x[k] / quantile(a, n[k], 0.5); if (y > most) most = y } printf "%.2g", most }'
}
says "From step %s, 22 steps after the collapse, W_2's G_ctr in layers 0 to 299 is at most %s of what it was, at the window's end %s; in layer 399 it is %s times what it was." \
  $((gone + 22)) "$(left $((gone + 22)) 0 299 | awk '{ printf "%.1e", $1 }')" "$(left $((gone + 60)) 0 299 | awk '{ printf "%.1e", $1 }')" "$(left $((gone + 60)) 399 399)"
says '%s and %s times at step %s of seed 1' "$(cell scream attention_g_mean 4 %.0f)" "$(cell scream ffn_g_mean 4 %.0f)" "$event"
# Column $2 of run $1 of fp32event, all layers together: the largest, in times the median of steps 401 to 412.
rise() {
  unpacked diagnostics fp32event | awk -F, -v run="$1" -v want="$2" '
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == want) c = i } $1 == run { s[$2] += $c ^ 2 }
    END { for (step in s) print step, sqrt(s[step]) }' | sort -k 2 -g |
    awk '{ most = $2 } $1 <= 412 { a[++n] = $2 } END { printf "%.0f", most / ((a[int((n + 1) / 2)] + a[int(n / 2) + 1]) / 2) }'
}
says '%s and %s times in bf16, %s and %s in fp32 in seed 2' "$(rise bf16 attention_g_mean)" "$(rise bf16 ffn_g_mean)" \
  "$(rise fp32 attention_g_mean)" "$(rise fp32 ffn_g_mean)"
says 'up to %s and %s times in bf16, up to %s and %s in fp32. At' "$(rise bf16 attention_g_ctr)" "$(rise bf16 ffn_g_ctr)" \
  "$(rise fp32 attention_g_ctr)" "$(rise fp32 ffn_g_ctr)"
says '%s and %s times; at the onset, step %s, %s and %s times, where G_mean rises %s times' \
  "$(cell scream attention_g_ctr 4 %.0f)" "$(cell scream ffn_g_ctr 4 %.0f)" "$onset" \
  "$(cell scream "$onset" 5)" "$(cell scream "$onset" 7)" "$(cell scream "$onset" 4)"
says 'At step %s the gradients of all writers rise' "$onset"
says 'at %s their mean part' "$event"
says '| %s orders, all diagnosed layers' "$(cell scream q_grad_rms 5 %.1f -1)"
# By how many orders q_grad_rms falls in run $3 of $1, from the median of steps $4 to $5 to that of the steps after
# $6: of all layers together ($2 is all) or of the median layer.
falls() {
  unpacked diagnostics "$1" | awk -F, -v how="$2" -v run="$3" -v from="$4" -v to="$5" -v end="$6" '
    function median(a, n,  i, j, x) {
      for (i = 2; i <= n; i++) { x = a[i]; for (j = i - 1; j > 0 && a[j] > x; j--) a[j + 1] = a[j]; a[j + 1] = x }
      return (a[int((n + 1) / 2)] + a[int(n / 2) + 1]) / 2 }
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == "q_grad_rms") c = i; next }
    $1 == run { m = ++k[$2]; v[$2, m] = $c; s[$2] += $c ^ 2 }
    END {
      for (step in k) {
        if (how == "all") x = sqrt(s[step])
        else { for (i = 1; i <= k[step]; i++) b[i] = v[step, i] + 0; x = median(b, k[step]) }
        if (step + 0 >= from && step + 0 <= to) before[++n] = x
        if (step + 0 > end) after[++l] = x }
      printf "%.1f", log(median(before, n) / median(after, l)) / log(10) }'
}
says 'the last one'"'"'s; %s in the median layer' "$(falls scream median postnorm_1e-3 256 296 500)"
says 'together, %s orders in bf16 and %s in fp32 |' "$(falls fp32event all bf16 401 412 470)" "$(falls fp32event all fp32 401 412 470)"
says 'median TCS %s to %s, rho %s to %s.' "$(cell scream attention_tcs 2 %.2f)" "$(cell scream attention_tcs 3 %.2f)" \
  "$(cell scream attention_rho 2 %.2f)" "$(cell scream attention_rho 3)"
says '| %s for good' "$(of scream postnorm_1e-3 loss %.2f)"

# The seeds of cure1e3, leak and survival. Of column $2 of the runs of the groups $4... of $1, where they have it, the
# smallest and the largest, by printf's $3.
range() {
  unpacked runs "$1" | awk -F, -v groups=" ${*:4} " -v want="$2" '
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == want) c = i; next }
    { run = $1; sub(/_[0-9]+$/, "", run) } index(groups, " " run " ") && $c != "" { print $c }' | spread "$3"
}
# The runs of group $2 of $1 less those of group $3, in column $4: the mean over the seeds of which both trained, and its
# interval; nothing if these are not $5.
paired() {
  unpacked runs "$1" | awk -F, -v a="$2" -v b="$3" -v c="$4" -v seeds="$5" "$statistics"'
    $5 == "trained" { split($1, of, "_"); x[of[1], of[2]] = $c }
    END { for (s = 1; s <= 99; s++) if ((a, s) in x && (b, s) in x) { d[++n] = x[a, s] - x[b, s]; mean += d[n] }
      if (n == seeds) printf "%.4f ± %.4f", mean / n, half_interval(d, n) }'
}
# The same of their mean losses over the steps after $4 up to $5, of seeds 1 to $6.
paired_losses() {
  unpacked losses "$1" | awk -F, -v a="$2" -v b="$3" -v from="$4" -v to="$5" -v seeds="$6" "$statistics"'
    NR > 1 && $2 > from && $2 <= to { split($1, of, "_"); x[of[1], of[2]] += $3; rows[of[1], of[2]]++ }
    END { for (s = 1; s <= seeds; s++) { d[s] = x[a, s] / rows[a, s] - x[b, s] / rows[b, s]; mean += d[s] / seeds }
      printf "%.4f ± %.4f", mean, half_interval(d, seeds) }'
}
# Column $3 of the reports of the runs of group $2 that failed in $1, the first ones or the largest ($4), likewise.
reported() {
  awk -F' *[|] *' -v g="$2" -v c="$3" -v which="$4" '
    index($2, g "_") == 1 && $3 ~ /^[0-9]+$/ && $5 ~ /^[0-9]/ { if (which == "largest" || !($2 in a)) a[$2] = $c }
    END { for (run in a) print a[run] }' "$work/$1"
}
called() { reported "$1" "$2" 6 "$3" | grep -cx "$4" || true; }  # how many of these reports are called $4
word() { local words=(none one two three four five six seven eight nine ten); echo "${words[$1]}"; }
says 'collapses within %s steps of a jump' "$(word $(($(of failures bias-held-1e-3 collapse) - 110)))"
collapsed=$(range cure1e3 collapse %d postnorm)
says 'six seeds of six, at %s, after a best of %s; at 7e-4 two of eight, at %s and %s.' "$collapsed" "$(range cure1e3 best %.3f postnorm)" \
  $(awk -F' *[|] *' '$2 == "postnorm-400" && NF == 10 { gsub(",", "", $9); print $9 }' "$work/survival")
says 'cards), or at %s (300).' "$collapsed"
says 'at 1e-3 trains to %s, then collapses as the paper says in six seeds of six, at steps %s, three' "$(range cure1e3 best %.3f postnorm)" "$collapsed"
collapses() { word "$(unpacked runs cure1e3 | awk -F, -v from="$1" -v to="$2" '/^postnorm/ && $8 > from && $8 <= to { n++ } END { print n + 0 }')"; }
says 'between %s: %s within the warm-up, %s within 100 steps after it, %s long after' "${collapsed/to/and}" \
  "$(collapses 0 300)" "$(collapses 300 400)" "$(collapses 400 700)"
[ "$(of cure1e3 postnorm_2 collapse)" = 306 ] || fault "seed 2 of cure1e3 collapses at another step"
calm() {
  unpacked losses cure1e3 | awk -F, -v from="$1" -v to="$2" '$1 == "postnorm_2" && $2 > from && $2 <= to && $4 > m { m = $4 } END { printf "%.3f", m }'
}
says 'a norm of %s by step 295; in the 90 steps before at most %s)' "$(calm 290 295)" "$(calm 200 290)"
says 'seeds 1 to 6, %s.' "$(range cure1e3 loss %.3f postnorm)"
larger=$(reported cure1e3 postnorm 8 largest | spread) centered=$(reported cure1e3 postnorm 9 largest | spread)
others() { for depth in 100 200 400; do reported survival postnorm-$depth "$1" largest; done; }
says 'of a collapse: %s, six seeds, G_mean %s; %s others %s, G_mean %s; in 48 layers %s and %s, G_mean %s and %s.' "$centered" "$larger" \
  "$(word "$(others 9 | wc -l)")" "$(others 9 | spread)" "$(others 8 | spread)" "$(cell demo attention_g_ctr 4)" "$(cell demo ffn_g_ctr 4)" \
  "$(cell demo attention_g_mean 4)" "$(cell demo ffn_g_mean 4)"
says '(%s and %s times against %s and %s)' "$(cell demo attention_g_ctr 4)" "$(cell demo ffn_g_ctr 4)" \
  "$(cell demo attention_g_mean 4)" "$(cell demo ffn_g_mean 4)"
says 'has its G_mean %s times its median, its G_ctr %s. At the first report these are %s and %s.' "$larger" "$centered" \
  "$(reported cure1e3 postnorm 8 first | spread)" "$(reported cure1e3 postnorm 9 first | spread)"
says 'is "mean mode" in %s of six seeds at 400 layers and 1e-3, without the bias, the first in %s. At 200 layers the largest is in %s of %s, the first in %s;' \
  "$(word "$(called cure1e3 postnorm largest "mean mode")")" "$(word "$(called cure1e3 postnorm first "mean mode")")" \
  "$(called survival postnorm-200 largest "mean mode")" "$(reported survival postnorm-200 6 first | wc -l)" \
  "$(word "$(called survival postnorm-200 first "mean mode")")"
[ "$(called survival postnorm-200 first "not the writers' mean mode")" = 1 ] || fault "of 200 layers not one first report is neither"
p=$(cell cure1e3 'mvsplit | 0 of 6' 4)
says "(Fisher's p is %s for either)" "$p"
says '(p is %s for each)' "$p"
[ "$(grep -cE "^[|] (mvsplit|mvsplit-beta=0.05|layerscale-1e-2|keel|deepnorm|deepnorm-own) [|] 0 of 6 .* $p [|]" "$work/cure1e3")" = 6 ] || fault "a merge of cure1e3 has failed"
# Has the table of reports of $1 these groups, of none of which a run failed or has a report?
quiet() { case $(tr '\n' ' ' <"$work/$1") in *"$2"*) ;; *) return 1 ;; esac; }
[ "$(cell cure1e3 postnorm 2)" = 6 ] &&
  quiet cure1e3 'report: mvsplit (6), mvsplit-beta=0.05 (6), layerscale-1e-2 (6), keel (6), deepnorm (6), deepnorm-own (6),' ||
  fault "a merge of cure1e3 other than Post-Norm has a report"
fisher() { awk "$exact"'BEGIN { printf "%.3f", fisher('"$1, $2, $3, $4"') }'; }
ended() { unpacked runs appendixj | awk -F, -v of="bias-$1_" 'index($1, of) == 1 && $5 != "trained" { n++; gone += $8 != "" } END { printf "%d (%d)", n, gone }'; }
says 'fail (of these collapse): Post-Norm %s, without a clip %s, with a clip of 0.1 %s, hard centering %s.' "$(ended postnorm)" "$(ended noclip)" "$(ended clip0.1)" "$(ended centered)"
[ "$(unpacked runs appendixj | awk -F, '/^bias-/ && $5 == "plateau" { n++; other += !/centered/ } END { print n, other }')" = "2 0" ] || fault "others of appendixj end on the plateau"
went=$(range appendixj collapse %d bias-centered)
says 'fails later, at %s, and otherwise: two of the four end on the plateau, and without the bias its norms reach %s; it' "$went" "$(of appendixj centered_1 norm)"
says 'It learns, to %s, and fails at %s; two of the four' "$(range appendixj best %.3f bias-centered)" "$went"
says 'cannot be told apart (p is %s)' "$(fisher 3 4 4 4)"
# Of the failures without centering: those that never collapse, and the collapses after a loss below 1.0 and above it.
clipped() { unpacked runs appendixj | awk -F, '/^bias-/ && !/centered/ && $5 != "trained" { print ($8 == "" ? "none" : $7 < 1 ? "late" : "early"), $7, $8 }' | grep "^$1"; }
[ "$(clipped none | wc -l) $(clipped early | wc -l) $(clipped late | wc -l)" = "5 4 1" ] || fault "the failures of appendixj are others"
says 'crawl to no better than %s; four collapse at %s, after no better than %s; one, with the harder clip, at %s, after %s.' \
  "$(clipped none | cut -d' ' -f2 | spread %.3f | cut -d' ' -f1)" "$(clipped early | cut -d' ' -f3 | spread %d)" \
  "$(clipped early | cut -d' ' -f2 | spread %.3f | cut -d' ' -f1)" $(clipped late | awk '{ printf "%d %.3f", $3, $2 }')
says 'is cut off %s steps after its collapse' "$(($(of appendixj bias-centered_2 steps) - $(of appendixj bias-centered_2 collapse)))"
[ "$(of appendixj bias-postnorm_3 outcome)" = trained ] || fault "another seed of appendixj trains with the bias"
lost=$(unpacked runs survival | awk -F, '{ split($1, of, "_") } of[1] == "postnorm-200" && of[2] <= 8 && $5 == "failed" { n++ } END { print n }')
says 'eight of eight, Post-Norm %s of the same eight (%s), %s of 16 in all (%s)' "$((8 - lost))" "$(fisher "$lost" 8 0 8)" \
  "$(shown %d "16 - $(cell survival postnorm-200 4)")" "$(cell survival 'mvsplit-200 | 0 of 8' 4)"
depths=$(cell survival 'postnorm-100 | 1 of 16' 4)
both=$(shown %d "$(cell survival postnorm-100 4) + $(cell survival postnorm-100 5)")
says "one fails at 100 layers, %s at 200 (Fisher's p is %s; %s with one" "$(cell survival postnorm-200 4)" "$depths" \
  "$(fisher "$both" 16 "$(cell survival postnorm-200 4)" 16)"
says '%s fail at 200 (p is %s);' "$(cell survival postnorm-200 4)" "$(fisher "$both" 16 "$(cell survival postnorm-200 4)" 16)"
says 'one fails at 100 layers and %s at 200.' "$(cell survival postnorm-200 4)"
says 'their %s of 8 say' "$(cell survival postnorm-400 4)"
says '%s of the %s runs are of older code' "$(unpacked runs survival | grep -c ',bf80e5c,')" "$(unpacked runs survival | sed 1d | wc -l)"
[ "$(unpacked runs survival | awk -F, '/^bias-/ { split($1, of, "_"); n[of[1]]++; bad += $5 != "trained" } END { printf "%d", bad; for (g in n) print " " g, n[g] | "sort" }' | xargs)" = \
  "0 bias-keel-200 8 bias-layerscale-200 8 bias-mvsplit-200 8 bias-postnorm-100 16 bias-postnorm-200 16 bias-postnorm-400 8" ] || fault "with the bias runs of survival have failed"
held=$(cell leak mvsplit-alpha=0 2 %s "" 2)
spiky=$(shown %d "10 - $(cell leak 'mvsplit-noleak: 10' 9)")
p=$(cell leak 'mvsplit-alpha=0 | 8 of 10' 4)
quiet leak 'report: mvsplit (10)' || fault "a run of MV-Split in leak has a spike"
alone=$(cell leak 'mvsplit-noleak | 1 of 10' 4)
again=$(cell leak 'again-mvsplit-alpha=0 | 4 of 10' 4) with_bias=$(cell leak 'bias-mvsplit-alpha=0 | 4 of 10' 4)
says 'none fails, with the bias one. Alpha held at 0: %s fail (p is %s); the same ten seeds by later code on another card 4 (%s, against the first ones of learned alpha); with the bias 4 (%s). At 0.1 both of two. One without the leaky term (p is %s), where %s have spikes that the watch reports and with it none (p is %s)' \
  "${held% of*}" "$p" "$again" "$with_bias" "$alone" "$spiky" "$(fisher "$spiky" 10 0 10)"
says 'With alpha held at 0 %s seeds fail. Of the same ten by later code on another card, which round otherwise, 4 do' "$held"
says 'at %s of seed 1, the setting' "$(of leak bias-mvsplit_1 collapse)"
# The diagnosed failures of leak: steps from the collapse to where the largest |F| / |X| passes cell $1.
passes() { awk -F' *[|] *' -v c="$1" 'NF == 11 && $3 ~ /^(failed|plateau)$/ { print $(c + 2) - $4 }' "$work/leak" | spread %d; }
says '|F| / |X| passes 1 from %s steps after the collapse, 0.25 from %s before it to %s after.' "$(passes 4)" $(passes 3 | sed 's/-\(.*\) to \(.*\)/\1 \2/')
[ "$(awk -F' *[|] *' 'NF == 11 && $3 ~ /^(failed|plateau)$/ { n += $9 ~ /^[0-9]/; late += $9 ~ /^[0-9]/ && $9 >= $6 } END { print n, late }' "$work/leak")" = "7 7" ] ||
  fault "of leak other deeper layers outweigh the trunk"
at_most() { cell leak "$1" "$2" | cut -d' ' -f3; }
says 'training goes on neither passes %s.' "$(at_most 'bias-mvsplit | 9 trained' 9)"
# How many runs with alpha at 0 train although a branch of layers 0 to 25 is as large as the trunk, to two decimals.
large=$({ unpacked runs leak; unpacked diagnostics leak; } | awk -F, '
  $1 == "run" { for (i = 1; i <= NF; i++) c[$i] = i; next }
  $5 == "trained" { ok[$1]; next }
  $1 in ok && /alpha=0/ && NF < 10 && $3 <= 25 && ($c["attention_tr"] >= 0.995 || $c["ffn_tr"] >= 0.995) { n += !seen[$1]++ } END { print n + 0 }')
says 'With alpha at 0 %s train on at 1.00 or more, to %s.' "$(word "$large")" "$(at_most 'again-mvsplit-alpha=0 | 5 trained' 6)"
says 'in which %s of ten train to 500' "$(word "$(cell leak again-mvsplit-alpha=0 3)")"
says 'one of 10 fails, which decides nothing (p is %s).' "$alone"
says 'reports spikes in %s of 10 runs, and in none of the 10 with it; and the nine that train end with a loss %s higher' "$spiky" \
  "$(paired leak mvsplit-noleak mvsplit 6 9)"
says 'have no report, and those without it end %s lower (eight pairs, of two kinds of card; on validation %s).' "$(paired leak bias-mvsplit bias-mvsplit-noleak 6 8)" \
  "$(paired leak bias-mvsplit bias-mvsplit-noleak 11 8)"
[ "$(cell leak 'bias-mvsplit-noleak | 1 of 10' 4) $(cell leak 'bias-mvsplit: 10' 9) $(cell leak 'bias-mvsplit-noleak: 10' 9)" = "1.000 9 9" ] || fault "the leaky term with the bias"
[ "$(called leak mvsplit-alpha=0 first "mean mode") $(called leak mvsplit-alpha=0 largest "mean mode")" = "1 6" ] || fault "reports of alpha=0 are called otherwise"
attained=$(awk -F' *[|] *' '/^[|] step [|] 3/ { split($0, s, / *[|] */) }
  /^[|] attention [|] [-0-9]/ && 3 in s { for (i = 3; i < NF; i++) if ($i > 0.95) printf "%s ", s[i] }' "$work/law")
says 'attained at single steps (%s, %s).' $attained
origin="$(cell law 'attention | at' 8 %.2f) and $(cell law 'ffn | at' 8 %.2f)"
says 'slopes through the origin %s; before, %s and %s.' "$origin" \
  "$(cell law 'attention | before' 8 %.2f)" "$(cell law 'ffn | before' 8 %.2f)"
from=$(cell cure layerscale-1e-2 3 %s "" 2) to=$(cell cure layerscale-1e-2 8 %s "" 2)
says 'by %s at step 200, by %s at 700' "$from" "$to"
says 'five seeds of five, Post-Norm none (p is %s)' "$(cell demo 'postnorm | 5 of 5' 4)"
rises=$(cell demo 'bias-postnorm | 3 of 5' 4)
cut=$(fisher 4 5 0 5)
seconds() { unpacked runs demo | awk -F, -v on="$1 threads" 'index($13, on) { print $12 }' | spread %d; }
says '%s s a run on two threads, %s on four.' "$(seconds 2)" "$(seconds 4)"
[ "$(unpacked runs demo | grep -c '^bias-postnorm.*,relapsed,')" = 1 ] || fault "not one seed of the demo is cut off in its collapse"
says 'Post-Norm fails in three of five (%s), in four with one whose collapse is cut off (%s), MV-Split in none.' "$rises" "$cut"
says 'collapses with three of five, at %s, is cut off in its collapse with one and trains with one; MV-Split trains with all (p is %s, with the one cut off %s).' "$(range demo collapse %d bias-postnorm)" "$rises" "$cut"
[ "$(cell demo bias-postnorm 3) $(cell demo bias-mvsplit 3)" = "1 5" ] || fault "other seeds of the demo train with the bias"
lead() { cell "$1" "$2" "$3" %s "" "$4"; }
biased_lead() { awk -F' *[|] *' -v g="bias-$1" -v c="$2" '$2 == g && /±/ { print $(c + 1) }' "$work/cure1e3"; }
says 'in 200 layers by %s and %s.' "$(lead survival layerscale-200 3 3)" "$(lead survival layerscale-200 8 3)"
says 'at 1e-3 by %s and %s,' "$(lead cure1e3 layerscale-1e-2 3 3)" "$(lead cure1e3 layerscale-1e-2 8 3)"
says 'is higher by %s after 700 steps at 1e-3 (with the bias by %s), after 5,000 at 2.5e-3, beta 1/sqrt(400), by %s (two' "$(lead cure1e3 layerscale-1e-2 8 3)" "$(biased_lead layerscale-1e-2 8)" "$(cell table1 layerscale-lr=2.5e-3 12 %s "" 2)"
smaller() { local x; x=$(lead cure1e3 mvsplit-beta=0.05 "$1" 3); echo "${x#-}"; }
says 'lower by %s at 600 and %s at 700' "$(smaller 7)" "$(smaller 8)"
says "is above MV-Split's by %s at step 200 and by %s at 700 (with the bias by %s and %s), the factor's alone by %s and %s." \
  "$(lead cure1e3 deepnorm-own 3 3)" "$(lead cure1e3 deepnorm-own 8 3)" "$(biased_lead deepnorm-own 3)" "$(biased_lead deepnorm-own 8)" \
  "$(lead cure1e3 deepnorm 3 3)" "$(lead cure1e3 deepnorm 8 3)"
apart() { paired cure1e3 "$@" 6; }
says 'are %s and %s, with the bias %s and %s (means of 50 steps; of 25 %s, %s, %s and %s); on 32 validation images, without it, both are lower, by %s and %s (' \
  "$(lead cure1e3 deepnorm 8 3)" "$(lead cure1e3 mvsplit-beta=0.05 8 3)" "$(biased_lead deepnorm 8)" "$(biased_lead mvsplit-beta=0.05 8)" \
  "$(apart deepnorm mvsplit 6)" "$(apart mvsplit-beta=0.05 mvsplit 6)" "$(apart bias-deepnorm bias-mvsplit 6)" "$(apart bias-mvsplit-beta=0.05 bias-mvsplit 6)" \
  "$(apart mvsplit deepnorm 11)" "$(apart mvsplit mvsplit-beta=0.05 11)"
says 'by %s in the last 25 steps.' "$(apart mvsplit mvsplit-beta=0.05 6)"
# Of the intervals of the merges $1 of cure1e3 those that hold zero, by the steps at whose ends they are.
alike() {
  awk -F' *[|] *' -v g="$1" '/^[|] loss less/ { split($0, s, / *[|] */) }
    $2 == g && /±/ { for (i = 4; i < NF; i++) { split($i, x, " ± "); if (x[1] <= x[2] && -x[1] <= x[2]) printf " %s", s[i] } }' "$work/cure1e3"
}
[ "$(for g in deepnorm mvsplit-beta=0.05 layerscale-1e-2 keel; do alike $g; echo; done | xargs)" = "500 600 700 400 500" ] ||
  fault "other leads of cure1e3 hold zero"
says 'DeepNorm ends %s below MV-Split, beta 1/sqrt(400) %s.' "$(apart mvsplit deepnorm 11)" "$(apart mvsplit mvsplit-beta=0.05 11)"
says 'shrinks from %s at step 200 to %s at 700' "${from% ±*}" "${to% ±*}"
post() { cell cure postnorm "$1" %s "" 3; }
split() { cell cure mvsplit "$1" %s "" 2; }
# By how many percent MV-Split's median of column $1 of cure is below Post-Norm's, after the warm-up: seeds 1 to 3.
by_seeds() {
  unpacked diagnostics cure | awk -F, -v want="$1" "$statistics"'
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == want) c = i }
    $2 > 300 && /^(postnorm|mvsplit)_/ { v[$1, ++n[$1]] = $c + 0 }
    function middle(run,  i, a) { for (i = 1; i <= n[run]; i++) a[i] = v[run, i]; return quantile(a, n[run], 0.5) }
    END { for (s = 1; s <= 3; s++) print 100 - 100 * middle("mvsplit_" s) / middle("postnorm_" s) }' |
    spread %.0f%%
}
says "MV-Split's G_mean is %s and %s times below Post-Norm's, its G_ctr is lower by %s%% and %s%% (by seeds %s and %s)" \
  "$(shown %.0f "$(post 2) / $(split 2)")" "$(shown %.0f "$(post 5) / $(split 5)")" \
  "$(shown %.0f "100 - 100 * $(split 3) / $(post 3)")" "$(shown %.0f "100 - 100 * $(split 6) / $(post 6)")" \
  "$(by_seeds attention_g_ctr)" "$(by_seeds ffn_g_ctr)"
says '%s steps, validation loss %s |' "$(of size 1000-mvsplit-beta0.03 steps)" "$(of size 1000-mvsplit-beta0.03 validation %.3f)"
says '(%s steps of %s s,' "$(of size 1000-mvsplit-beta0.03 steps)" "$(shown %.2f "$(of size 1000-mvsplit-beta0.03 ms) / 1000")"
w2=$(sed -n '/mvsplit-attention_1_spike/,/^$/p' "$work/one-branch" | tr '\n' ' ' | sed -n 's/.* \([0-9]*\) are of ffn.w2.weight.*/\1/p')
says 'in the median layer; %s of 15.' "$w2"
r2=$(unpacked probe probe | awk -F, '$3 == "image_mean" && $2 >= 200 && $1 != "mvsplit-nobias" { if (!n++ || $4 < low) low = $4; if ($4 > high) high = $4 }
  END { printf "%.3f to %.3f", low, high }')
says '| %s in and behind the middle' "$r2"
says 'scalars alone give %s.' "$(cell probe 'postnorm | z' 3 %.3f)"
# The failures of MV-Split: experiment, run, outcome; but one of `size` that was stopped at step 34, `deep`, and the run of
# `failures` that is one of `leak`.
failed=$(for name in frontier ablations size leak failures table1 size32 cure1e3; do unpacked runs $name | sed "s/^/$name,/"; done |
  awk -F, '$2 ~ /mvsplit/ && $2 != "1000-mvsplit" && $1 $2 != "failuresbias-mvsplit-alpha=0_5" && $6 != "trained" && $6 != "relapsed" { print $1, $2, $6 }')
papers=$(grep -v 'alpha=\|noleak' <<<"$failed")
says "Of %s failed runs of MV-Split as published, any beta, eleven end" "$(wc -l <<<"$papers")"
[ "$(grep -c plateau <<<"$papers")" = 11 ] || fault "other runs of the paper's merge end on the plateau"
says 'with alpha fixed, %s of %s, and' "$(grep -c 'alpha=.*plateau' <<<"$failed")" "$(grep -c alpha= <<<"$failed")"
says 'alpha held at 0, two of %s. (One' "$(word "$(unpacked runs appendixj | awk -F, '/centered/ && $5 != "trained"' | wc -l)")"
[ "$(grep -c : "$work/plateau")" = "$(grep -c 'mvsplit\|centered' "$work/plateau")" ] || fault "others than MV-Split and hard centering are on the plateau"

# With the bias.
[ "$(unpacked runs cure1e3 | awk -F, '/^bias-/ { g = $1; sub(/_.*/, "", g); n[g] += $5 != "trained"; k[g]++ } END { for (g in n) if (n[g]) print g, n[g] "/" k[g] }' | sort | xargs)" = \
  "bias-mvsplit-lr=1.4e-3 3/6 bias-mvsplit-lr=2e-3 6/6 bias-postnorm 1/6 bias-postnorm-lr=1.4e-3 6/6 bias-postnorm-lr=2e-3 6/6" ] || fault "with the bias others fail"
ones=$(cell cure1e3 'bias-mvsplit | 0 of 6' 4) between=$(cell cure1e3 'bias-mvsplit-lr=1.4e-3 | 3 of 6' 4) cures=$(cell cure1e3 'bias-mvsplit-beta=0.05-lr=2e-3 | 0 of 6' 4)
[ "$(grep -cE "^[|] bias-(mvsplit-beta=0.05|layerscale-1e-2|deepnorm|deepnorm-own)-lr=2e-3 [|] 0 of 6 .* $cures [|]" "$work/cure1e3")" = 4 ] || fault "a cure fails at 2e-3 with the bias"
both_split=$(unpacked runs cure1e3 | awk -F, '/^bias-mvsplit-lr/ && $5 != "trained" { print $7 }' | spread %.3f)
says "(Fisher's p is %s); at 1.4e-3 in six and three (%s; on another card seed 3 trains behind Post-Norm, five and three give %s); at 2e-3 in six and six. MV-Split's nine failures come at %s, after losses of %s; of Post-Norm's twelve ten come within the warm-up, one never learns, and one learns slowly, to %s. At 1e-3" \
  "$ones" "$between" "$(fisher 5 6 3 6)" "$(range cure1e3 collapse %d bias-mvsplit-lr=1.4e-3 bias-mvsplit-lr=2e-3)" "$both_split" "$(of cure1e3 bias-postnorm-lr=1.4e-3_1 best %.2f)"
says 'MV-Split with beta 1 fails later than Post-Norm, after losses of %s.' "$both_split"
[ "$(range cure1e3 collapse %d bias-postnorm-lr=1.4e-3 bias-postnorm-lr=2e-3)" = "54 to 211" ] || fault "a collapse of Post-Norm with the bias is another"
says '| MV-Split, beta 1 (Fisher'"'"'s p against Post-Norm) | 0 (%s) | 3 (%s) | 6 (%s) |' "$ones" "$between" "$(cell cure1e3 'bias-mvsplit-lr=2e-3 | 6 of 6' 4)"
says '| Post-Norm | %s | %s (seed 3 trains on another card) | %s |' "$(cell cure1e3 'bias-postnorm | 1 of 6' 2 | cut -d' ' -f1)" "$(cell cure1e3 'bias-postnorm-lr=1.4e-3 | 6 of 6' 2 | cut -d' ' -f1)" \
  "$(cell cure1e3 'bias-postnorm-lr=2e-3 | 6 of 6' 2 | cut -d' ' -f1)"
says "DeepNorm | 0 each | not run | 0 each (%s) |" "$cures"
says 'falls slowly to %s and fails' "$(of cure1e3 bias-postnorm-lr=1.4e-3_1 loss %.3f)"
[ "$(for one in bias-postnorm bias-postnorm-lr=1.4e-3 bias-postnorm-lr=2e-3; do awk -F' *[|] *' -v of="$one: 6" '$2 == of { print $3 }' "$work/cure1e3"; done | awk '{ s += $1 } END { print s }')" = 4 ] ||
  fault "reports of Post-Norm with the bias are called otherwise"
says "DeepNorm's factor alone and DeepNorm with its own start fail in none of six each (%s)." "$cures"
says 'Post-Norm fails in one seed, at %s.' "$(of cure1e3 bias-postnorm_1 collapse)"
says 'fails in three of six at 1.4e-3, at %s, and in six of six at 2e-3, at %s: later than Post-Norm, and after losses of %s.' \
  "$(range cure1e3 collapse %d bias-mvsplit-lr=1.4e-3)" "$(range cure1e3 collapse %d bias-mvsplit-lr=2e-3)" "$both_split"
says 'at 1.4e-3 five of six go at %s, at 2e-3 five at %s, and one' "$(range cure1e3 collapse %d bias-postnorm-lr=1.4e-3)" "$(range cure1e3 collapse %d bias-postnorm-lr=2e-3)"
[ "$(unpacked runs cure1e3 | awk -F, '/^bias-postnorm-lr/ && $8 == ""' | wc -l)" = 2 ] || fault "with the bias not two of Post-Norm never learn"
ends_at() { unpacked runs cure1e3 | awk -F, -v g="$1_" 'index($1, g) == 1 { s += $6 / 6 } END { printf "%.2f", s }'; }  # six seeds
says 'with it the loss ends at %s where otherwise it ends at %s (' "$(ends_at bias-mvsplit)" "$(ends_at mvsplit)"
says 'the loss ends at %s, not %s.' "$(ends_at mvsplit)" "$(ends_at bias-mvsplit)"
below() { biased_lead "$1" 8 | sed 's/^-//; t; s/^/above: /'; }
says 'With the bias, at 1e-3, by %s and %s.' "$(biased_lead layerscale-1e-2 3)" "$(biased_lead layerscale-1e-2 8)"
says 'with the bias, at 2e-3, one of six ends at %s, as' "$(of cure1e3 bias-mvsplit-lr=2e-3_4 loss %.3f)"
[ "$(called cure1e3 bias-mvsplit-lr=2e-3 first "mean mode")" = 3 ] || fault "not three failures with the bias at 2e-3 begin with the mean mode"
says 'where beta 1 fails, ends %s below MV-Split at 1e-3.' "$(paired_losses cure1e3 bias-mvsplit bias-layerscale-1e-2-lr=2e-3 650 700 6)"
says 'DeepNorm and beta 1/sqrt(400) end %s and %s below MV-Split, means of 50 steps; LayerScale ends %s above it.' "$(below deepnorm)" \
  "$(below mvsplit-beta=0.05)" "$(biased_lead layerscale-1e-2 8)"

# What stands here.
says 'never learns (warm-up 50), or goes at %s and %s (100; both' "$(of ablations postnorm_1 collapse)" "$(of ablations postnorm_2 collapse)"
says 'seed 1 goes at %s, at %s, or holds' "$collapse" "$(of cure1e3 postnorm_1 collapse)"
says 'differ by up to %s in means of 20 steps (%s on average' "$(cell lean 'fp32, seed 2, less fp32, seed 1' 3 %.3f)" \
  "$(cell lean 'fp32, seed 2, less fp32, seed 1' 4)"
says 'one spike at step %s (norm %s)' "$(of scream postnorm_7e-4 norm_step)" "$(of scream postnorm_7e-4 norm %.0f)"
says 'falls to %s and stays near %s' "$(of scream postnorm_1.4e-3 best %.2f)" "$(of scream postnorm_1.4e-3 loss %.1f)"
says 'the first sign comes at step %s, within' "$onset"
says 'G_mean at %s is alignment' "$event"
says 'The report of step %s says' "$(sed -n '1s/.*step \([0-9]*\):.*/\1/p' $csv/scream_postnorm_1e-3_spike.txt)"
says 'from step %s on: squares' "$(unpacked diagnostics scream | awk -F, '$1 == "postnorm_1e-3" && $5 + 0 == 0 && $2 > 100 { print $2; exit }')"
says 'With intercepts of %s and %s a slope' "$(cell law 'attention | at' 6 %.0f)" "$(cell law 'ffn | at' 6 %.0f)"
says 'the origin the slopes are %s.' "$origin"
ahead() { shown "$1" "$(of frontier layerscale_"$2"_8e-3 loss) - $(of frontier mvsplit_"$2"_"$3" loss)"; }
says 'ahead of LayerScale by %s at 50 layers and %s at 100.' "$(ahead %.3f 50 4e-3)" "$(ahead %.3f 100 2e-3)"
says 'At 200 and 400 layers (%s and %s)' "$(ahead %.3f 200 1e-3)" "$(shown %.3f "$(of frontier layerscale_400_8e-3 loss) - $(of frontier mvsplit_400_5e-4 loss)")"
says 'after the warm-up it is %s times its G_ctr' "$(unpacked diagnostics one-branch | awk -F, '$1 ~ /ffn/ && $2 > 300 { print $4 / $5 }' |
  sort -g | awk '{ a[NR] = $1 } END { printf "%.2f", a[int((NR + 1) / 2)] }')"
says 'from layer %s on all are collapsed' "$(cell front 'wide | 10' 3)"
says '%s runs of `survival`, `failures`' "$({
  for name in survival leak cure1e3 failures; do unpacked runs $name; done | grep ',b0e3e05,'
  for name in survival leak cure1e3; do unpacked runs $name; done | grep ',a686b4e,'
  for name in cure1e3 quality table1; do unpacked runs $name; done | grep ',fd46437,'
  for name in cure1e3 leak appendixj survival fp32event failures table1; do unpacked runs $name; done | grep ',dd07d52,'
  for name in table1 long1000; do unpacked runs $name; done | grep ',962c22f,' | grep -v '^layerscale-lr=2.5e-3_3'
} | wc -l)"
says 'runs took %s s in all' "$(for file in "$csv"/*_runs.csv.gz; do gzip -dc "$file"; done | awk -F, '$13 !~ /^CPU/ { s += $12 } END { print s }')"
says 'decide the sign at steps %s only' "$(awk -F' *[|] *' '/^[|] loss less/ { split($0, s, / *[|] */) }
  /^[|] postnorm .*±/ { for (i = 4; i < NF; i++) { split($i, x, " ± "); if (x[1] > x[2]) printf "%s%s", n++ ? " and " : "", s[i] } }' "$work/cure")"
apart_at() { shown %+.3f "$(of frontier layerscale_"$1"_"$2" loss) - $(of frontier mvsplit_"$1"_"$3" loss)"; }
says 'less its is %s at 50 layers, %s, %s and %s at 100, 200 and 400, %s at 1000' "$(apart_at 50 8e-3 4e-3)" "$(apart_at 100 8e-3 2e-3)" \
  "$(apart_at 200 8e-3 1e-3)" "$(apart_at 400 8e-3 5e-4)" "$(apart_at 1000 4e-3 1e-3)"
says 'At 1000 it is %s behind; over' "$(shown %.3f "$(of frontier mvsplit_1000_1e-3 loss) - $(of frontier layerscale_1000_4e-3 loss)")"
size() { cell size "400-$1" 7; }
says 'it is %s ahead of LayerScale at the paper' "$(shown %.2f "$(size layerscale_1.56e-4) - $(size mvsplit-beta0.05_1.56e-4)")"
says 's rate and %s behind' "$(shown %.3f "$(size mvsplit-beta0.05_6.24e-4) - $(size layerscale_6.24e-4)")"
says 'stopped at step %s.' "$(of size 1000-mvsplit steps)"

# What is deep, wide, or of samples.
both_seeds() { printf '%s and %s' "$(of size32 mvsplit_1 "$@")" "$(of size32 mvsplit_2 "$@")"; }
says 'seeds train to %s, then collapse at %s. With' "$(both_seeds best %.3f)" "$(both_seeds collapse)"
says 'Seed 2 trains to %s, spikes from step 166 on, collapses at %s, and ends at %s, with a validation loss of %s, between' "$(of size32 mvsplit_2 best %.3f)" \
  "$(of size32 mvsplit_2 collapse)" "$(of size32 mvsplit_2 loss %.3f)" "$(of size32 mvsplit_2 validation %.3f)"
says 'it they are %s and %s times' $(sed -n 's/^Verdict: both modes: G_mean of W_O at layer 0 is \([0-9.]*\) .*G_ctr \([0-9.]*\) times.*/\1 \2/p' $csv/size32_mvsplit_2_spike.txt)
says 'trains to %s, spikes from step 180 on, collapses at %s, and reaches norms of %s. It ends at %s; its validation loss, %s,' \
  "$(of size32 mvsplit_1 best %.3f)" "$(of size32 mvsplit_1 collapse)" "$(of size32 mvsplit_1 norm)" "$(of size32 mvsplit_1 loss %.3f)" \
  "$(of size32 mvsplit_1 validation %.3f)"
[ "$(unpacked losses size32 | awk -F, 'NR > 1 && $2 > 100 && $4 > 5 && !n[$1]++ { print $1, $2 }' | xargs)" = "mvsplit_1 180 mvsplit_2 166" ] ||
  fault "the first spikes of size32 are not at 180 and 166"
says 'it came to no better than %s.' "$(of size 400-mvsplit_1.56e-4 best %.3f)"
awk '/^Verdict: both modes: G_mean of W_O at layer 0/ && $11 > 3000 && $17 > 3000 { n++ } END { exit !n }' $csv/size32_mvsplit_1_spike.txt ||
  fault "the report of size32 is another"
says 'With beta 0.05 it ends at %s, LayerScale at %s, neither' \
  "$(of size32 mvsplit-beta=0.05_1 loss %.3f)" "$(of size32 layerscale-1e-2_1 loss %.3f)"
leads32() {
  unpacked losses size32 | awk -F, '$2 > 50 { b = int(($2 - 51) / 50); if ($1 ~ /^layerscale/) s[b] += $3; if ($1 ~ /^mvsplit-/) s[b] -= $3 }
    END { for (b = 0; b < 5; b++) printf "%s%.3f", b ? ", " : "", s[b] / 50 }'
}
says 'its lead shrinks: %s.' "$(leads32)"
[ "$(sed -n '1s/.*step \([0-9]*\):.*/\1/p' $csv/size32_mvsplit_1_spike.txt)" = 224 ] || fault "the report of size32 is of another step"
[ "$(sed -n '1s/.*step \([0-9]*\):.*/\1/p' $csv/size32_mvsplit_2_spike.txt)" = "$(of size32 mvsplit_2 collapse)" ] || fault "the other is of another step"
[ "$(ls $csv/size32_*_spike.txt | xargs)" = "$csv/size32_mvsplit_1_spike.txt $csv/size32_mvsplit_2_spike.txt" ] || fault "another run of size32 has a report"
# The mean loss of run $1 of deep over the 50 steps to $2; the largest norm in steps $2 to $3; the range of
# column $3 in steps $1 to $2 of Keel.
to() {
  unpacked losses deep | awk -F, -v run="$1" -v to="$2" '
    $1 == run && $2 > to - 50 && $2 <= to { s += $3; n++ } END { printf "%.3f", s / n }'
}
most() {
  unpacked losses deep | awk -F, -v run="$1" -v from="$2" -v to="$3" '
    $1 == run && $2 >= from && $2 <= to && ($4 == "inf" || $4 + 0 > m + 0) { m = $4 } END { print m }'
}
within() {
  unpacked diagnostics deep | awk -F, -v from="$1" -v to="$2" -v want="$3" '
    NR == 1 { for (i = 1; i <= NF; i++) if ($i == want) c = i } $1 == "keel" && $2 >= from && $2 <= to { print $c }' |
    spread "$4"
}
# The loss of run $1 of deep, mean of the 5 steps to $2, by printf's $3.
five() { unpacked losses deep | awk -F, -v run="$1" -v at="$2" -v f="$3" '$1 == run && $2 == at { printf f, $3 }'; }
says 'to 100, 200, ... 600, is %s, %s, %s, %s, %s, %s, and still' \
  $(for step in 100 200 300 400 500 600; do to keel $step; echo; done)
says 'the validation loss is %s. Its' "$(of deep keel validation %.3f)"
says 'Keel does, twice: 600 steps, training loss %s and %s.' "$(of deep keel loss %.3f)" "$(of deep again-keel loss %.3f)"
says 'on an H100 of 80 GB: %s s a step. Its losses are the first one'"'"'s to all packed digits for %s steps, then within %s in means of 50 steps; its spike is of %s instead of %s.' \
  "$(shown %.2f "$(of deep again-keel ms) / 1000")" $(unpacked losses deep | awk -F, '
    $1 == "keel" { first[$2] = $3 }
    $1 == "again-keel" { d = $3 - first[$2]; if (d == 0 && !apart) same = $2; else apart = 1
      sum += d / 10; if ($2 % 50 == 0) { if (sum < 0) sum = -sum; if (sum > most) most = sum; sum = 0 } }
    END { printf "%d %.4f", same, most }') "$(most again-keel 206 220)" "$(most keel 206 220 | awk '{ printf "%.1f", $1 }')"
says 'from step 206 to 220 its norm reaches %s.' "$(most keel 206 220 | awk '{ printf "%.1f", $1 }')"
[ "$(unpacked losses deep | awk -F, '$1 == "keel" && $2 > 25 && $4 > 5 { printf "%s ", $2 }')" = "210 215 220 " ] ||
  fault "Keel has other spikes"
rho=$(within 200 600 attention_rho %.2f)
says 'of the %s layers diagnosed is %s, rho at most %s. At step 150 the TCS of all is within %s:' \
  "$(unpacked diagnostics deep | grep -c '^keel,600,')" "$(within 200 600 attention_tcs %.2f)" "${rho#* to }" "$(within 150 150 attention_tcs %.3f)"
says "the norm reaches %s by step 50, is recorded as infinite within the next five, and the loss stays at the mean predictor's, %s, where Keel has come to %s." \
  "$(most mvsplit-beta=1e-4 46 50 | awk '{ printf "%.0f", $1 }')" "$(of deep mvsplit-beta=1e-4 loss %.3f)" \
  "$(unpacked losses deep | awk -F, '$1 == "keel" && $2 > 125 && $2 <= 150 { s += $3 / 5 } END { printf "%.3f", s }')"
[ "$(most mvsplit-beta=1e-4 51 55)" = inf ] || fault "beta 1e-4 of deep has no infinite norm"
says 'move it by %s times its' "$(awk 'BEGIN { for (s = 1; s <= 50; s++) x += 7e-4 * s / 300; printf "%.0f", x / 1e-4 }')"
says 'falls to %s, rises in bursts (%s at step %s), and falls again when it is cut off (means of 5 steps: %s, %s, %s, %s, %s; validation loss %s)' \
  "$(five mvsplit-warmup=600 90 %.3f)" "$(of deep mvsplit-warmup=600 norm)" "$(of deep mvsplit-warmup=600 norm_step)" \
  $(for at in 130 135 140 145 150; do five mvsplit-warmup=600 $at '%.3f\n'; done) "$(of deep mvsplit-warmup=600 validation %.3f)"
says 'falls to %s in the last 5 steps, still' "$(five mvsplit-lr=1e-4 150 %.3f)"
[ "$(most mvsplit-lr=1e-4 20 115 | awk '{ print $1 < 6 }')" = 1 ] || fault "lr 1e-4 of deep has earlier bursts"
says 'Bursts begin at step %s: the' "$(of deep mvsplit-lr=1e-4 norm_step)"
says 'largest norms of 5 steps are %s, %s, %s, %s, %s, %s, %s.' \
  $(unpacked losses deep | awk -F, '$1 == "mvsplit-lr=1e-4" && $2 >= 120 { printf "%.0f ", $4 }')
says 'By step 150 its rates add up to what Keel'"'"'s do by step %s, where Keel'"'"'s loss is %s:' \
  "$(awk 'BEGIN { for (s = 1; s <= 150; s++) x += 1e-4 * s / 300; for (k = 0; y <= x; k++) y += 7e-4 * (k + 1) / 300; print k - 1 }')" "$(five keel 60 %.3f)"
says 'within the warm-up, ends at %s: gradients' \
  "$(for run in beta=1e-4 lr=1e-4 warmup=600; do of deep mvsplit-$run loss; echo; done | spread %.3f)"
of deep mvsplit-beta=1e-4 loss | awk '{ exit !($1 > 1.43 && $1 < 1.45) }' || fault "beta 1e-4 of deep does not stay near 1.44"
says 'four image tokens, to %s (limit' "$(cell deep start 3 %s "" 2)"
says 'exact derivatives to %s after 10 steps and to %s after 600.' "$(cell deep start 3 %s "" 2)" "$(cell deep keel 3 %s "" 2)"
says 'agree in fp64 to %s with exact ones);' "$(cell deep keel 3 %s "" 2)"
says "the 14 derivatives agree to %s (W_K's), again" "$(cell deep keel 3 %s "" 2)"
[ "$(cell deep keel 2 %s "" 2)" = "$(cell deep keel 5 %s "" 2)" ] || fault "not all derivatives of the trained deep agree in all digits"
[ "$(cell deep start 2 %s "" 2)" = "$(cell deep start 5 %s "" 2)" ] || fault "not all derivatives of deep agree in all digits"
says 'at most %s in Q, K and V.' \
  "$(unpacked gradcheck deep | awk -F, '/^start,.*[qkv]_proj/ { x = $4 < 0 ? -$4 : $4; if (x > most) most = x } END { printf "%.1e", most }')"
says 'A step takes %s s with Keel and %s s with MV-Split on an H200.' \
  "$(shown %.2f "$(of deep keel ms) / 1000")" "$(shown %.2f "$(of deep mvsplit-beta=1e-4 ms) / 1000")"
distance() { cell quality "$1" 3 %.1f "" 2; }
says 'the Fréchet distance is %s against %s.' "$(distance mvsplit)" "$(distance layerscale-1e-2)"
says "real images, which are at %s, are DeepNorm's samples, at %s, then those of beta 0.05, at %s, MV-Split's at %s, Post-Norm's and LayerScale's at %s and %s, Keel's at %s:" \
  "$(cell quality 'training images' 3)" "$(distance deepnorm)" "$(distance mvsplit-beta=0.05)" "$(distance mvsplit)" "$(distance postnorm)" "$(distance layerscale-1e-2)" "$(distance keel)"
says 'seed: Fréchet distance %s against %s).' "$(distance deepnorm)" "$(distance mvsplit)"
# By how much the accuracy of the samples of $1 is above that of $2, with its standard error.
above() {
  unpacked quality quality | awk -F, -v a="$1_1" -v b="$2_1" '$2 ~ /safetensors/ { p[$1] = $5; v[$1] = $5 * (1 - $5) / $3 } END { printf "%.3f ± %.3f", p[a] - p[b], sqrt(v[a] + v[b]) }'
}
says "than LayerScale's, by %s, and Post-Norm's, by %s." "$(above mvsplit layerscale-1e-2)" "$(above mvsplit postnorm)"
says 'from it (%s and %s more' "$(above deepnorm mvsplit)" "$(above mvsplit-beta=0.05 mvsplit)"
# Cells of the table of losses by t: postnorm 3, mvsplit-beta=0.05 4, layerscale 5, keel 6, deepnorm 7.
bin() { local x; x=$(cell quality "$1" "$2"); echo "${x#+}"; }
short() { local x; x=$(bin "$@"); echo "${x% ±*}"; }
says "DeepNorm's loss equals MV-Split's, +%s; LayerScale's excess is about half of Post-Norm's, +%s against +%s, at about" \
  "$(bin all 7)" "$(short all 5)" "$(short all 3)"
says 'by %s below t = 0.1, and least near the noise, by %s above 0.9. LayerScale is also behind more near the image, by %s against %s. Post' \
  "$(bin '0.0 to 0.1' 6)" "$(bin '0.9 to 1.0' 6)" "$(short '0.0 to 0.1' 5)" "$(short '0.9 to 1.0' 5)"
says 'by %s against %s. - All' "$(short '0.0 to 0.1' 3)" "$(short '0.9 to 1.0' 3)"
says 'in `cure1e3` by %s.' "$(range cure1e3 validation %.4f mvsplit | awk '{ printf "%.3f", $3 - $1 }')"
behind() { shown %.4f "$(of table1 "scan-$1" loss) - $(of table1 "scan-$2" loss)"; }
says "lowest loss is %s below Keel's, %s below DeepNorm's, %s below LayerScale's. At 1e-3 it is ahead of LayerScale by %s, of Keel by %s:" \
  "$(behind keel-1.6e-2 mvsplit-2.5e-3)" "$(behind deepnorm-1e-3 mvsplit-2.5e-3)" "$(behind layerscale-6.3e-3 mvsplit-2.5e-3)" \
  "$(behind layerscale-1e-3 mvsplit-1e-3)" "$(behind keel-1e-3 mvsplit-1e-3)"
scans=$(grep -oE '[*]{2}0[0-9.]*[*]{2}' "$work/table1" | tr -d '*' | xargs)
says 'MV-Split %s, LayerScale %s, DeepNorm'"'"'s factor %s, Keel %s, the last two at' $(cut -d' ' -f5,6,8 <<<"$scans") "$(cut -d' ' -f7 <<<"$scans")"
says 'as MV-Split is, and %s behind it.' "$(shown %.4f "$(of table1 bias-scan-layerscale-2.5e-3 loss) - $(of table1 bias-scan-mvsplit-2.5e-3 loss)")"
biased_late() { cell table1 bias-layerscale-lr=2.5e-3 "$1" %s "" 2; }
says 'seeds; with the bias by %s, three)' "$(biased_late 12)"
early=$(paired_losses table1 bias-layerscale-lr=2.5e-3 bias-mvsplit-lr=2.5e-3 100 150 3)
says 'three seeds: %s at 150, %s at 500, %s at the end.' "$early" "$(biased_late 3)" "$(biased_late 12)"
between() { for c in 4 5 6 7 8 9 10 11; do biased_late $c; echo; done; }
says 'From 1000 to 4500 it is lower by %s; %s of these eight intervals do not hold zero, which' "$(between | awk '{ print -$1 }' | spread %.4f)" \
  "$(word "$(between | awk '{ n += -$1 > $3 } END { print n }')")"
says "minus MV-Split's is %s at step 150, %s at 500 and %s at the end." "$early" "$(biased_late 3)" "$(biased_late 12)"
says 'On 256 validation images %s.' "$(paired table1 bias-layerscale-lr=2.5e-3 bias-mvsplit-lr=2.5e-3 11 3)"
says 'they are within %s of each other' "$(biased_late 12 | awk '{ print ($1 < 0 ? -$1 : $1) + $3 }')"
quiet table1 'report: bias-layerscale-lr=2.5e-3 (3)' && [ "$(cell table1 'bias-mvsplit-lr=2.5e-3: 3' 9) $(cell table1 bias-mvsplit-lr=2.5e-3 3) $(cell table1 bias-layerscale-lr=2.5e-3 3)" = "0 3 3" ] ||
  fault "the long runs with the bias are others"
[ "$(cut -d' ' -f1-4 <<<"$scans")" = "0.376 0.382 0.379 0.379" ] ||
  fault "the best rates of table1 are others"
says 'at 2.5e-3 collapses at step %s.' "$(of table1 scan-deepnorm-2.5e-3 collapse)"
[ "$(unpacked runs table1 | awk -F, '/^scan-/ && $5 != "trained" { printf "%s:%s ", substr($1, 6), $5 }')" = \
  "mvsplit-1.6e-2:plateau layerscale-1.6e-2:failed deepnorm-2.5e-3:failed deepnorm-6.3e-3:failed deepnorm-1.6e-2:failed " ] ||
  fault "other runs of table1 have failed"
# The long runs.
gone() { unpacked runs "$1" | awk -F, -v of="$2_" 'index($1, of) == 1 { n++; failed += $5 != "trained" } END { print failed " of " n }'; }
[ "$(for g in mvsplit-lr=2.5e-3 keel-lr=1.6e-2 layerscale-lr=6.3e-3 layerscale-lr=2.5e-3; do gone table1 $g; done | xargs) $(for g in mvsplit-lr=1e-3 layerscale-lr=4e-3; do gone long1000 $g; done | xargs)" = \
  "1 of 3 3 of 3 1 of 1 0 of 2 0 of 2 2 of 2" ] || fault "other long runs have failed"
[ "$(for e in table1 long1000; do awk -F' *[|] *' '/^[|] .*: [0-9]+ [|]/ { print $3, $4, $5 }' "$work/$e"; done | awk '{ a += $1; b += $2; c += $3 } END { print a, b, c }')" = "3 3 1" ] ||
  fault "the reports of the late collapses are called otherwise"
keel() { for seed in 1 2 3; do of table1 keel-lr=1.6e-2_$seed collapse; echo; done; }
last_to_go=$(of table1 mvsplit-lr=2.5e-3_2 collapse) first_to_go=$(of table1 layerscale-lr=6.3e-3_1 collapse)
long() { printf '%s and %s' "$(of long1000 "$1_1" "${@:2}")" "$(of long1000 "$1_2" "${@:2}")"; }
says 'seeds of three, at %s, LayerScale (6.3e-3) in one of one, at %s, MV-Split (2.5e-3) in one of three, at %s; LayerScale' \
  "$(keel | spread %d)" "$first_to_go" "$last_to_go"
says 'LayerScale (4e-3) collapses in two of two, at %s, MV-Split (1e-3) in' "$(long layerscale-lr=4e-3 collapse)"
says 'seeds of three, at %s, %s and %s, MV-Split at 2.5e-3 in one of three, at %s. -' $(keel) "$last_to_go"
says 'its best rate, 6.3e-3, seed 1 collapses at %s; a' "$first_to_go"
says 'rate, from %s to %s steps after' "$((first_to_go - 300))" "$((last_to_go - 300))"
[ "$({ unpacked runs table1; unpacked reports table1; } | awk -F, '$1 == "run" { file++; next }
  /scan-/ { next } file == 1 { at[$1] = $8; next } at[$1] && !n[$1]++ && at[$1] - $2 > most { most = at[$1] - $2 } END { print most }')" = 6 ] ||
  fault "a report of table1 comes earlier"
says 'in a burst that began at %s, from' "$(unpacked reports table1 | awk -F, '$1 == "mvsplit-lr=2.5e-3_1" { print $2 }')"
says '(G_mean of W_2 %s times its median, G_ctr %s),' "$(cell table1 'layerscale-lr=6.3e-3_1 | 1060 | 1060' 7)" "$(cell table1 'layerscale-lr=6.3e-3_1 | 1060 | 1060' 8)"
[ "$(grep -E '^[|] (mvsplit-lr=2.5e-3|keel-lr=1.6e-2|layerscale-lr=6.3e-3): ' "$work/table1" | awk -F' *[|] *' '{ print $3, $4, $5 }' | xargs)" = "0 1 0 0 2 1 1 0 0" ] ||
  fault "reports of table1 are called otherwise"
late() { cell table1 layerscale-lr=2.5e-3 "$1" %s "" 2; }
says "minus MV-Split's is %s at step 500, %s at 1000, %s at 3500 and %s at the end" "$(late 3)" "$(late 4)" "$(late 9)" "$(late 12)"
says 'less its is %s at step 500, %s at the end.' "$(late 3)" "$(late 12)"
at_best() { cell table1 "$1" "$2" %s "" 2; }
says 'MV-Split by %s, %s and %s at 500, 1000 and 1500; LayerScale at 6.3e-3, one seed, by %s and %s at' "$(at_best keel-lr=1.6e-2 3)" "$(at_best keel-lr=1.6e-2 4)" \
  "$(at_best keel-lr=1.6e-2 5)" "$(at_best layerscale-lr=6.3e-3 3)" "$(at_best layerscale-lr=6.3e-3 4)"
# Of the report $1 (of several: the most), the share of the squared norm that names like $2 have among the 15 largest
# gradients: their sum, or with $3 the largest of them. How many there are.
share() {
  awk -v like="$2" -v one="${3:-}" '
    FNR == 1 { on = sum = 0 } /^Largest gradients/ { on = 1; next } !NF { on = 0 }
    on && $1 ~ like { x = $3 + 0; sum += x; n++; if (x > most && one) most = x; if (sum > most && !one) most = sum }
    END { printf "%.1f%% %d", most, n }' "$csv"/$1_spike.txt
}
writers='ffn.w2.weight|operator.proj.weight' ends='patch_embed|final_proj'
says 'Of the 15 that each report lists a writer'\''s has at most %s of the squared norm. In' "$(share 'table1_*' "$writers" one | cut -d' ' -f1)"
says 'final projection have %s;' "$(for seed in 1 2 3; do share "table1_keel-lr=1.6e-2_$seed" "$ends"; echo; done | sed 's/% .*//' | spread %.1f%%)"
says 'in MV-Split'\''s %s of the 15 are gates alpha, in LayerScale'\''s %s are its' "$(share 'table1_mvsplit-lr=2.5e-3_2' alpha | cut -d' ' -f2)" \
  "$(share 'table1_layerscale-lr=6.3e-3_1' layerscale | cut -d' ' -f2)"
says 'norms these 15 make %s and %s: what' "$(share 'table1_mvsplit-lr=2.5e-3_2' . | cut -d' ' -f1)" \
  "$(share 'table1_layerscale-lr=6.3e-3_1' . | cut -d' ' -f1)"
says '`scream`, %s of 15 are W_O' "$(share scream_postnorm_1e-3 operator.proj.weight | cut -d' ' -f2)"
[ "$(share 'long1000_*' "$writers") $(share 'long1000_*' "$ends|layerscale")" = "0.0% 0 82.0% 30" ] || fault "the largest gradients of long1000 are others"
says '(%s and %s times in W_2 of layer 0; %s and %s in W_O of layer 200)' $(awk -F'[ ()]+' '/^  layer +0 W2 / || /^  layer +200 W_O / { print $6, $8 }' \
  "$csv/table1_mvsplit-lr=2.5e-3_2_spike.txt")
says 'LayerScale is at %s and %s, MV-Split at %s and %s.' "$(of table1 layerscale-lr=2.5e-3_1 validation)" \
  "$(of table1 layerscale-lr=2.5e-3_3 validation)" "$(of table1 mvsplit-lr=2.5e-3_1 validation)" "$(of table1 mvsplit-lr=2.5e-3_3 validation)"
says 'both seeds, at %s; MV-Split trains in both, to %s' "$(long layerscale-lr=4e-3 collapse)" "$(long mvsplit-lr=1e-3 validation)"
report() { cell long1000 "layerscale-lr=4e-3_$1 | $(of long1000 "layerscale-lr=4e-3_$1" collapse)" "$2"; }
says '(G_mean of W_O %s and %s times its median, G_ctr %s and %s times)' "$(report 1 7)" "$(report 2 7)" "$(report 1 8)" "$(report 2 8)"
[ "$(report 1 5) $(report 2 5)" = "mean mode mean mode" ] || fault "reports of long1000 are called otherwise"
ahead=$(cell long1000 'layerscale-lr=4e-3 | 2' 4 %s "" 2)
says 'ahead at step 600, by %s, MV-Split at 1200 and 1500, by %s and %s.' "${ahead#-}" "$(cell long1000 'layerscale-lr=4e-3 | 2' 6 %s "" 2)" \
  "$(cell long1000 'layerscale-lr=4e-3 | 2' 7 %s "" 2)"
says 'has two such reports, at %s and %s, and' $(unpacked reports long1000 | awk -F, '/^mvsplit.*_1,/ { print $2 }')
[ "$(unpacked reports long1000 | grep -c '^mvsplit.*_1,.*,mean mode,')" = 2 ] || fault "reports of MV-Split in long1000 are called otherwise"
says 'had LayerScale ahead by %s after 150 steps.' "$(shown %.3f "$(of frontier mvsplit_1000_1e-3 loss) - $(of frontier layerscale_1000_4e-3 loss)")"

# --- Settings, definitions, and what is known otherwise -------------------------------------------------

while read -r text; do given "$text"; done <<'END'
at from step 270 on
Seed 1 by older codes
reproduced at 48, 200
With alpha held at 0 the mean
rounding (mvsplit.cu, section 4): G_mean
whose factor of 5 was chosen
and Keel at 200 and 400, DeepNorm at 400 |
yes, 200 against 100 at one
a collapse to 25 after it
losses are of 32 images, as
off at step 150,
stopped at step 34, the
ones at every depth, beta being 1, at 1000 layers 0.03 (`frontier`)
above 5 times that median, and its factor above 3 times
or one number from 0; DeepNorm of (2L)^(1/4) X + F and Keel of 2L X + F
That at 306 has
two of 30 intervals
from step 200 on
The rates at step 150 differ: 3.5e-4 (as Keel's), 1.75e-4 and 5e-5.
which is 0.01, warm-up 600:
place of FID: 1,000 samples of each of six networks, 100 a class
losses are of 32 images.
0.01 at 7e-4 behind 300, beta 1,
in fp64 on
1e-11), in all 11 printed digits
of three steps after the collapse, 44 after
In means of 50 steps from 51 on
told from it from 500 on. Beta 1/sqrt(400) is level with it at 400 and 500, and
the validation images, 32 that
`quality` has 10,000, of one
2.1 billion parameters, one seed
beta starts at 1/sqrt(400).
W_O in layer 0 both rise more than 3,000 times.
a batch of 32 for 1024, a warm-up of 100 steps for 1000, the data.
same seeds, last 25
others at step 200. LayerScale
On 256 validation images
on 256 validation images.
5,000 steps of 32 images are
Seed 1's nearest
Seed 2's is of
the last 600 with
1000 layers, 13.6 billion parameters, on one H200
the text from layer 50, the first measured
(WRITE=1 writes
not the 1.76 of the start
those of 0.0566 are collapsed
at most 0.1 above its best
but not above 1.0 |
| ended above 1.0 |
within 0.03 of 1.2665 |
been 0.1 below 1.44 and
its best and 1.44 has
a norm above 5.)
take about 0.4 times
it (padded to 32 x 32, black is -1); the target's noise part alone costs 1.
the mean of all pixels costs 1.4404, each pixel position's own average 1.2665 (of test images 1.4395 and 1.2653); zero, where training starts, 1.756.
collapsed ends near 1.44.
± is the 95% interval
256 + 8 tokens, batch 32, bf16, warm-up 300,
of 4 of the batch's 32 samples
That bounds rho near 200 to 1000, where fp32 goes to 1e6, and
In this run's csv G_ctr is 0 and
(another implementation) collapses near step 570 of
near 1 does not say
263 is the largest A - 1 possible
beta starts at 1, and at 0.03 at 1000 layers
alpha fixed at 0, one seed
s = 0.02 (`paper`) and 0.0566 (`wide`: in the same proportion to 1/sqrt(D) as 0.02 is at D 1024)
R^2 must be about 0, and
average of the weights (0.999)
rate 1e-3 / (0.2 sqrt(D)) = 1.56e-4
a batch of 4 for 1024, a warm-up of 100 steps for 1000,
With beta near 1/sqrt(400)
model of 13.64 billion
with 10 bytes of state a parameter as with 18?
48 layers of D 48, 64 + 8 tokens, batch 16, fp32, 450 steps in
rises by 2e-5 a step
in six of six, beta 1/sqrt(400),
from 60 before the collapse to 60 after it, or
holds to step 500 at each
Beta 1/sqrt(400), LayerScale and DeepNorm, with
With the bias 4 fail.
alpha held at 0, seed 1, and
Post-Norm, kept from step 270 of seed 1 on
a branch of layers 0 to 25 outweighs
the limit of 1.0 alone
from step 240 at 7e-4, 5e-4, 2.5e-4, or at 1e-3 with a clip of 0.1, it trains to step 700.
within 0.03 of 1.27,
MV-Split with beta 1/sqrt(400); LayerScale;
the mean of the 25 from
1000 layers, holds at 400, and so
The layers of that first rise are among 0 to 50.
In layer 25 tokens come apart:
With the bias and beta 1/sqrt(400), one seed
With the bias MV-Split (beta 1/sqrt(400)) and
Of seeds 1 to 4 at 1.4e-3 the third
(1.4e-3, seed 3) nothing collapses by step 240, in
With the bias none fails: of 16 at 100, of 16 at 200, of eight at 400 (7e-4).
from step 110 of a ramp to 1.4e-3,
a warm-up of 50, seeds 2, 3 and 4.
train there with it (eight seeds) and with Post-Norm (16).
one seed of it behind beta 1/sqrt(400) |
with the bias, beta 1/sqrt(400), it is gone by step 500, and after 5,000
(95%, three seeds) |
is MV-Split with alpha held at 0 and beta at 1
comes after a loss below 1.0.
none of the other 18 has a report
gradients, of few tokens in fp64,
and of beta 1/sqrt(400), less that of
its beta of 1 is the one of five that fails
a gain of (8L)^(-1/4), W_Q and W_K with 1 (
start at N(0, 0.02^2), those of the rest at zero. Beta 1/sqrt(400) is
without a name beta is 1.
All runs clip at a norm of 1 unless
one of 10 fails with the term
With the bias, on a ramp, nothing
10,000 layers of width 128
with the bias 2.5e-3 alone was run
kept from step 110 on, where
nothing collapses by step 240: in
without a clip; with a clip of 0.1 and with
none of 16 seeds at 100 layers, none of 16 at 200, none of eight at 400, and
END
numbers=$(sed -E 's/`[^`]*`//g; s/\]\([^)]*\)//g; s/(Fig\.|App\.|Table) [0-9.]+//g
  s/[0-9,]+ (layers|steps|seeds|heads|blocks|times the rate)//g
  s/\b(1|1\.4|2|2\.5|4|5|6\.3|7|8|1\.56|1\.6|6\.24)e-[234]//g
  s/\b(D|FFN|batch|batch of|[Bb]eta|alpha|[Ww]arm-up|warm-up of|[Gg]uidance|seed|s =) [0-9.]+//g
  s/\b(bf16|fp32|fp32event|cure1e3|size32|table1|long1000)\b|\bR\^2|\bW_?2\b|\bs\^2|\bN\(0, [^)]*\)|\(T - 1\)|A - 1//g' <<<"$prose" | grep -oE '[^ ]* ?[^ ]* ?[^ ]* ?[0-9][^ ]* ?[^ ]*' || true)
[ -z "$numbers" ] || fault "numbers that no csv gives:"$'\n'"$numbers"
echo "results: the tables of $(grep -c 'by make results -->$' $results) sections and $said sentences agree with $csv; $faults faults"
[ $faults = 0 ]

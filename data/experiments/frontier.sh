# shellcheck shell=bash disable=SC2034,SC2154
# frontier: the largest learning rate that holds, against depth, for each merge. Short runs:
# an event that comes late is not seen.
columns=""

merges="postnorm layerscale rezero mvsplit"
depths="50 100 200 400 1000"
rates="2.5e-4 5e-4 1e-3 2e-3 4e-3 8e-3"
[ "$SCALE" != tiny ] || { depths="4 8" rates="1e-3 1e-2 1e-1"; }

runs() {
  local merge depth lr
  for depth in $depths; do
    for merge in $merges; do
      for lr in $rates; do
        # The paper's MV-Split has beta 1 at 400 layers and 0.03 at 1000. LayerScale
        # has the largest of the paper's lambdas.
        set -- "residual=$merge"
        if [ "$merge" = layerscale ]; then set -- "$@" lambda=1e-2; fi
        if [ "$merge-$depth" = mvsplit-1000 ]; then set -- "$@" beta=0.03; fi
        run "${merge}_${depth}_$lr" "$@" "depth=$depth" "lr=$lr" steps=150 warmup=50 save-every=0 \
          save=weights columns=1
      done
    done
  done
}

draw() {
  best_table
  edge_table
  map
}

# What each merge reaches at its own best rate, of those at which it trains: a line a depth, the lowest
# loss in bold.
best_table() {
  local merge head="" line=""
  for merge in $merges; do head+=" $(label "$merge") |" line+="---|"; done
  echo "| layers |$head"
  echo "|---|$line"
  unpacked runs | awk -F, -v merges="$merges" -v depths="$depths" '
    NR > 1 && $5 == "trained" { split($1, part, "_"); key = part[1] "_" part[2]
      if (!(key in loss) || $6 + 0 < loss[key]) { loss[key] = $6 + 0; rate[key] = part[3] } }
    END {
      m = split(merges, merge, " "); d = split(depths, depth, " ")
      for (j = 1; j <= d; j++) {
        best = ""
        for (i = 1; i <= m; i++) {
          key = merge[i] "_" depth[j]
          if (key in loss && (best == "" || loss[key] < loss[best])) best = key }
        printf "| %d |", depth[j]
        for (i = 1; i <= m; i++) {
          key = merge[i] "_" depth[j]; mark = key == best ? "**" : ""
          if (key in loss) printf " %s%.3f%s at %s |", mark, loss[key], mark, rate[key]
          else printf " none trains |" }
        print "" } }'
  echo
  made_by
}

# A line for each merge and depth: the largest rate that trained (the edge), the best one and its loss,
# and what became of the rates that did not train, those below the edge (holes) and those above it.
edge_table() {
  echo "| merge | layers | largest rate that trains | best rate | its loss, last 25 steps | smaller rates that do not train (holes) | larger rates |"
  echo "|---|---|---|---|---|---|---|"
  unpacked runs | awk -F, -v merges="$merges" -v depths="$depths" -v rates="$rates" '
    NR > 1 { outcome[$1] = $5; loss[$1] = $6 }
    function known(x, otherwise) { return x == "" ? otherwise : x }
    END {
      m = split(merges, merge, " "); d = split(depths, depth, " "); r = split(rates, rate, " ")
      for (i = 1; i <= m; i++) for (j = 1; j <= d; j++) {
        edge = best = holes = above = least = ""
        for (k = 1; k <= r; k++) {  # from the smallest rate on
          key = merge[i] "_" depth[j] "_" rate[k]
          if (outcome[key] != "trained") { above = above (above == "" ? "" : ", ") outcome[key] " at " rate[k]; continue }
          if (above != "") { holes = holes (holes == "" ? "" : ", ") above; above = "" }
          edge = rate[k] (k == r ? " or more" : "")
          if (least == "" || loss[key] + 0 < least + 0) { best = rate[k]; least = loss[key] } }
        printf "| %s | %d | %s | %s | %s | %s | %s |\n", merge[i], depth[j], known(edge, "none"), known(best, "-"),
          known(least, "-"), known(holes, "-"), known(above, "-") } }'
  echo
}

# frontier.png: a cell for each run, with its loss at the end. Failed ones are red, or sand on the plateau; the
# largest rate that trains has a frame, and an arrow where it is the grid's last.
map() {
  local merge panels="" tics steps cells="using 1:2:(0.5):(0.5)"
  steps=$(unpacked runs | awk -F, 'NR == 2 { print $4 }')
  unpacked runs | awk -F, -v work="$work" -v merges="$merges" -v depths="$depths" -v rates="$rates" '
    BEGIN { d = split(depths, depth, " "); r = split(rates, rate, " "); m = split(merges, merge, " ")
      for (i = 1; i <= d; i++) y[depth[i]] = i
      for (i = 1; i <= r; i++) x[rate[i]] = i
      split("holds light dark failed plateau edge", kind, " ")
      for (i = 1; i <= m; i++) for (j = 1; j <= 6; j++) print -9, -9, -9 >(work "/" merge[i] "." kind[j]) }
    NR > 1 { split($1, part, "_"); file = work "/" part[1]; at = x[part[3]] " " y[part[2]]
      outcome[part[1], x[part[3]], y[part[2]]] = $5
      if ($5 == "trained" || $5 == "relapsed") {
        print at, $6 >(file ".holds")
        print at, (sprintf("%.3f", $6) ($5 == "relapsed" ? "↑" : "")) >(file ($6 < 0.437 ? ".light" : ".dark")) }
      else {
        print at >(file ($5 == "plateau" ? ".plateau" : ".failed"))
        print at, ($5 == "diverged" ? "NaN" : sprintf("%.2f", $6)) >(file ".dark") } }
    END { for (i = 1; i <= m; i++) for (j = 1; j <= d; j++) {
      for (k = r; k > 0 && outcome[merge[i], k, j] != "trained"; k--);
      if (k) print k, j, (k == r ? "→" : "") >(work "/" merge[i] ".edge") } }'
  tics=$(awk -v depths="$depths" -v rates="$rates" 'BEGIN {
    d = split(depths, depth, " "); r = split(rates, rate, " ")
    printf "set xtics ("; for (i = 1; i <= r; i++) printf "%s\"%s\" %d", (i > 1 ? ", " : ""), rate[i], i
    printf ")\nset ytics ("; for (i = 1; i <= d; i++) printf "%s\"%s\" %d", (i > 1 ? ", " : ""), depth[i], i
    printf ")\nset xrange [0.5:%g]\nset yrange [0.5:%g]\n", r + 0.8, d + 0.5 }')
  for merge in $merges; do
    panels+="set title '$(label "$merge")$(case $merge in layerscale) echo ', λ 1e-2' ;; mvsplit) echo ', β 1 (1000 layers: 0.03)' ;; esac)'
plot '$work/$merge.holds' $cells:3 with boxxyerror fc palette notitle, \\
     '$work/$merge.failed' $cells with boxxyerror fc rgb '#e6a49a' notitle, \\
     '$work/$merge.plateau' $cells with boxxyerror fc rgb '#f2d16b' notitle, \\
     '$work/$merge.edge' using 1:2:(0.47):(0.47) with boxxyerror lc rgb '#e08b1a' lw 2.5 fs empty notitle, \\
     '' using (\$1 + 0.62):2:3 with labels font ',14' notitle, \\
     '$work/$merge.dark' using 1:2:3 with labels font ',10' notitle, \\
     '$work/$merge.light' using 1:2:3 with labels font ',10' tc rgb 'white' notitle
"
  done
  gnuplot <<G
$style
set terminal pngcairo size 1240,880 font "sans,11"
set output "$figures/frontier.png"
set datafile separator whitespace
set encoding utf8
unset grid
set xlabel "learning rate"
set ylabel "layers"
set palette defined (0.41 "#08306b", 0.43 "#2171b5", 0.46 "#6baed6", 0.5 "#c6dbef", 0.66 "#ffffff")
set cbrange [0.41:0.66]
set cblabel "loss at the end"
set style fill solid 1 border rgb "white"
$tics
set multiplot layout 2,2 title "Loss of the last 25 of $steps steps, warm-up 50, one seed. Red: failed, yellow: of these on the\
 plateau (1.27).\nFrame: largest rate that trains; arrow: the grid ends there" font ",13"
$panels
unset multiplot
G
  echo "![frontier]($figures/frontier.png)"
  echo
}

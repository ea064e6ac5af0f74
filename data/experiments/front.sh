# shellcheck shell=bash disable=SC2034,SC2154
# front (App. B): 128 layers whose writers start at N(0, std^2) and join without gates are
# collapsed from the start, as a front over depth. `paper` has the paper's standard deviation;
# at its width of 1024 a branch is then larger than here, so `wide` has the one that is in the
# same proportion to 1/sqrt(width).
columns="attention_tcs row_diversity retention attention_vargain attention_g_mean attention_g_ctr"

runs() {
  local depth=128 steps=300
  if [ "$SCALE" = tiny ]; then depth=12 steps=60; fi
  run paper residual=postnorm depth=$depth writer-std=0.02 final-std=0.02 diagnose-every=10 \
    diagnose-layers=all "steps=$steps"
  run wide residual=postnorm depth=$depth writer-std=0.0566 final-std=0.0566 diagnose-every=10 \
    diagnose-layers=all "steps=$steps"
}

draw() {
  results_table
  front_table
  local one
  for one in paper wide; do heat_maps "$one"; done
}

# Means over the deepest quarter of the layers, and how deep the first layer with TCS > 0.9 is.
front_table() {
  echo "| run | step | first layer with TCS > 0.9 | TCS | RowDiv | Ret | VarGain | G_mean / G_ctr, W_O |"
  echo "|---|---|---|---|---|---|---|---|"
  unpacked diagnostics | awk -F, '
    NR == 1 { next }
    $3 + 0 > deepest { deepest = $3 + 0 }
    { line[++n] = $0 }
    END { for (i = 1; i <= n; i++) {
        split(line[i], f, ",")
        if (f[1] "," f[2] != now) { flush(); now = f[1] "," f[2]; k = 0; first = ""; split("", s) }
        if (first == "" && f[4] > 0.9) first = f[3]
        if (f[3] >= 0.75 * deepest) { k++; for (c = 4; c <= 9; c++) s[c] += f[c] } }
      flush() }
    function flush(  id) {
      if (!k) return
      split(now, id, ",")
      if (id[2] != 10 && id[2] % 100) return
      printf "| %s | %d | %s | %.3f | %.3f | %.3f | %.3f | %.3g |\n", id[1], id[2], (first == "" ? "none" : first),
        s[4] / k, s[5] / k, s[6] / k, s[7] / k, s[9] ? s[8] / s[9] : 0 }'
  echo
}

# front_RUN.png: four quantities over depth and step. A box reaches halfway to the next steps and layers,
# and a little over that, which hides the seams.
heat_maps() {
  local end deepest std=0.02
  if [ "$1" = wide ]; then std=0.0566; fi
  unpacked diagnostics | awk -F, -v run="$1" '$1 == run' >"$work/map"
  IFS=, read -r _ end deepest _ <<<"$(tail -n 1 "$work/map")"
  local cells="'$work/map' using 2:3:(\$2 - 5):(\$2 + 6):(\$3 - 0.5):(\$3 + 1)"
  gnuplot <<G
$style
set terminal pngcairo size 1200,820 font "sans,11"
set output "$figures/front_$1.png"
unset grid
set palette defined (0 "#f7fbff", 0.25 "#9ecae1", 0.5 "#4292c6", 0.75 "#7a4fa3", 1 "#c0392b")
set style fill solid 1 noborder
set xrange [5:$((end + 5))]
set yrange [-0.5:$deepest.5]
set ylabel "layer"
set multiplot layout 2,2 title "Post-Norm, $(about), writers start at N(0, s^2), s = $std" font ",13"
set cbrange [0:1]
set title "TCS: mean cosine of two token states"
plot $cells:4 with boxxyerror fc palette notitle
set title "RowDiv = |A - J A| / |A|"
plot $cells:5 with boxxyerror fc palette notitle
set title "Ret = |c(A c(X))| / |c(X)|"
plot $cells:6 with boxxyerror fc palette notitle
set cbrange [0.01:0.5]
set logscale cb
set cbtics (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
set title "VarGain = |c(F)| / |c(X)|, attention"
plot $cells:7 with boxxyerror fc palette notitle
unset multiplot
G
  echo "![front, $1]($figures/front_$1.png)"
  echo
}

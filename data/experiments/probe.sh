# shellcheck shell=bash disable=SC2034,SC2154
# probe (App. H): how well the time can be read off the states of a trained network, over depth. The
# patch embedding has the paper's bias, but for one run: what tells a patch's magnitude is
# lost without it. Post-Norm has a rate that it is far from collapsing at.
tables=probe

runs() {
  local lr=2.5e-4
  if [ "$SCALE" = tiny ]; then lr=5e-3; fi
  run postnorm residual=postnorm "lr=$lr" no-patch-bias=false keep=weights
  run layerscale residual=layerscale lambda=1e-2 no-patch-bias=false keep=weights
  run mvsplit no-patch-bias=false keep=weights
  run mvsplit-nobias keep=weights
}

# At nine depths, from the first block's input to the trunk's output.
after() {
  local depth images=4096
  depth=$(option depth "$1/recipe.ini")
  if [ "$SCALE" = tiny ]; then images=512; fi
  "$program" probe --weights "$1/weights.safetensors" --layers "$(layers 9 $((depth + 1)))" \
    --images $images --out "$1/probe.csv"
}

draw() {
  results_table
  echo "R^2 of t on held-out images. Layer 0 is the input of the first block, the last one the output of the trunk;"
  echo "shuffled: with t permuted, the largest of the three. z: five scalars of the noisy image itself."
  echo
  echo "| run | layer | image mean | image rms | text mean | shuffled |"
  echo "|---|---|---|---|---|---|"
  unpacked probe | awk -F, '
    NR == 1 { next }
    { line[NR] = $0; if ($2 + 0 > depth) depth = $2 + 0 }
    END {
      for (i = 2; i <= NR; i++) {
        split(line[i], f, ",")
        if (f[1] "," f[2] != now) { flush(); now = f[1] "," f[2]; most = f[5]; split("", r) }
        r[f[3]] = f[4]; if (f[5] > most) most = f[5] }
      flush() }
    function flush(  id) {  # of the layers the first, the middle one and the last
      split(now, id, ",")
      if ("scalars" in r) printf "| %s | z | %.3f (scalars) | | | %.3f |\n", id[1], r["scalars"], most
      else if (now != "" && 2 * id[2] % depth == 0) printf "| %s | %s | %.3f | %.3f | %.3f | %.3f |\n", id[1], id[2],
        r["image_mean"], r["image_rms"], r["text_mean"], most }'
  echo
  depth_panels
}

# probe.png: a panel a run, 1 - R^2 over depth.
depth_panels() {
  local one panels="" runs
  runs=$(unpacked runs | awk -F, 'NR > 1 { print $1 }')
  for one in $runs; do
    unpacked probe | awk -F, -v run="$one" -v work="$work" '
      $1 != run { next }
      $2 == "z" { scalars = 1 - $4; next }
      { print $2, 1 - $4, 1 - $5 >(work "/" run "." $3); last = $2 }
      END { printf "0 %s\n%s %s\n", scalars, last, scalars >(work "/" run ".scalars") }'
    panels+="set title '$(label "$one"), lr $(unpacked runs | awk -F, -v run="$one" '$1 == run { print $3 }')'
plot '$work/$one.image_mean' with linespoints ls 4 pt 7 ps 0.8 title 'image mean', \\
     '$work/$one.image_rms' with linespoints ls 3 pt 5 ps 0.8 title 'image rms', \\
     '$work/$one.text_mean' with linespoints ls 2 pt 9 ps 0.9 title 'text mean', \\
     '$work/$one.scalars' with lines lw 1.5 dt 2 lc rgb '#505050' title 'scalars of the image', \\
     '$work/$one.image_mean' using 1:3 with linespoints ls 6 pt 7 ps 0.5 title 'shuffled times', \\
     '$work/$one.image_rms' using 1:3 with linespoints ls 6 pt 5 ps 0.5 notitle, \\
     '$work/$one.text_mean' using 1:3 with linespoints ls 6 pt 9 ps 0.5 notitle
unset key
"
  done
  gnuplot <<G
$style
set terminal pngcairo size 1200,820 font "sans,11" noenhanced
set output "$figures/probe.png"
set datafile separator whitespace
set xlabel "layer"
set ylabel "1 - R² of the time (lower: read better)"
set encoding utf8
set logscale y
set yrange [1e-3:2]
set multiplot layout 2,2 title "The time read off token states by ridge regression: $(about), 4096 images" font ",13"
set key at graph 0.97,0.9 right top samplen 1.5
$panels
unset multiplot
G
  echo "![probe]($figures/probe.png)"
  echo
}

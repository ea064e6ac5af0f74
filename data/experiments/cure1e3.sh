# shellcheck shell=bash disable=SC2034,SC2154
# cure1e3: the merges at the rate at which Post-Norm collapses: 1e-3, warm-up 300, 700 steps, seeds 1 to 6 of each.
# MV-Split with beta 1 and 1/sqrt(400), LayerScale 1e-2, Keel, DeepNorm's factor, and this with DeepNorm's own start.
#   bias-...           the same with the paper's bias in the patch embedding
#   bias-...-lr=RATE   some of these at higher rates: with the bias Post-Norm trains at 1e-3, but for one seed
columns="" reports=yes
others="postnorm mvsplit-beta=0.05 layerscale-1e-2 keel deepnorm deepnorm-own"

runs() {
  local one bias lr seed seeds=6 shared="lr=1e-3 save-every=0 save=weights columns=1 val-images=32"
  if [ "$SCALE" = tiny ]; then seeds=1 shared="steps=60 save=weights"; fi
  for bias in "" bias-; do
    for ((seed = 1; seed <= seeds; seed++)); do
      # shellcheck disable=SC2046,SC2086
      for one in postnorm mvsplit ${others#postnorm }; do
        run "$bias${one}_$seed" $shared seed=$seed ${bias:+no-patch-bias=false} $(merge "$one")
      done
    done
  done
  for lr in 1.4e-3 2e-3; do
    for ((seed = 1; seed <= seeds; seed++)); do
      # shellcheck disable=SC2046,SC2086
      for one in postnorm mvsplit $([ $lr = 1.4e-3 ] || echo mvsplit-beta=0.05 layerscale-1e-2 deepnorm deepnorm-own); do
        run "bias-$one-lr=${lr}_$seed" $shared lr=$lr seed=$seed no-patch-bias=false $(merge "$one")
      done
    done
  done
}

# shellcheck disable=SC2046,SC2086
draw() {
  local lr
  results_table
  without=bias- failures_table postnorm
  only=bias- without='.*-lr=' failures_table bias-postnorm
  for lr in 1.4e-3 2e-3; do only="bias-.*-lr=$lr" failures_table "bias-postnorm-lr=$lr"; done
  without=bias- draw_losses cure1e3_loss "Post-Norm collapses, the six others train"
  draw_rates
  without=bias- leads mvsplit ${others#postnorm }
  draw_leads cure1e3_difference mvsplit ${others#postnorm }
  only=bias- leads bias-mvsplit $(printf 'bias-%s ' ${others#postnorm })
  reports_table
}

# cure1e3_bias.png: the losses of the runs with the bias, a panel a rate.
draw_rates() {
  local lr plot panels=""
  smooth_losses
  for lr in 1e-3 1.4e-3 2e-3; do
    plot=$(only=bias- unpacked runs | awk -F, -v lr=$lr '$3 == lr { print $1 }' | loss_lines 's/^bias-//; s/_[0-9]+$//; s/-lr=.*//')
    [ -z "$plot" ] || panels+="set title 'lr $lr'
plot $plot 1.44 with lines dt 3 lc rgb '#505050' notitle, 1.2665 with lines dt 2 lc rgb '#909090' notitle
unset key
"
  done
  gnuplot <<G
$style
set terminal pngcairo size 1200,520 font "sans,11" noenhanced
set output "$figures/cure1e3_bias.png"
set xrange [0:*]
set yrange [0.1:2]
set ylabel "training loss (mean of 25 steps)"
set multiplot layout 1,3 margins 0.06,0.98,0.1,0.74 spacing 0.06 title "With the paper's bias in the patch embedding: \
400 layers, warm-up 300, six seeds (a line a seed).\nDotted: 1.44, the mean of all pixels; dashed: 1.27, each position's average" font ",13"
set key at screen 0.5,0.9 center top maxrows 2 samplen 1.5
$panels
unset multiplot
G
  echo "![with the bias in the patch embedding]($figures/cure1e3_bias.png)"
  echo
}

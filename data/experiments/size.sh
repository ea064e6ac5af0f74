# shellcheck shell=bash disable=SC2034,SC2154
# size: the paper's own widths, D 1024 and FFN 3072, on one GPU of 141 GB: 13.64 billion parameters in
# 1000 layers, 5.45 billion in 400, at the paper's learning rate 1e-3 / (0.2 sqrt(D)) and at four
# times it. Only weights are saved, so a run that is interrupted starts again.
columns="" bin=1 pictures=1000-mvsplit-beta0.03
spikes="400-postnorm_1.56e-4 400-mvsplit_1.56e-4 400-mvsplit_6.24e-4 400-mvsplit-beta0.05_6.24e-4"

runs() {
  sized 1000-mvsplit-beta0.03 beta=0.03 steps=152
  sized 1000-mvsplit beta=1 steps=60
  at_both_rates postnorm residual=postnorm
  at_both_rates layerscale residual=layerscale lambda=1e-2
  at_both_rates mvsplit beta=1
  at_both_rates mvsplit-beta0.05 beta=0.05  # 1/sqrt(400)
}
at_both_rates() {
  local lr
  for lr in 1.56e-4 6.24e-4; do sized "400-$1_$lr" "lr=$lr" "${@:2}"; done
}
# The name begins with the number of layers. 1000 leave no room for the watch for spikes.
sized() {
  local shared=(no-patch-bias=false save=weights save-every=0 columns=1)
  if [ "$SCALE" != full ]; then
    shared+=("depth=$((${1%%-*} / 100))")
  else
    shared+=("depth=${1%%-*}" width=1024 heads=8 ffn=3072)
    case $1 in
      1000-*) shared+=(lr=1.56e-4 batch=32 warmup=50 val-images=32 spike-factor=0) ;;
      *) shared+=(batch=4 warmup=100 steps=300) ;;
    esac
  fi
  run "$1" "${shared[@]}" "${@:2}"
}

draw() {
  local run picture=$figures/${experiment}_$pictures.png
  size_table
  draw_sizes
  if [ -e "$picture" ]; then
    echo "![samples of 1000 layers]($picture)"
    echo
  fi
  for run in $spikes; do
    [ ! -e "$csv/${experiment}_${run}_spike.txt" ] || spike_report "$run"
  done
}

# The losses of 400 layers are of the same steps, though some of the runs went on for a few more.
size_table() {
  echo "| run | lr | steps | ms a step | tokens/s | HFU | loss of the last 25 steps, of 400 layers steps 276 to 300 | best of 25 steps | largest norm after step 50 | validation loss |"
  echo "|---|---|---|---|---|---|---|---|---|---|"
  { unpacked losses; echo; unpacked runs; } | awk -F, '
    function known(x, unit) { return x == "" ? "-" : x unit }
    NF == 0 { runs = 1; getline; next }
    !runs { if ($2 > 275 && $2 <= 300) sum[$1] += $3; next }
    { printf "| %s | %s | %d | %s | %s | %s | %.3f | %.3f | %s | %s |\n", $1, $3, $4, known($16), known($17),
      known($18, "%"), ($4 < 300 ? $6 : sum[$1] / 25), $7, ($10 + 0 ? $9 " at step " $10 : "-"), known($11) }'
  echo
  echo "HFU: of the dense peak that train knows for the card."
  echo
  made_by
}

# paper_size.png: losses of 1000 and of 400 layers, means of 20 steps.
draw_sizes() {
  local run left="" right="" n dash mean="1.44 with lines dt 3 lc rgb '#505050' title '1.44: the mean of all pixels', \\
  1.2665 with lines dt 2 lc rgb '#909090' title '1.27: the average of each position'"
  for run in $(unpacked runs | awk -F, 'NR > 1 { print $1 }'); do
    unpacked losses | awk -F, -v run="$run" '
      $1 == run { sum += $3 - recent[++n % 20]; recent[n % 20] = $3; print $2, sum / (n < 20 ? n : 20) }' >"$work/$run"
    case $run in *postnorm*) n=1 ;; *layerscale*) n=4 ;; *beta*) n=3 ;; *) n=5 ;; esac
    case $run in *_6.24e-4) dash="dt '-'" ;; *) dash="" ;; esac
    case $run in
      1000-*) left+=" '$work/$run' with lines ls $n $dash title '$(size_label "$run")'," ;;
      *) right+=" '$work/$run' with lines ls $n $dash title '$(size_label "$run")'," ;;
    esac
  done
  gnuplot <<G
$style
set terminal pngcairo size 1400,540 font "sans,11" noenhanced
set output "$figures/paper_size.png"
set datafile separator whitespace
set encoding utf8
set ylabel "training loss (mean of 20 steps)"
set xrange [0:*]
set yrange [0:1.95]
set multiplot layout 1,2 margins 0.05,0.77,0.11,0.88 spacing 0.06
set key top right samplen 2 font ",9"
set title "1000 layers, D 1024: 13.64 billion parameters,\nbatch 32, warm-up 50, one seed"
plot $left $mean
set key at screen 0.995,0.91 right top
set title "400 layers, D 1024: 5.45 billion parameters,\nbatch 4, warm-up 100, one seed"
plot $right $mean
unset multiplot
G
  echo "![training at the paper's sizes]($figures/paper_size.png)"
  echo
}
size_label() {
  local lr=${1##*_}
  case ${1#*-} in
    postnorm_*) echo "Post-Norm, lr $lr" ;;
    layerscale_*) echo "LayerScale 1e-2, lr $lr" ;;
    mvsplit-beta0.05_*) echo "MV-Split, β 0.05 at the start, lr $lr" ;;
    mvsplit-beta0.03) echo "MV-Split, β 0.03 at the start, lr 1.56e-4" ;;
    mvsplit_*) echo "MV-Split, β 1 at the start, lr $lr" ;;
    mvsplit) echo "MV-Split, β 1 at the start, lr 1.56e-4 (a shorter run)" ;;
  esac
}

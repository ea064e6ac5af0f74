# shellcheck shell=bash disable=SC2034,SC2154
# lean: does a network train as well when the optimiser's state takes 10 bytes a parameter for 18?
# The same seed with either state, against two seeds of the fp32 one.
warmup=100
[ "$SCALE" != tiny ] || warmup=20

runs() {
  local steps=1000
  if [ "$SCALE" = tiny ]; then steps=120; fi
  lean_run fp32_1 state=fp32 seed=1 "steps=$steps"
  lean_run fp32_2 state=fp32 seed=2 "steps=$steps"
  lean_run lean_1 state=lean seed=1 "steps=$steps"
}
# In bf16 everywhere: the lean state is for bf16 weights.
lean_run() {
  if [ "$SCALE" = full ]; then set -- "$@" lr=1e-3; fi
  run "$@" warmup=$warmup precision=bf16
}

draw() {
  results_table
  trajectory fp32_1
  differences
  draw_differences
}

# $work/states and $work/seeds: step, and how far apart the means of 20 steps are, after the warm-up.
differences() {
  unpacked losses | awk -F, -v work="$work" -v warmup=$warmup '
    NR == 1 { next }
    $1 != run { run = $1; k = sum = 0 }
    { sum += $3
      if (++k == 4) { mean[run, $2] = sum / 4; if (run == "fp32_1") step[++n] = $2; k = sum = 0 } }
    END {
      for (i = 1; i <= n; i++) {
        s = step[i]
        if (s - 20 < warmup) continue
        compare("states", "lean_1", s); compare("seeds", "fp32_2", s) }
      print "| difference of means of 20 steps after the warm-up | means | largest | mean | mean with its sign |"
      print "|---|---|---|---|---|"
      line("states", "lean, seed 1, less fp32, seed 1"); line("seeds", "fp32, seed 2, less fp32, seed 1")
      printf "\nThe states differ by %s than the seeds do (largest and mean).\n\n",
        (most["states"] <= most["seeds"] && all["states"] <= all["seeds"] ? "no more" : "MORE") }
    function compare(what, one, s,  d, a) {
      d = mean[one, s] - mean["fp32_1", s]; a = d < 0 ? -d : d
      print s, d >(work "/" what)
      m[what]++; all[what] += a; signed[what] += d
      if (a > most[what]) most[what] = a }
    function line(what, text) {
      printf "| %s | %d | %.4f | %.4f | %+.4f |\n", text, m[what], most[what], all[what] / m[what],
        signed[what] / m[what] }'
}

# lean_difference.png
draw_differences() {
  gnuplot <<G
$style
set terminal pngcairo size 1000,420 font "sans,11"
set output "$figures/lean_difference.png"
set datafile separator whitespace
set title "How far apart two runs are: MV-Split, $(about $warmup)\n(means of 20 steps, after the warm-up)"
set ylabel "difference of training losses"
set key outside right top samplen 1.5
set xzeroaxis lw 0.8 lc rgb "#808080"
set xrange [0:*]
plot '$work/seeds' with linespoints ls 6 pt 7 ps 0.5 title "seed 2 - seed 1, fp32", \
     '$work/states' with linespoints ls 4 pt 7 ps 0.5 title "lean - fp32, seed 1"
G
  echo "![how far apart two runs are]($figures/lean_difference.png)"
  echo
}

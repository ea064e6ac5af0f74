# shellcheck shell=bash disable=SC2034,SC2154
# quality: what six networks draw and how well they predict, in place of FID. The merges of cure1e3, one seed,
# Post-Norm at a rate at which it trains; with the paper's bias of the patch embedding, unlike there. A
# network then draws 1,000 samples at guidance 2, 100 a class, in 15 steps, for tests/quality.py, and predicts all
# held-out images, with the same times and noise as the others: 30,000 and 10,000 forward passes of an image, where
# its training has 22,400 of them and as many backward. It needs Python with numpy.
columns="" tables="quality bins"
python=${PYTHON:-python3}

runs() {
  local one shared="lr=1e-3 no-patch-bias=false save-every=0 columns=1 val-images=32"
  if [ "$SCALE" = tiny ]; then shared="steps=60"; fi
  [ -n "$REDRAW" ] || "$python" -c 'import numpy' 2>/dev/null ||
    die "quality needs numpy: pip install numpy, or PYTHON=python3 with the name of one that has it"
  # Later options take the place of the same ones before.
  # shellcheck disable=SC2046,SC2086
  for one in postnorm mvsplit mvsplit-beta=0.05 layerscale-1e-2 keel deepnorm; do
    run "${one}_1" $shared seed=1 $(merge $one) $([ $one != postnorm ] || echo lr=5e-4)
  done
}

after() {
  local class prompts=() many=(--columns 100 --steps 15 --batch 250) images=10000
  if [ "$SCALE" = tiny ]; then many=(--columns 20 --steps 5) images=500; fi
  for class in t-shirt trouser pullover dress coat sandal shirt sneaker bag "ankle boot"; do
    prompts+=(--prompt "$class")
  done
  "$program" sample --weights "$1/weights.safetensors" "${prompts[@]}" --cfg 2 "${many[@]}" \
    --out "$1/samples.safetensors" &&
    "$python" tests/quality.py "$1/samples.safetensors" >"$1/quality.csv" &&
    "$program" validate --weights "$1/weights.safetensors" --images $images --batch 250 --out "$1/losses.csv" &&
    blocks "$1/losses.csv" >"$1/bins.csv"
}

# Means of the losses in file $1 over blocks of images: fifty (of a few images, fewer) in each tenth of t.
# The n-th block of a bin has the same images, times and noise in every run.
blocks() {
  awk -F, 'NR == 1 { next }
    { k = $1 < 1 ? int(10 * $1) : 9; b = n[k]++ % 50; sum[k, b] += $2; many[k, b]++ }
    END { print "bin,block,images,loss"
      for (k = 0; k < 10; k++) for (b = 0; b < 50 && b < n[k]; b++)
        printf "%.1f,%d,%d,%.6f\n", k / 10, b, many[k, b], sum[k, b] / many[k, b] }' "$1"
}

draw() {
  results_table
  quality_table
  bins_table mvsplit_1
}

quality_table() {
  echo "Fréchet distance from the 10,000 test images in the classifier's features, and the share of images that it sees"
  echo "as the class that was asked for, with its standard error (tests/quality.py). In the last rows real images stand for"
  echo "samples; of the test images the distance is that of one half from the other."
  echo
  echo "| images | number | distance | accuracy |"
  echo "|---|---|---|---|"
  unpacked quality | awk -F, '
    NR == 1 { next }
    function row(name) { return sprintf("| %s | %d | %.2f | %.3f ± %.3f |\n", name, $3, $4, $5, sqrt($5 * (1 - $5) / $3)) }
    $2 ~ /safetensors$/ { sub(/_[0-9]+$/, "", $1); printf "%s", row($1); next }
    !seen[$2]++ { last = last row($2) }
    END { printf "%s", last }'
  echo
}

# Validation by time: the loss of run $1, and by how much that of the others is higher.
bins_table() {
  unpacked bins | awk -F, -v of="$1" '
    NR == 1 { next }
    !($1 in known) { known[$1]; run[++runs] = $1 }
    !($2 in known) { known[$2]; bin[++bins] = $2 }
    { loss[$1, $2, $3] = $5; many[$2, $3] = $4 }
    # Of the loss of a, or of how much it is above that of b, in bins from..to: mean and standard error.
    function excess(a, b, from, to,  i, k, x, n, w, s, q, v, all, sum) {
      for (i = from; i <= to; i++) {
        n = w = s = q = 0
        for (k = 0; (a, bin[i], k) in loss; k++) {
          x = loss[a, bin[i], k] - (b == "" ? 0 : loss[b, bin[i], k])
          n++; w += many[bin[i], k]; s += x * many[bin[i], k]; q += x * x * many[bin[i], k] }
        if (n > 1) v += w * w * (q / w - (s / w) ^ 2) / (n - 1)
        all += w; sum += s }
      return sprintf(b == "" ? "%.4f ± %.4f" : "%+.4f ± %.4f", sum / all, sqrt(v > 0 ? v : 0) / all) }
    END {
      if (!(of in known)) of = run[1]
      for (i in many) images += many[i]
      printf "Loss of %s on %d held-out images by time t (1 is noise), and by how much that of the others is higher, with\n", of, images
      print "standard errors. Images, times and noise are the same for all: differences are of the same blocks of images."
      printf "\n| t | %s |", of; rule = "|---|---|"
      for (r = 1; r <= runs; r++) if (run[r] != of) { printf " %s |", run[r]; rule = rule "---|" }
      printf "\n%s\n", rule
      for (i = 1; i <= bins + 1; i++) {
        from = i > bins ? 1 : i; to = i > bins ? bins : i
        printf "| %s | %s |", (i > bins ? "all" : sprintf("%s to %.1f", bin[i], bin[i] + 0.1)), excess(of, "", from, to)
        for (r = 1; r <= runs; r++) if (run[r] != of) printf " %s |", excess(run[r], of, from, to)
        print "" } }'
  echo
}

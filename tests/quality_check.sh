#!/usr/bin/env bash
# quality_check.sh PROGRAM: tests/quality.py against closed forms, on real images and on samples of PROGRAM; and the
# recipe `quality` in small. Exit status 77 where there is no numpy; 1 and a line a fault otherwise.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
export PYTHON=${PYTHON:-python3} OMP_NUM_THREADS=1
faults=0
"$PYTHON" -c 'import numpy' 2>/dev/null || {
  echo "quality_check: skipped: $PYTHON has no numpy (PYTHON= names another)"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fault() {
  echo "quality_check: $1"
  faults=$((faults + 1))
}

"$PYTHON" - "$work" <<'END' || fault "the distance or the classifier is wrong"
import json, pathlib, sys
sys.path.insert(0, "tests")
sys.dont_write_bytecode = True
import numpy as np
import quality

# Samples that have a mean and a covariance exactly: whitened noise, coloured. For covariances with the same
# eigenvectors the last term is |a - b|^2 of their eigenvalues' roots; in two dimensions the trace of (Cx Cy)^(1/2)
# is sqrt(tr(Cx Cy) + 2 sqrt(det(Cx Cy))).
random = np.random.default_rng(1)
def gaussian(mean, covariance, n=500):
    x = random.standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return mean + x @ np.linalg.cholesky(covariance).T
def close(found, expected, what):
    assert abs(found - expected) < 1e-9 * (1 + abs(expected)), f"{what}: {found}, expected {expected}"
basis = np.linalg.qr(random.standard_normal((6, 6)))[0]
a, b, m = random.uniform(0.1, 3, 6), random.uniform(0.1, 3, 6), random.standard_normal(6)
x, y = gaussian(0 * m, basis * a ** 2 @ basis.T), gaussian(m, basis * b ** 2 @ basis.T)
close(quality.frechet(x, y), (m ** 2).sum() + ((a - b) ** 2).sum(), "common eigenvectors")
close(quality.frechet(y, x), quality.frechet(x, y), "symmetry")
close(quality.frechet(x, x), 0, "of itself")
close(quality.frechet(x, x + m), (m ** 2).sum(), "moved")
cx, cy = np.array([[2, 0.9], [0.9, 1]]), np.array([[1, -0.5], [-0.5, 3]])
product = cx @ cy
mixed = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
close(quality.frechet(gaussian([0, 0], cx), gaussian([1, 2], cy)), 5 + np.trace(cx + cy) - 2 * mixed, "two dimensions")
flat = x * [1, 1, 1, 1, 1, 0]  # a feature that never fires
close(quality.frechet(flat, flat + m), (m ** 2).sum(), "without a variance")

# The convolution by its definition.
x, w, b = random.standard_normal((2, 4, 6, 3)), random.standard_normal((3, 3, 3, 5)), random.standard_normal(5)
padded, y = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros((2, 4, 6, 5))
for i, j in np.ndindex(4, 6):
    y[:, i, j] = np.einsum("nabi,abio->no", padded[:, i:i + 3, j:j + 3], w) + b
pooled = [[np.maximum(y[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2].max((1, 2)), 0) for j in range(3)] for i in range(2)]
assert np.allclose(quality.convolved(x, w, b), np.moveaxis(np.array(pooled), 2, 0)), "the convolution"

# The accuracy that the classifier was stored with. What it sees of its own class is not the order of the images.
weights, metadata = quality.stored_classifier()
test, labels = quality.real_images("t10k")
right = quality.classify(test, weights)[1].argmax(1) == labels
assert right.sum() == int(metadata["test_images_right"]), f"{right.sum()} of {len(test)} test images are seen right"

# A file of samples that are test images, a row a class, once with the right captions and once with rows exchanged.
rows = [test[labels == k][:20] for k in range(10)]
images = np.concatenate(rows).astype("<f4")
seen = np.concatenate([right[labels == k][:20] for k in range(10)]).mean()
def save(name, captions, images=images):
    header = {"__metadata__": {"captions": json.dumps(captions)},
              "samples": {"dtype": "F32", "shape": [len(images), 1, 32, 32], "data_offsets": [0, images.nbytes]}}
    text = json.dumps(header).encode()
    pathlib.Path(sys.argv[1], name).write_bytes(len(text).to_bytes(8, "little") + text + images.tobytes())
save("real.safetensors", quality.NAMES)
save("turned.safetensors", ["a photo of a " + name for name in quality.NAMES[1:] + quality.NAMES[:1]])
save("other.safetensors", ["cat"] * 10)
save("nan.safetensors", quality.NAMES, images * np.float32("nan"))
pathlib.Path(sys.argv[1], "seen").write_text(f"{seen:.4f}")
END

judged() { "$PYTHON" -B tests/quality.py "$@" >"$work/out" 2>"$work/log"; }
field() { awk -F, -v row="$1" -v n="$2" '$1 == row { print $n }' "$work/out"; }
judged "$work/real.safetensors" "$work/turned.safetensors" || fault "real images: $(tail -n 1 "$work/log")"
cp "$work/out" "$work/first"
accuracy() { field "$work/$1.safetensors" 4; }
distance() { field "$work/$1.safetensors" 3; }
[ "$(accuracy real)" = "$(cat "$work/seen")" ] || fault "real images are not seen as the classes they are"
awk -v x="$(accuracy turned)" 'BEGIN { exit !(x < 0.1) }' || fault "exchanged rows are not seen"
[ "$(distance real)" = "$(distance turned)" ] || fault "the captions change the distance"
judged "$work/real.safetensors" "$work/turned.safetensors"
cmp -s "$work/out" "$work/first" || fault "it is not the same twice"

refused() {  # refused WORDS FILE
  judged "$2" && fault "not refused: $1"
  grep -qF -- "$1" "$work/log" || fault "no '$1' but: $(tail -n 1 "$work/log")"
  [ -s "$work/out" ] && fault "printed something before: $1"
}
refused "does not say of which classes" "$work/other.safetensors"
refused "NaN or infinity" "$work/nan.safetensors"
refused "No such file" "$work/none.safetensors"
refused "holds no \`samples\`" tests/classifier.safetensors
refused "no whole safetensors file" tests/quality.py

# The recipe, in a copy that has only what it needs; its two tables, of each of the six.
mkdir -p "$work/copy/build" "$work/copy/tests"
cp -r data "$work/copy"
cp tests/quality.py tests/classifier.safetensors "$work/copy/tests"
ln -s "$(realpath "$1")" "$work/copy/build/mvsplit"
(cd "$work/copy" && SCALE=tiny bash data/experiment.sh quality) >"$work/log" 2>&1 ||
  fault "the recipe: $(tail -n 1 "$work/log")"
for line in '^| [a-z].* | 200 | [0-9.]* | 0\.' '^| all | .* ± .* | .* ± .* |'; do
  grep -q "$line" "$work/log" || fault "the recipe's tables have no line $line"
done
[ "$(grep -c ' | 200 | ' "$work/log")" = 6 ] || fault "not six networks are judged"
# What is packed stays when the runs' own files are gone.
find "$work/copy/experiments" -name bins.csv -delete
cp "$work"/copy/experiments/tiny/figures/csv/quality_bins.csv.gz "$work/bins"
(cd "$work/copy" && SCALE=tiny bash data/experiment.sh quality) >"$work/log" 2>&1 || fault "the recipe's second call failed"
cmp -s "$work/bins" "$work"/copy/experiments/tiny/figures/csv/quality_bins.csv.gz || fault "a packed table was lost"
echo "quality_check: $faults faults"
[ $faults = 0 ]

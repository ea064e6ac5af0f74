"""How good samples of Fashion-MNIST are, as a small classifier sees them (a stand-in for FID; it needs numpy).

    tests/quality.py SAMPLES.safetensors...     of `mvsplit sample --out SAMPLES.safetensors`

Prints csv, a row a file: how many images, the Frechet distance of their features from those of the 10,000 test images,
and the share in which the classifier sees the class that was asked for. Behind the files, for scale, the same of 1,000
training images, and of the test images (their distance is that of one half from the other).

What it is: the classifier of tests/classifier.safetensors in numpy, and two numbers. What it is not: comparable with
anybody's FID, which is of Inception's features; or free of bias: fewer images are further away, so compare equal numbers.
"""
import gzip, json, pathlib, re, sys
try:
    import numpy as np
except ImportError:
    sys.exit("tests/quality.py needs numpy: pip install numpy")

HERE = pathlib.Path(__file__).parent
NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


# --- Files ---------------------------------------------------------------------------------------

def read_safetensors(path):
    """({name: array}, metadata)."""
    try:
        data = pathlib.Path(path).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        metadata, tensors = header.pop("__metadata__", {}), {}
        for name, t in header.items():
            begin, end = (start + offset for offset in t["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], {"F16": "<f2", "F32": "<f4"}[t["dtype"]]).reshape(t["shape"])
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError):
        sys.exit(f"{path} is no whole safetensors file of F16 and F32")
    return tensors, metadata


def real_images(part):
    """Images (N, 32, 32) in [-1, 1] with a black border, as mvsplit reads them, and labels (N) of `train` or `t10k`."""
    def idx(what, offset):
        path = HERE.parent / "data" / "downloads" / f"{part}-{what}-ubyte.gz"
        try:
            return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
        except (OSError, EOFError) as error:
            sys.exit(f"cannot read {path} ({error}): bash data/fetch.sh fetches it")
    pixels = idx("images-idx3", 16).reshape(-1, 28, 28).astype(np.float32) / 127.5 - 1
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2)), constant_values=-1), idx("labels-idx1", 8).astype(int)


def samples(path):
    """Images (N, 32, 32) of a file of samples, clipped as a picture of them is, and the classes (N) that were asked for."""
    tensors, metadata = read_safetensors(path)
    images = tensors.get("samples")
    if images is None or images.ndim != 4 or images.shape[1:] != (1, 32, 32) or not len(images):
        sys.exit(f"{path} holds no `samples` (N,1,32,32): mvsplit sample --out draws them")
    if not np.isfinite(images).all():
        sys.exit(f"{path} holds NaN or infinity")
    captions = [re.sub("^a photo of an? ", "", c) for c in json.loads(metadata.get("captions", "[]"))]
    if not captions or not set(captions) <= set(NAMES) or len(images) % len(captions):
        sys.exit(f"{path} does not say of which classes its rows are: its captions are {captions}, "
                 f"expected some of {', '.join(NAMES)}")
    return images[:, 0].clip(-1, 1), np.repeat([NAMES.index(c) for c in captions], len(images) // len(captions))


# --- The classifier --------------------------------------------------------------------------------

def convolved(x, weight, bias):
    """ReLU of a 3x3 convolution, zeros around, then the largest of 2x2: x (N,H,W,I), weight (3,3,I,O) -> (N,H/2,W/2,O)."""
    n, h, w, i = x.shape
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.concatenate([x[:, a:a + h, b:b + w] for a in range(3) for b in range(3)], axis=3)
    y = patches.reshape(-1, 9 * i) @ weight.reshape(9 * i, -1) + bias
    return np.maximum(y.reshape(n, h // 2, 2, w // 2, 2, -1).max((2, 4)), 0)


def classify(images, weights, batch=250):
    """Features (N, 64), those before the last layer, and logits (N, 10) of images (N, 32, 32)."""
    features = []
    for first in range(0, len(images), batch):
        x = images[first:first + batch, :, :, None].astype(np.float32)
        for layer in ("conv1", "conv2", "conv3"):
            x = convolved(x, weights[layer + ".weight"], weights[layer + ".bias"])
        x = x.reshape(len(x), -1) @ weights["features.weight"] + weights["features.bias"]
        features.append(np.maximum(x, 0))
    features = np.concatenate(features)
    return features, features @ weights["classes.weight"] + weights["classes.bias"]


def stored_classifier():
    """({name: fp32 array}, metadata) of tests/classifier.safetensors."""
    weights, metadata = read_safetensors(HERE / "classifier.safetensors")
    return {name: w.astype(np.float32) for name, w in weights.items()}, metadata


# --- The distance ----------------------------------------------------------------------------------

def frechet(x, y):
    """Between the Gaussians with the means and covariances of the rows of x and of y:
    |mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)).

    Cx Cy is similar to Sx Cy Sx, Sx = Cx^(1/2), which is symmetric and not negative: its eigenvalues' roots sum up to
    the last trace. Rounding makes zeros a little negative.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(cx)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    mixed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cy @ root), 0)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * mixed


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__.split("\n\n")[1].strip())
    drawn = [(path, *samples(path)) for path in sys.argv[1:]]  # what is no such file costs no work
    weights, _ = stored_classifier()
    (test, labels), (train, train_labels) = real_images("t10k"), real_images("train")
    real, logits = classify(test, weights)

    def row(what, features, distance, logits, asked):
        print(f"{what},{len(features)},{distance:.3f},{(logits.argmax(1) == asked).mean():.4f}", flush=True)
    print("images,number,frechet,accuracy")
    for what, images, asked in [*drawn, ("training images", train[:1000], train_labels[:1000])]:
        features, seen = classify(images, weights)
        row(what, features, frechet(features, real), seen, asked)
    half = len(real) // 2
    row("test images", real, frechet(real[:half], real[half:]), logits, labels)


if __name__ == "__main__":
    main()

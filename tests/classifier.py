"""Trains the classifier in whose features tests/quality.py measures samples: PyTorch, some minutes on one core.

    tests/classifier.py [OUT.safetensors]     by default tests/classifier.safetensors

What it is: three convolutions, 64 features, ten classes of Fashion-MNIST; batch norms in training, which become part of
the convolutions' weights and biases. What it is not: how the classifier is used: tests/quality.py computes with the file,
in numpy, and here its answers are held against PyTorch's.
"""
import json, pathlib, sys
try:
    import torch
    from torch import nn
except ImportError:
    sys.exit("tests/classifier.py needs PyTorch and numpy: pip install torch numpy")
import numpy as np
import quality

WIDTHS, FEATURES, EPOCHS, BATCH, RATE = (16, 32, 64), 64, 12, 128, 4e-3


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = list(zip((1, *WIDTHS), WIDTHS))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in sizes)
        self.features = nn.Linear(16 * WIDTHS[-1], FEATURES)
        self.classes = nn.Linear(FEATURES, 10)

    def forward(self, x):  # (N, 32, 32) -> (N, 64), (N, 10)
        x = x[:, None]
        for conv, norm in zip(self.convs, self.norms):
            x = nn.functional.max_pool2d(norm(conv(x)), 2).relu()
        x = x.permute(0, 2, 3, 1).flatten(1)  # as quality.py has them
        x = self.features(nn.functional.dropout(x, 0.25, self.training)).relu()
        return x, self.classes(x)


def mirrored(x):
    """Each image as it is, or left for right."""
    return torch.where(torch.rand(len(x), 1, 1) < 0.5, x.flip(2), x)


def trained(images, labels):
    model = Classifier().to(memory_format=torch.channels_last)  # a third less time
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs=EPOCHS, steps_per_epoch=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(images))[:steps * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(mirrored(images[batch]))[1], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / steps
        print(f"epoch {epoch + 1}/{EPOCHS}  loss {total:.4f}", flush=True)
    return model.eval()


def tensors_of(model):
    """As quality.classify() takes them, in fp16: y = (conv(x) - mean) s + bias, s = gain / sqrt(variance + eps)."""
    tensors = {}
    for k, (conv, norm) in enumerate(zip(model.convs, model.norms), start=1):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        tensors[f"conv{k}.weight"] = (conv.weight * scale[:, None, None, None]).permute(2, 3, 1, 0)  # (3, 3, I, O)
        tensors[f"conv{k}.bias"] = norm.bias - norm.running_mean * scale
    for name, linear in (("features", model.features), ("classes", model.classes)):
        tensors[name + ".weight"], tensors[name + ".bias"] = linear.weight.T, linear.bias
    return {name: np.ascontiguousarray(x.detach().numpy().astype(np.float16)) for name, x in tensors.items()}


def write_safetensors(path, tensors, metadata):
    header, end = {"__metadata__": metadata}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F16", "shape": x.shape, "data_offsets": [end, end := end + x.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values()))


def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else quality.HERE / "classifier.safetensors"
    torch.manual_seed(1)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums in one order on every machine
    images, labels = (torch.from_numpy(x) for x in quality.real_images("train"))
    test, test_labels = quality.real_images("t10k")
    model = trained(images, labels)
    tensors = tensors_of(model)
    features, logits = quality.classify(test, {name: x.astype(np.float32) for name, x in tensors.items()})
    with torch.no_grad():
        expected = torch.cat([model(x)[0] for x in torch.from_numpy(test).split(500)]).numpy()
    error = np.linalg.norm(features - expected) / np.linalg.norm(expected)
    right = int((logits.argmax(1) == test_labels).sum())
    print(f"{right} of {len(test)} test images, features as PyTorch's to {error:.1e} (weights in fp16)")
    if error > 2e-3 or right < 0.915 * len(test):
        sys.exit("this classifier is not written: expected 91.5% and PyTorch's features to 2e-3")
    write_safetensors(out, tensors, {"test_images_right": str(right)})
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()

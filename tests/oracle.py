"""An outside oracle: small random models, forward and backward, by PyTorch's automatic differentiation in fp64.

What it is: a second implementation, written from the paper's formulas and the checkpoint format only; it shares no code
with the C++ one. The merges are in the definition form, with the projectors J and P as explicit matrices, and autograd
makes every gradient, so no closed form of (49)-(54) appears here. Finite differences check each before it is written.
What it is not: fast, or a training program. The project runs without Python; the numbers made here are committed.

Regenerate:  python3 -m venv v && v/bin/pip install torch numpy safetensors && v/bin/python tests/oracle.py [OUT]
OUT is tests/oracle.safetensors unless given. Seeds are fixed and the header is sorted, so one machine with one version
of PyTorch writes the same bytes again; another may differ in the last bits of the results (order of summation).

The file holds for each case, all F64: CASE/z (B,C,H,W), CASE/text (B,L,d_text), CASE/cotangent (B,C,H,W),
CASE/velocity (B,C,H,W), CASE/grad.z, CASE/grad.text, and for every parameter CASE/NAME and CASE/grad.NAME.
Gradients are those of loss = sum(cotangent * velocity). __metadata__[CASE] = "key=value key=value ...".
"""
import json
import pathlib
import sys
import numpy as np
import torch
from safetensors.numpy import save
from torch.nn.functional import conv2d, silu

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

QK_EPS = 1e-6  # the QK-norm's epsilon is fixed; norm_eps is that of the merges and the input norms
BASE = dict(depth=1, width=16, heads=2, ffn=24, channels=2, height=8, image_width=12, patch=2,
            text_tokens=3, text_dim=5, residual=None, means="segment", norm_eps="1e-6")
# image_width != height, so that rows and columns cannot be mistaken; text_dim=width leaves context_proj out
CASES = {
    "postnorm": dict(BASE, residual="postnorm", depth=3),
    "layerscale": dict(BASE, residual="layerscale", depth=2),
    "rezero": dict(BASE, residual="rezero", depth=2, text_dim=16),
    "mvsplit": dict(BASE, residual="mvsplit", depth=3),
    "mvsplit-attention": dict(BASE, residual="mvsplit-attention", depth=2),
    "mvsplit-ffn": dict(BASE, residual="mvsplit-ffn", depth=2, norm_eps="1e-5"),
    "mvsplit-noleak": dict(BASE, residual="mvsplit-noleak", depth=2),
    "mvsplit-global": dict(BASE, residual="mvsplit", means="global", depth=2),
    "prenorm": dict(BASE, residual="prenorm", depth=3),
    "centered": dict(BASE, residual="centered", width=8, ffn=12),
    "leaky": dict(BASE, residual="leaky", width=8, ffn=12),
}
BATCH = 2


def merge_kind(residual, which):
    """The merge in place 1 (attention) or 2 (FFN); the one-branch modes have Post-Norm in the other place."""
    if residual == "mvsplit-attention":
        return "mvsplit" if which == 1 else "postnorm"
    if residual == "mvsplit-ffn":
        return "mvsplit" if which == 2 else "postnorm"
    return residual


def random_parameters(c, rng):
    """Every parameter by its checkpoint name, all random: none at zero or one, where a wrong term could hide."""
    D, C, p, ffn = c["width"], c["channels"], c["patch"], c["ffn"]

    def normal(*shape, mean=0.0, std=0.3):
        return torch.tensor(mean + std * rng.standard_normal(shape))

    w = {"patch_embed.patch_proj.weight": normal(D, C, p, p), "patch_embed.patch_proj.bias": normal(D)}
    if c["text_dim"] != D:
        w["context_proj.weight"] = normal(D, c["text_dim"])
    for i in range(c["depth"]):
        block = f"blocks.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            w[block + f"operator.{name}.weight"] = normal(D, D)
        w[block + "ffn.w13.weight"] = normal(2 * ffn, D)
        w[block + "ffn.w2.weight"] = normal(D, ffn)
        for which in (1, 2):
            kind = merge_kind(c["residual"], which)
            if kind == "layerscale":
                w[block + f"layerscale{which}"] = normal(D, mean=0.5, std=0.2)
            if kind == "rezero":
                w[block + f"rezero{which}"] = normal(1, mean=0.6, std=0.1)
            if kind == "leaky":
                w[block + f"leaky{which}"] = normal(D, mean=0.3, std=0.2)
            if kind in ("mvsplit", "mvsplit-noleak"):
                w[block + f"fused_mvsplit_norm{which}.alpha"] = normal(D, mean=0.3, std=0.2)
                w[block + f"fused_mvsplit_norm{which}.beta"] = normal(D, mean=0.7, std=0.3)
    w["final_proj.weight"] = normal(p * p * C, D)
    w["final_proj.bias"] = normal(p * p * C)
    return w


def rms_norm(x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rope_angles(rows, cols, text_tokens, head_dim):
    """(T, hd/2): [row*w_j, col*w_j], w_j = 10000^(-2j/(hd/2)); image tokens row-major; text tokens do not turn (0)."""
    w = [10000.0 ** (-2.0 * j / (head_dim / 2)) for j in range(head_dim // 4)]
    image = [[row * x for x in w] + [col * x for x in w] for row in range(rows) for col in range(cols)]
    return torch.tensor(image + [[0.0] * (head_dim // 2)] * text_tokens)


def rope(x, angle):
    """x = [x1, x2] are the halves of the head; each pair (x1_j, x2_j) turns by minus its angle, as in the released weights."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * angle.cos() + x2 * angle.sin(), x2 * angle.cos() - x1 * angle.sin()], -1)


def attention(x, w, block, heads, angle):
    B, T, D = x.shape
    hd = D // heads

    def split(name):  # (B, T, D) -> (B, heads, T, hd); head h owns the channels h*hd .. (h+1)*hd-1
        return (x @ w[block + f"operator.{name}.weight"].T).reshape(B, T, heads, hd).transpose(1, 2)

    q = rms_norm(rope(split("q_proj"), angle), QK_EPS)
    k = rms_norm(rope(split("k_proj"), angle), QK_EPS)
    a = torch.softmax(q @ k.transpose(-1, -2) / hd ** 0.5, dim=-1)
    y = (a @ split("v_proj")).transpose(1, 2).reshape(B, T, D)
    return y @ w[block + "operator.proj.weight"].T


def swiglu(x, w, block):
    g, v = (x @ w[block + "ffn.w13.weight"].T).chunk(2, dim=-1)  # the gate half comes first
    return (silu(g) * v) @ w[block + "ffn.w2.weight"].T


def projectors(segments):
    """J = blkdiag((1/n) 1 1^T) over the segments and P = I - J, (T, T): the mean is over tokens, not channels."""
    J = torch.block_diag(*[torch.full((n, n), 1.0 / n) for n in segments])
    return J, torch.eye(sum(segments)) - J


def merge(X, F, w, block, which, residual, J, P):
    """Z of one residual merge. (7): Z = X + beta * (P F) + alpha * J (F - X)."""
    kind = merge_kind(residual, which)
    if kind in ("postnorm", "prenorm"):
        Z = X + F
    elif kind in ("layerscale", "rezero"):
        Z = X + w[block + f"{kind}{which}"] * F
    elif kind == "centered":
        Z = X + P @ F
    elif kind == "leaky":
        Z = X + w[block + f"leaky{which}"] * (F - X)
    else:
        alpha, beta = (w[block + f"fused_mvsplit_norm{which}.{gate}"] for gate in ("alpha", "beta"))
        leaving = J @ X if kind == "mvsplit" else 0.0  # mvsplit-noleak keeps the trunk's mean
        Z = X + beta * (P @ F) + alpha * (J @ F - leaving)
    return Z


def forward(z, text, w, c):
    B, C, H, W = z.shape
    p, D, eps = c["patch"], c["width"], float(c["norm_eps"])
    rows, cols = H // p, W // p
    patches = conv2d(z, w["patch_embed.patch_proj.weight"], w["patch_embed.patch_proj.bias"], stride=p)
    image = patches.permute(0, 2, 3, 1).reshape(B, rows * cols, D)  # token = row * cols + col
    context = text @ w["context_proj.weight"].T if c["text_dim"] != D else text
    x = torch.cat([rms_norm(image, eps), rms_norm(context, eps)], dim=1)  # image tokens first

    angle = rope_angles(rows, cols, text.shape[1], D // c["heads"])
    J, P = projectors([x.shape[1]] if c["means"] == "global" else [rows * cols, text.shape[1]])
    trunk = x  # Pre-Norm's is never normalised; for all others it is x, which the branches read
    for i in range(c["depth"]):
        block = f"blocks.{i}."
        for which in (1, 2):
            F = attention(x, w, block, c["heads"], angle) if which == 1 else swiglu(x, w, block)
            Z = merge(trunk, F, w, block, which, c["residual"], J, P)
            x = rms_norm(Z, eps)
            trunk = Z if c["residual"] == "prenorm" else x

    y = x[:, :rows * cols] @ w["final_proj.weight"].T + w["final_proj.bias"]
    y = y.reshape(B, rows, cols, p, p, C)  # (row in patch, col in patch, channel)
    return y.permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


def check(name, loss, leaves, grads, rng, h=5e-4):
    """Each gradient against a four-point central difference along a random unit direction; returns the worst error."""
    worst = 0.0
    for key, x in leaves.items():
        u = torch.tensor(rng.standard_normal(x.shape))
        u /= u.norm()

        def at(s):
            with torch.no_grad():
                return loss({**leaves, key: x + s * u}).item()

        numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        scale = grads[key].norm().item() / x.numel() ** 0.5  # the size of a typical directional derivative
        error = abs(numeric - (grads[key] * u).sum().item()) / scale
        if not error <= 1e-8:
            sys.exit(f"{name}: autograd and finite differences disagree on {key}: relative error {error:.1e}")
        worst = max(worst, error)
    return worst


def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("oracle.safetensors")
    tensors, metadata = {}, {}
    for seed, (name, c) in enumerate(CASES.items(), start=1):
        rng = np.random.RandomState(seed)  # RandomState: NumPy promises that its stream never changes
        leaves = random_parameters(c, rng)
        leaves["z"] = torch.tensor(rng.standard_normal((BATCH, c["channels"], c["height"], c["image_width"])))
        leaves["text"] = torch.tensor(rng.standard_normal((BATCH, c["text_tokens"], c["text_dim"])))
        cotangent = torch.tensor(rng.standard_normal(leaves["z"].shape))

        def loss(x):
            return (cotangent * forward(x["z"], x["text"], x, c)).sum()

        for x in leaves.values():
            x.requires_grad_()
        velocity = forward(leaves["z"], leaves["text"], leaves, c)
        grads = dict(zip(leaves, torch.autograd.grad((cotangent * velocity).sum(), list(leaves.values()))))
        worst = check(name, loss, leaves, grads, rng)

        case = {**leaves, "cotangent": cotangent, "velocity": velocity, **{"grad." + k: g for k, g in grads.items()}}
        assert all(torch.isfinite(x).all() and (x != 0).all() for x in case.values())
        tensors.update({f"{name}/{k}": np.ascontiguousarray(x.detach().numpy()) for k, x in case.items()})
        metadata[name] = " ".join(f"{k}={v}" for k, v in c.items())
        print(f"{name}: {len(grads)} gradients, finite differences agree to {worst:.1e}\n    {metadata[name]}")

    # The library writes the metadata in a random order: sort the header, so that the same numbers are the same file.
    data = save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    out.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    print(f"{out}: {len(tensors)} tensors, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()

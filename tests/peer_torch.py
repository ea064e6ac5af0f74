"""The model in PyTorch: does the same work give the same numbers, and what does it cost with the usual tools?

What it is: a twin of dit.cu, autograd for its backward, and four jobs, three of which `make bench-peer` does in turn:
    check build/mvsplit [--precision bf16]     are outputs and gradients those of fp64?
    bench [merge attention step400 step1000 block]       name<TAB>milliseconds, a line each; in peer_bench.py, as is
    compare ours.tsv theirs.tsv                both side by side
    fsdp --weights W --data D --out OUT        goes on from weights, on several GPUs; in peer_fsdp.py
What it is not: the tests' oracle (oracle.py: slower, nearer to the definitions).

X, F (B, T, D): T = N image tokens, then text tokens. Weights have the checkpoint's names with the blocks' stacked:
"blocks.*.ffn.w2.weight" is (depth, D, FFN).
"""
import argparse, collections, json, math, pathlib, re, subprocess, sys, tempfile, types
try:
    import torch
    from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu
except ImportError:
    sys.exit("tests/peer_torch.py needs PyTorch 2.6 or newer and NumPy: pip install torch numpy")

BFLOAT, DOUBLE, DEVICE = torch.bfloat16, torch.float64, "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = {"fp64": (DOUBLE, 1e-10), "fp32": (torch.float32, 1e-4), "bf16": (BFLOAT, 2e-2)}  # largest error
GATES = {"postnorm": [], "layerscale": ["layerscale%d"], "rezero": ["rezero%d"],
         "mvsplit": ["fused_mvsplit_norm%d.alpha", "fused_mvsplit_norm%d.beta"]}  # %d: 1 attention, 2 FFN
CONFIG = dict(depth=24, width=128, heads=2, ffn=384, channels=1, height=32, image_width=32, patch=2, text_tokens=8,
              text_dim=64, residual="mvsplit", norm_eps=1e-6)


def config(**changes):
    return types.SimpleNamespace(**{**CONFIG, **changes})


def shapes(c):
    """The shape of each parameter, by its name."""
    L, D, p, dim, gate = c.depth, c.width, c.patch, c.channels * c.patch**2, 1 if c.residual == "rezero" else c.width
    found = {"patch_embed.patch_proj.weight": (D, c.channels, p, p), "patch_embed.patch_proj.bias": (D,),
             "context_proj.weight": (D, c.text_dim), "final_proj.weight": (dim, D), "final_proj.bias": (dim,),
             "blocks.*.ffn.w13.weight": (L, 2 * c.ffn, D), "blocks.*.ffn.w2.weight": (L, D, c.ffn)}
    found |= {f"blocks.*.operator.{name}.weight": (L, D, D) for name in ("q_proj", "k_proj", "v_proj", "proj")}
    found |= {"blocks.*." + name % i: (L, gate) for i in (1, 2) for name in GATES[c.residual]}
    return found


def random_weights(c):
    """All parameters (fp64): none at 0 or 1, where an error could hide, and all exact in bf16."""
    def draw(name, shape):
        x, fan_in = torch.randn(shape, dtype=DOUBLE, device=DEVICE), math.prod(shape[1 + ("*" in name):])
        return (x / fan_in ** 0.5 if name.endswith("weight") else 0.3 + 0.2 * x).to(BFLOAT).double()
    return {name: draw(name, shape) for name, shape in shapes(c).items()}


def wide(x):
    """At least fp32: sums and norms are not taken in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, eps):
    return wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)


def segment_mean(x, N):
    """J x: each token becomes the mean over the tokens of its segment, image or text."""
    image = torch.arange(x.shape[1], device=x.device)[:, None] < N
    return torch.where(image, x[:, :N].mean(1, keepdim=True), x[:, N:].mean(1, keepdim=True))


def merge(X, F, *gates, N, eps=1e-6):
    """RMSNorm(Z), (7). Gates: none, Post-Norm; one, LayerScale or ReZero; alpha and beta, MV-Split."""
    x, f = wide(X), wide(F)
    if len(gates) == 2:
        alpha, beta = gates
        mean = segment_mean(f, N)
        z = x + beta * (f - mean) + alpha * (mean - segment_mean(x, N))
    else:
        z = x + (gates[0] * f if gates else f)
    return rms_norm(z, eps).to(X.dtype)


def rope_table(c, dtype):
    """cos, sin (T, 1, hd/2) of the angles [row w_j, col w_j], w_j = 10000^(-2j/(hd/2)); text tokens do not turn."""
    sizes = (c.height // c.patch, c.image_width // c.patch, c.width // c.heads // 4)
    row, col, j = (torch.arange(size, dtype=dtype, device=DEVICE) for size in sizes)
    angle = torch.cartesian_prod(row, col)[:, None, :, None] * 10000 ** (-j / len(j))
    angle = pad(angle.flatten(2), (0, 0, 0, 0, 0, c.text_tokens))
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Each pair (a_j, b_j) of x = [a, b] turns by minus its angle, as in the released weights."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def make_block(c):
    N = c.height // c.patch * (c.image_width // c.patch)

    def block(X, cos, sin, qkv, proj, w13, w2, *gates):
        B, T, D = X.shape
        q, k, v = linear(X, qkv).view(B, T, 3, c.heads, D // c.heads).unbind(2)
        q = rope(rms_norm(q, 1e-6), cos, sin).to(X.dtype)  # RoPE keeps the norm, so the order is free
        k = rope(rms_norm(k, 1e-6), cos, sin).to(X.dtype)
        y = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        half = len(gates) // 2
        X = merge(X, linear(y.transpose(1, 2).reshape(B, T, D), proj), *gates[:half], N=N, eps=c.norm_eps)
        g, h = linear(X, w13).chunk(2, -1)  # the gate half comes first
        return merge(X, linear(silu(g) * h, w2), *gates[half:], N=N, eps=c.norm_eps)
    return block


def block_names(c):
    """What a block's weights are called, in the order in which `block` takes them."""
    names = [f"operator.{x}.weight" for x in ("q_proj", "k_proj", "v_proj", "proj")]
    return names + ["ffn.w13.weight", "ffn.w2.weight"] + [name % i for i in (1, 2) for name in GATES[c.residual]]


def layers(w, c):
    """Each block's weights as `block` takes them, W_Q, W_K, W_V as one (3D, D) matrix."""
    q, k, v, *others = (w["blocks.*." + name] for name in block_names(c))
    return zip(*(stack.unbind() for stack in [torch.cat([q, k, v], 1), *others]))


def chain(w, c, block):
    """The blocks, each a function of X, cos and sin."""
    return [lambda *inputs, weights=weights: block(*inputs, *weights) for weights in layers(w, c)]


def velocity(z, text, w, c, blocks):
    """(B, C, H, W) from z (B, C, H, W) and text (B, L, d_text)."""
    (B, C, H, W), p = z.shape, c.patch
    patches = z.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
    image = linear(patches, w["patch_embed.patch_proj.weight"].flatten(1), w.get("patch_embed.patch_proj.bias"))
    text = linear(text, w["context_proj.weight"]) if "context_proj.weight" in w else text
    X = torch.cat([rms_norm(image, c.norm_eps), rms_norm(text, c.norm_eps)], 1).to(z.dtype)
    cos, sin = rope_table(c, wide(X).dtype)
    for block in blocks:
        X = block(X, cos, sin)
    y = linear(X[:, :image.shape[1]], w["final_proj.weight"], w["final_proj.bias"])
    return y.reshape(B, H // p, W // p, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


def load(path):
    """The tensors (fp64, blocks stacked) and metadata of a safetensors file: the header's size, the header, numbers."""
    data, found = bytearray(pathlib.Path(path).read_bytes()), collections.defaultdict(list)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata, dtypes = header.pop("__metadata__", {}), {"F64": DOUBLE, "F32": torch.float32, "BF16": BFLOAT}
    for name in sorted(header, key=lambda name: int((re.findall(r"\d+", name) or [0])[0])):  # in the blocks' order
        t, (begin, stop) = header[name], header[name]["data_offsets"]
        x = torch.frombuffer(data[end + begin:end + stop], dtype=dtypes[t["dtype"]]).reshape(t["shape"])
        found[re.sub(r"blocks\.\d+", "blocks.*", name)].append(x.double())
    return {name: torch.stack(x) if "*" in name else x[0] for name, x in found.items()}, metadata


def save(path, tensors, metadata):
    header, numbers = {"__metadata__": {key: str(value) for key, value in metadata.items()}}, b""
    for name, stack in tensors.items():
        for i, x in enumerate(stack.cpu().numpy() if "*" in name else [stack.cpu().numpy()]):
            place = [len(numbers), len(numbers) + x.nbytes]
            dtype = f"{x.dtype.kind}{8 * x.itemsize}".upper()  # F64, I64
            header[name.replace("*", str(i))] = {"dtype": dtype, "shape": x.shape, "data_offsets": place}
            numbers += x.tobytes()
    text = json.dumps(header).encode()
    pathlib.Path(path).write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def evaluate(tensors, c, dtype):
    """velocity and each grad.NAME of <cotangent, velocity>, computed in dtype."""
    x = {name: t.to(DEVICE, dtype, copy=True).requires_grad_() for name, t in tensors.items()}
    cotangent = x.pop("cotangent")
    v = velocity(x["z"], x["text"], x, c, chain(x, c, make_block(c)))
    results = [v, *torch.autograd.grad(v, list(x.values()), cotangent)]
    return dict(zip(["velocity", *("grad." + name for name in x)], (r.detach().double().cpu() for r in results)))


def check(program, o):
    """Relative norm of each result's difference from fp64. None may be beyond the limit, unless PyTorch in the same
    precision is too: in bf16 the trunk is rounded at every merge; then 1.5 times PyTorch's is the limit."""
    (dtype, limit), failures = PRECISIONS[o.precision], 0
    with tempfile.TemporaryDirectory() as folder:
        for residual in o.residual[:1] if o.weights else o.residual:
            weights, inputs, out = o.weights or f"{folder}/weights", f"{folder}/inputs", f"{folder}/out"
            torch.manual_seed(1)
            if not o.weights:
                save(weights, random_weights(c := config(residual=residual)), vars(c))
            w, metadata = load(weights)
            c = config(**{key: type(value)(metadata[key]) for key, value in CONFIG.items()})
            z, cotangent = torch.randn(2, 2, c.channels, c.height, c.image_width).to(BFLOAT).double()
            text = torch.randn(2, c.text_tokens, c.text_dim).to(BFLOAT).double()
            arrays = {"z": z, "text": text, "cotangent": cotangent}
            save(inputs, arrays, {})
            subprocess.run([program, "forward", "--precision", o.precision, "--weights", weights, "--inputs", inputs,
                            "--out", out], check=True, stdout=subprocess.DEVNULL)
            ours, exact, peer = load(out)[0], *(evaluate(w | arrays, c, d) for d in (DOUBLE, dtype))
            print(f"{f'{c.residual}, {c.depth} layers, {o.precision}, error':48}{'ours':>10}{'PyTorch':>10}")
            for name, x in exact.items():
                error, other = (float((result[name] - x).norm() / x.norm()) for result in (ours, peer))
                bad = not error <= min(max(limit, 1.5 * other), 0.5)
                failures += bad
                print(f"    {name:44}{error:10.1e}{other:10.1e}{'  too far' * bad}", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["fsdp"]:
        import peer_fsdp
        sys.exit(peer_fsdp.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(description="The jobs are described at the top of this file.")
    parser.add_argument("job", choices=["check", "bench", "compare"])
    parser.add_argument("names", nargs="*", help="the program to check, the parts to time, two files to compare")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of check")
    parser.add_argument("--residual", choices=GATES, nargs="+", default=list(GATES), help="of check; default: all")
    parser.add_argument("--weights", help="of check, as train writes them; default: random ones")
    parser.add_argument("--tiny", action="store_true", help="bench: small sizes, to try the script without a GPU")
    options = parser.parse_intermixed_args()
    if options.job == "check":
        sys.exit(check(*options.names, options))
    import peer_bench  # which imports this file
    peer_bench.bench(options.names, options.tiny) if options.job == "bench" else peer_bench.compare(*options.names)

"""What PyTorch takes for the work that `make bench` times: the benchmarks of peer_torch.py, one line each on stdout.

It has what helps PyTorch: torch.compile, its fused attention and optimiser, and a CUDA graph around everything timed,
so that no time is Python's. Data is random. Where two ways are open, the faster one counts.
"""
import gc, math, statistics, sys, time, traceback
import torch
import torch._functorch.config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from peer_torch import (BFLOAT, DEVICE, chain, config, layers, make_block, merge, random_weights, rope_table, velocity,
                        wide)

GPU = DEVICE == "cuda"


def graph_ms(body, replays=20):
    """Median milliseconds of body(), captured as a CUDA graph; of one plain call where there is no GPU."""
    for _ in range(3):  # compile, autotune, make the optimiser's state
        body()
    if not GPU:
        start = time.perf_counter()
        body()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    graph, marks = torch.cuda.CUDAGraph(), [torch.cuda.Event(enable_timing=True) for _ in range(replays + 4)]
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        body()
    for mark in marks:  # queued ahead of the GPU, which never waits for Python
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks[3:], marks[4:]))


def normal(*shape):
    return torch.randn(shape, device=DEVICE, dtype=BFLOAT)


def bench_merge(tiny):
    """MV-Split and RMSNorm. Eight sets of arrays in turn, so that the cache does not hold the next one's."""
    B, N, T, D = (2, 8, 12, 32) if tiny else (32, 256, 320, 1024)
    run = torch.compile(lambda X, F, alpha, beta: merge(X, F, alpha, beta, N=N), dynamic=False)
    gates = [normal(D).requires_grad_() for _ in range(2)]
    sets = [(normal(B, T, D).requires_grad_(), normal(B, T, D).requires_grad_(), normal(B, T, D)) for _ in range(8)]

    def forward():
        return [run(X, F, *gates) for X, F, G in sets]

    def backward():
        return [torch.autograd.grad(Y, (X, F, *gates), G, retain_graph=True) for Y, (X, F, G) in zip(outputs, sets)]
    with torch._functorch.config.patch(donated_buffer=False):  # else a compiled backward runs only once
        yield "merge forward", graph_ms(forward) / len(sets)
        outputs = forward()
        yield "merge backward", graph_ms(backward) / len(sets)


def bench_attention(tiny):
    """The best attention that a user can call, cuDNN's or PyTorch's own, on Q, K and V inside one array; eight in turn.
    (Ours does more: its backward goes on through QK-norm and RoPE, its forward keeps what rounding takes from Y.)"""
    B, T, H, hd = (2, 12, 2, 64) if tiny else (32, 320, 8, 128)
    kinds = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION] if GPU else [SDPBackend.MATH]
    sets = [normal(B, T, 3, H, hd).requires_grad_() for _ in range(8)]
    G = normal(B, H, T, hd)

    def attention(qkv):
        return torch.nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    best = []
    for kind in kinds:
        with sdpa_kernel(kind):
            try:
                times = {"attention forward": graph_ms(lambda: [attention(qkv) for qkv in sets]) / len(sets)}
                outputs = [attention(qkv) for qkv in sets]
                times["attention backward"] = graph_ms(lambda: [torch.autograd.grad(
                    Y, qkv, G, retain_graph=True) for Y, qkv in zip(outputs, sets)]) / len(sets)
            except RuntimeError:
                traceback.print_exc()
                continue
        for name, ms in times.items():
            print(f"{name}, {kind.name}: {ms:.4f} ms", file=sys.stderr)
        best.append(times)
    yield from min(best, key=lambda times: sum(times.values())).items()


def bench_block(tiny):
    """Forward, recompute and backward: a chain of different blocks, a checkpoint each, everything's gradient."""
    c = config(depth=8, width=1024, heads=8, ffn=3072, text_tokens=64)
    if tiny:
        c = config(depth=2, width=32, ffn=48, height=8, image_width=8)
    blocks = [[x.to(DEVICE, BFLOAT).requires_grad_() for x in weights] for weights in layers(random_weights(c), c)]
    rope, block = rope_table(c, torch.float32), make_block(c)

    def checkpointed(function):
        return lambda *arrays: checkpoint(function, *arrays, use_reentrant=False, preserve_rng_state=False)
    ways = {"compiled inside the checkpoint": checkpointed(torch.compile(block, dynamic=False)),
            "checkpoint inside what is compiled": torch.compile(checkpointed(block), dynamic=False)}

    def measure(way, B):
        X, G = (normal(B, len(rope[0]), c.width).requires_grad_() for _ in range(2))

        def body():
            Y = X
            for weights in blocks:
                Y = ways[way](Y, *rope, *weights)
            return torch.autograd.grad(Y, [X, *(x for weights in blocks for x in weights)], G)
        try:
            ms = graph_ms(body) / c.depth
        except Exception:
            traceback.print_exc()
            ms = math.inf
        print(f"block {B}, {way}: {ms:.4f} ms", file=sys.stderr)
        return ms
    best = {}
    for way in ways:
        for B in 32, 16, 64:
            ms = measure(way, B)
            if ms >= best.get(B, math.inf):
                break  # slower at one size, or failed: the other sizes are not worth their compilation
            best[B] = ms
            yield f"block {B}", ms


def bench_step(depth, residual, tiny):
    """One training step: draw, forward, backward, clip, AdamW on fp32 weights, of which the network has bf16 copies."""
    c = config(depth=4 if tiny else depth, residual=residual)
    B = 1 if tiny else 32
    master = {name: x.to(DEVICE, torch.float32).requires_grad_() for name, x in random_weights(c).items()}
    weights = {name: x.detach().to(BFLOAT).requires_grad_() for name, x in master.items()}
    matrices = [x for name, x in master.items() if name.endswith("weight")]
    vectors = [x for name, x in master.items() if not name.endswith("weight")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-4, fused=True, capturable=GPU)
    block = torch.compile(make_block(c), dynamic=False)
    images = torch.rand(60000, c.channels, c.height, c.image_width, device=DEVICE) * 2 - 1
    captions = normal(10, c.text_tokens, c.text_dim)

    def step():
        pick = torch.randint(len(images), (B,), device=DEVICE)
        x0, t = images[pick], torch.rand(B, 1, 1, 1, device=DEVICE)
        x1 = torch.randn_like(x0)
        v = velocity(((1 - t) * x0 + t * x1).to(BFLOAT), captions[pick % 10], weights, c, chain(weights, c, block))
        loss = (wide(v) - (x0 - x1)).square().mean()
        for x, gradient in zip(master.values(), torch.autograd.grad(loss, list(weights.values()))):
            x.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(list(master.values()), 1.0)
        adamw.step()
        with torch.no_grad():
            for copy, x in zip(weights.values(), master.values()):
                copy.copy_(x)
    yield f"step {depth} {residual}", graph_ms(step)


PARTS = {"merge": [bench_merge],
         "attention": [bench_attention],
         "step400": [lambda tiny: bench_step(400, "mvsplit", tiny), lambda tiny: bench_step(400, "postnorm", tiny)],
         "step1000": [lambda tiny: bench_step(1000, "mvsplit", tiny)],
         "block": [bench_block]}
NAMES = ["merge forward", "merge backward", "attention forward", "attention backward", "block 16", "block 32",
         "block 64", "step 400 mvsplit", "step 1000 mvsplit", "step 400 postnorm"]


def bench(parts, tiny):
    """Print name<TAB>milliseconds for each part, and again if another way is faster: the last line of a name counts.
    What fails says why on stderr, and the rest goes on."""
    if not GPU and not tiny:
        sys.exit("PyTorch sees no NVIDIA GPU, and the benchmarks need one")
    for run in [run for part in parts or PARTS for run in PARTS[part]]:
        try:
            start = time.perf_counter()
            with torch.cuda.stream(torch.cuda.Stream() if GPU else None):  # a backward runs in its forward's stream
                for name, ms in run(tiny):
                    print(f"{name}\t{ms:.4f}", flush=True)
            print(f"took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        except Exception:
            traceback.print_exc()
        torch._dynamo.reset()
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


def compare(ours, theirs):
    """The table of two files of name<TAB>milliseconds; nan: not measured."""
    ours, theirs = (dict(line.rstrip("\n").split("\t") for line in open(path)) for path in (ours, theirs))
    print(f"{'milliseconds':24}{'ours':>10}{'PyTorch':>10}{'PyTorch / ours':>16}")
    for name in NAMES:
        a, b = (float(times.get(name, "nan")) for times in (ours, theirs))
        print(f"{name:24}{a:10.4f}{b:10.4f}{b / a:16.2f}")

"""Training goes on from this project's weights where one GPU is too small: peer_torch.py's network under FSDP2.

    torchrun --nproc-per-node 4 tests/peer_torch.py fsdp --weights W.safetensors --data D --out OUT.safetensors

What it is: `mvsplit train --weights W`, step by step: the same batches from the same random numbers, loss, clipping,
AdamW and warm-up. Each of N processes keeps 1/N of every weight, gradient and moment, in fp32. A block is one unit: its
weights are gathered before use (in bf16 on a GPU), freed after it, and its forward is done again in the backward.
What it is not: resumed. OUT has the names, shapes and types of W, and no optimiser, which begins anew each time.
"""
import argparse, atexit, fcntl, gzip, json, math, os, pathlib, resource, signal, sys, time, types, zlib
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from convert import count, fraction, mapped, number, positive
from peer_torch import BFLOAT, CONFIG, DEVICE, GATES, block_names, config, make_block, shapes, velocity, wide

GPU, LOW = DEVICE == "cuda", 2**32 - 1
ENDS = ["patch_embed.patch_proj.weight", "final_proj.weight", "final_proj.bias"]
MAYBE = ["patch_embed.patch_proj.bias", "context_proj.weight"]
IMAGE, TIME, NOISE, DROPOUT = range(4)  # streams of random numbers
LATENTS = {"latents": "(N,C,H,W)", "text": "(M,L,d_text)", "caption": "(N)", "empty": "(L,d_text)"}

at_least_0 = number(float, lambda x: 0 <= x < math.inf, "a number, at least 0")
probability = number(float, lambda x: 0 <= x <= 1, "a probability, from 0 to 1")
whole = number(int, lambda x: 0 <= x < 2**64, "an integer, at least 0")


def random_bits(seed, stream, index):
    """math.h, section 6: 4 x 32 random bits for each index (int64, whose products wrap around as unsigned ones do)."""
    a, b, c, d = index & LOW, index >> 32, torch.full_like(index, stream & LOW), torch.full_like(index, stream >> 32)
    key0, key1 = seed & LOW, seed >> 32
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32 & LOW) ^ b ^ key0, q & LOW, (p >> 32 & LOW) ^ d ^ key1, p & LOW
        key0, key1 = key0 + 0x9E3779B9 & LOW, key1 + 0xBB67AE85 & LOW
    return a, b, c, d


def unit_interval(high, low):
    return (high << 21 | low >> 11).double() * 2.0**-53


def uniform(seed, stream, index):
    return unit_interval(*random_bits(seed, stream, index)[:2])


def gaussian(seed, stream, index):
    a, b, c, d = random_bits(seed, stream, index)
    return torch.sqrt(-2 * torch.log(1 - unit_interval(a, b))) * torch.cos(2 * math.pi * unit_interval(c, d))


def encode(caption, tokens=8, dim=64):
    """data/dataset.h, section 1: a caption as (tokens, dim), a fixed vector a word, then padding."""
    def vector(word):
        key = 0xCBF29CE484222325
        for byte in word.encode():
            key = (key ^ byte) * 0x100000001B3 % 2**64
        return gaussian(key, 0, torch.arange(dim)).float()
    words = caption.split()
    return torch.stack([vector(word) for word in words + ["<pad>"] * (tokens - len(words))])


def fashion_mnist():
    """Captions (N) of training images, pixels(i) (b, C, H, W), text (M + 1, L, d_text), of which the last is empty."""
    folders = pathlib.Path(__file__).parent.parent / "data/downloads", pathlib.Path("/usr/share/datasets/fashion-mnist")

    def read(name, header):
        path = next((folder / name for folder in folders if (folder / name).exists()), None)
        if not path:
            sys.exit("Fashion-MNIST is not here: run `bash data/fetch.sh`, which fetches it")
        try:
            return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)[header:]
        except (OSError, EOFError, zlib.error) as error:
            sys.exit(f"cannot read {path}: {error}")
    images = torch.nn.functional.pad(read("train-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28), (2, 2, 2, 2))
    names = [*"t-shirt trouser pullover dress coat sandal shirt sneaker bag".split(), "ankle boot"]
    prompts = [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return types.SimpleNamespace(caption=read("train-labels-idx1-ubyte.gz", 8).long(), words="words",
                                 pixels=lambda i: images[i].float() / 127.5 - 1, shape=images.shape[1:],
                                 text=torch.stack([encode(prompt) for prompt in [*prompts, ""]]))


def opened(path):
    """The tensors of a file, or one line that says why not."""
    if not path.endswith(".safetensors"):
        sys.exit(f"{path} is no .safetensors: sharded weights and .pt files are not read here (tests/convert.py makes "
                 "a .pt of shards, and a .safetensors of a .pt)")
    try:
        return mapped(path)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read {path}: {error}")


def latents(path):
    """The same of a file of latents, but for the images that are held out."""
    x = opened(path)
    for name in x.keys() - LATENTS.keys():
        sys.exit(f"{path}: {name} is not known, expected {', '.join(LATENTS)}")
    for name, letters in LATENTS.items():
        if name == "empty":
            x.setdefault(name, torch.zeros(x["text"].shape[1:]))
        if name not in x:
            sys.exit(f"{path}: tensor {name} is missing")
        t, kind = x[name], "integers" if name == "caption" else "floating numbers"
        if (t.dim() != letters.count(",") + 1 or not t.numel() or t.dtype == torch.bool
                or t.is_floating_point() == (kind == "integers")):
            sys.exit(f"{path}: {name} is {t.dtype} of shape {tuple(t.shape)}, expected {kind} {letters}, no size 0")
        if not all(torch.isfinite(part.float()).all() for part in t.split(1024)):
            sys.exit(f"{path}: {name} holds numbers that are not finite")
    empty, caption_shape = x["empty"], x["text"].shape[1:]
    if empty.shape != caption_shape:
        sys.exit(f"{path}: empty has shape {tuple(empty.shape)}, expected {tuple(caption_shape)}, as rows of text have")
    images, caption, stride = x["latents"], x["caption"].long(), min(16, len(x["latents"]))
    if len(caption) != len(images) or caption.min() < 0 or caption.max() >= len(x["text"]):
        sys.exit(f"{path}: caption holds something else than {len(images)} numbers from 0 to {len(x['text']) - 1}")
    kept = torch.tensor([i for i in range(len(images)) if i % stride != stride - 1] or [0])
    return types.SimpleNamespace(caption=caption[kept], words="file", shape=images.shape[1:],
                                 pixels=lambda i: images[kept[i]].float(),
                                 text=torch.cat([x["text"].float(), empty.float()[None]]))


def draw_batch(data, samples, o):
    """z, target (b, C, H, W) and text (b, L, d_text) of samples with these numbers (b): train.cu, section 1."""
    image = (uniform(o.seed, IMAGE, samples) * len(data.caption)).long()
    caption = data.caption[image]
    caption[uniform(o.seed, DROPOUT, samples) < o.dropout] = len(data.text) - 1
    t = uniform(o.seed, TIME, samples).view(-1, 1, 1, 1)
    t = (o.time_shift * t / (1 + (o.time_shift - 1) * t)).to(DEVICE)
    x0, size = data.pixels(image).to(DEVICE).double(), math.prod(data.shape)
    number = samples.to(DEVICE)[:, None] * size + torch.arange(size, device=DEVICE)
    x1 = gaussian(o.seed, NOISE, number).view_as(x0)
    return ((1 - t) * x0 + t * x1).float(), (x0 - x1).float(), data.text[caption].to(DEVICE)


class Unit(torch.nn.Module):
    """Parameters by their names in the file, not in memory yet: what is gathered together."""

    def __init__(self, names, tensors):
        super().__init__()
        self.names = names
        self.weights = torch.nn.ParameterList(torch.empty(tensors[name].shape, device="meta") for name in names)


class Block(Unit):
    """X (B, T, D) to the next block's; nothing but X is kept for the backward."""

    def __init__(self, names, tensors, compute):
        super().__init__(names, tensors)
        self.compute = compute

    def forward(self, X, cos, sin):
        return checkpoint(self.run, X, cos, sin, use_reentrant=False, preserve_rng_state=False)

    def run(self, X, cos, sin):
        q, k, v, *others = self.weights
        return self.compute(X, cos, sin, torch.cat([q, k, v]), *others)


class Network(Unit):
    """The velocity (B, C, H, W) from z (B, C, H, W) and text (B, L, d_text)."""

    def __init__(self, tensors, c):
        super().__init__(ENDS + [name for name in MAYBE if name in tensors], tensors)
        self.c, self.tokens = c, c.height * c.image_width // c.patch**2 + c.text_tokens
        compute = torch.compile(make_block(c), dynamic=False) if GPU else make_block(c)
        self.blocks = torch.nn.ModuleList(
            Block([f"blocks.{i}.{name}" for name in block_names(c)], tensors, compute) for i in range(c.depth))

    def forward(self, z, text):
        return velocity(z, text, dict(zip(self.names, self.weights)), self.c, self.blocks)

    def named(self):
        """Each parameter with its name in the file."""
        return [pair for unit in [self, *self.blocks] for pair in zip(unit.names, unit.weights)]


def sharded(network, tensors, dtype):
    """The network over all processes, each with its rows of each tensor."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(DEVICE, (dist.get_world_size(),))
    for unit in [*network.blocks, network]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    network.to_empty(device=DEVICE)
    for name, parameter in network.named():
        mine = parameter.to_local().detach()
        parts = tensors[name].chunk(dist.get_world_size())
        if mine.numel():
            mine.copy_(parts[dist.get_rank()])
    return network


def save(network, path, weights, tensors, metadata):
    """Write the tensors in the layout of the file `weights`, and into its metadata what these say."""
    parameters, file = dict(network.named()), None
    if dist.get_rank() == 0:
        with open(weights, "rb") as source:
            header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = open(f"{path}.tmp", "wb")
        file.write(len(text).to_bytes(8, "little") + text)
    for name, x in tensors.items():
        if name in parameters:
            x = parameters[name].detach().full_tensor().to(x.dtype)
        if file:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(x.flatten().view(torch.uint8).cpu().numpy())
    if file:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(f"{path}.tmp", path)  # whole, or as it was
        print(f"weights {path}", flush=True)


def read_config(path, tensors, data):
    """The configuration that a file's metadata say, and these. Fails if twin, tensors or data have another."""
    with open(path, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})
    metadata["text_tokens"] = str(data.text.shape[1])  # a caption's own
    metadata.setdefault("time_shift", "1")
    values = {key: count if isinstance(value, int) else str for key, value in CONFIG.items()}
    values |= {"norm_eps": fraction, "time_shift": positive}
    for key, kind in values.items():
        if key not in metadata:
            sys.exit(f"{path} does not say its {key}: `mvsplit train` and tests/convert.py write it into the metadata")
        try:
            values[key] = kind(metadata[key])
        except argparse.ArgumentTypeError as error:
            sys.exit(f"{path}: metadata {key} {error}")
    c = config(**values)
    if c.residual not in GATES or metadata.get("means", "segment") != "segment":
        sys.exit(f"{path} is of --residual {c.residual} --means {metadata.get('means')}: here are {', '.join(GATES)}, "
                 "with means by segment")
    have = (*data.shape, data.text.shape[2])
    if have != (c.channels, c.height, c.image_width, c.text_dim):
        sys.exit(f"{path} is for {c.channels} x {c.height} x {c.image_width} and text of {c.text_dim} numbers, the "
                 f"data have {' x '.join(map(str, have[:3]))} and {have[3]}")
    if c.width % (4 * c.heads) or c.height % c.patch or c.image_width % c.patch:
        sys.exit(f"{path}: its metadata say width {c.width}, {c.heads} heads, patch {c.patch}: expected a head to "
                 f"have a multiple of 4 numbers, and a patch that divides {c.height} x {c.image_width}")
    for name, shape in shapes(c).items():
        for i in range(c.depth if "*" in name else 1):
            name_here, want = name.replace("*", str(i)), shape["*" in name:]
            have = tuple(tensors[name_here].shape) if name_here in tensors else None
            if have != want and (have or name not in (MAYBE if c.text_dim == c.width else MAYBE[:1])):
                sys.exit(f"{path}: {name_here} {f'has shape {have}' if have else 'is missing'}, expected {want} by the "
                         "metadata: these are not the weights of this network")
    return c, metadata


def train(network, tensors, data, o, metadata, dtype):
    """o.steps steps, a line each: train.cu, sections 2 and 3."""
    rank, processes, parameters = dist.get_rank(), dist.get_world_size(), [p for _, p in network.named()]
    # AdamW moves each process's rows, as plain tensors: with thousands of DTensors its first step takes minutes.
    mine = [torch.nn.Parameter(p.detach().to_local()) for p in parameters]
    groups = [{"params": [x for x in mine if x.ndim > 1], "weight_decay": o.weight_decay},  # matrices only
              {"params": [x for x in mine if x.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=o.lr, fused=GPU)
    share = o.batch // processes
    for step in range(1, o.steps + 1):
        start, loss = time.perf_counter(), torch.zeros((), device=DEVICE)
        for number in range((step - 1) * o.accumulate, step * o.accumulate):
            first = number * o.batch + rank * share
            z, target, text = draw_batch(data, torch.arange(first, first + share), o)
            part = (wide(network(z.to(dtype), text.to(dtype))) - target).square().mean() / o.accumulate
            part.backward()  # FSDP's gradient is the mean over processes
            loss += part.detach() / processes
        for x, p in zip(mine, parameters):
            x.data, x.grad, p.grad = p.detach().to_local(), p.grad.to_local(), None
        squares = torch.nn.utils.get_total_norm([x.grad for x in mine if x.numel()]).square()
        dist.all_reduce(loss), dist.all_reduce(squares)
        norm = squares.sqrt()
        torch.nn.utils.clip_grads_with_norm_(mine, o.clip or math.inf, norm)
        lr = o.lr * min(1, step / max(o.warmup, 1))
        for group in groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        loss, norm = loss.item(), norm.item()
        if not math.isfinite(loss + norm):
            sys.exit(f"step {step}: loss {loss}, norm {norm}: training has diverged, and stops")
        seconds = time.perf_counter() - start
        rate = o.batch * o.accumulate * network.tokens / seconds
        taken = torch.cuda.max_memory_allocated() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if rank == 0:
            print(f"step {step:6}/{o.steps}  loss {loss:.7g}  norm {norm:.7g}  lr {lr:.2e}  {1e3 * seconds:.1f} ms/step"
                  f"  {rate:.2e} tokens/s  {taken / 1e9:.2f} GB a {'GPU' if GPU else 'process'}", flush=True)
        if step == o.steps or o.save_every and step % o.save_every == 0:
            save(network, o.out, o.weights, tensors, {**metadata, "step": str(step)})


def main(arguments):
    if "LOCAL_RANK" not in os.environ:
        sys.exit("fsdp is started as `torchrun --nproc-per-node N tests/peer_torch.py fsdp ...`, N: GPUs, or processes")
    parser = argparse.ArgumentParser(prog="peer_torch.py fsdp", description="The flags are those of `mvsplit train`.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", required=True, help="a .safetensors, of train or of tests/convert.py")
    parser.add_argument("--data", default="fashion-mnist", help="fashion-mnist, or a .safetensors of latents")
    parser.add_argument("--out", required=True, help="the .safetensors to be written")
    parser.add_argument("--steps", type=count, default=1000)
    parser.add_argument("--batch", type=count, default=32, help="images of a forward pass, of all processes")
    parser.add_argument("--accumulate", type=count, default=1, help="passes of a step")
    parser.add_argument("--lr", type=positive, default=1e-3, help="learning rate after warm-up")
    parser.add_argument("--warmup", type=whole, default=100, help="steps of warm-up")
    parser.add_argument("--weight-decay", type=at_least_0, default=0.1, help="of matrices")
    parser.add_argument("--clip", type=at_least_0, default=1.0, help="largest gradient norm; 0: none")
    parser.add_argument("--dropout", type=probability, default=0.1, help="share of captions left out")
    parser.add_argument("--time-shift", type=positive, help="as the weights' metadata say")
    parser.add_argument("--seed", type=whole, default=1)
    parser.add_argument("--save-every", type=whole, default=0, help="steps; 0: at the end")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if GPU else "fp32")
    o = parser.parse_args(arguments)
    rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if o.batch % processes:
        sys.exit(f"--batch {o.batch} is shared by {processes} processes: take a multiple of {processes}")
    if GPU and rank >= torch.cuda.device_count():
        sys.exit(f"there are {torch.cuda.device_count()} GPUs: take no more for --nproc-per-node")
    if o.data != "fashion-mnist" and not o.data.endswith(".safetensors"):
        sys.exit(f"no data at {o.data}: expected fashion-mnist, a .safetensors of latents")
    first, temporary = os.environ["RANK"] == "0", [pathlib.Path(o.out + end) for end in (".tmp", ".lock")]
    try:
        if os.path.exists(o.out) and not os.path.isfile(o.out):
            raise FileExistsError("it is no file")
        if first:
            owner = open(temporary[1], "ab")
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # for as long as it is open
            atexit.register(lambda: [name.unlink(missing_ok=True) for name in temporary])
    except BlockingIOError:
        sys.exit(f"another run writes --out {o.out}: wait for its end, or name another file")
    except OSError as error:
        sys.exit(f"--out {o.out} cannot be written ({error}): name a file in a folder that is there")
    tensors = opened(o.weights)
    data = fashion_mnist() if o.data == "fashion-mnist" else latents(o.data)
    c, metadata = read_config(o.weights, tensors, data)
    network = Network(tensors, c)
    o.time_shift = c.time_shift if o.time_shift is None else o.time_shift
    metadata |= {"time_shift": str(o.time_shift), "captions": data.words}
    for name in tensors.keys() - {name for name, _ in network.named()}:
        if not (tensors[name] == 1).all():  # as the author's gains of norms
            sys.exit(f"{o.weights}: {name} is not of this network, and not all ones")
    if GPU:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if GPU else "gloo")
    dtype = BFLOAT if o.precision == "bf16" else torch.float32
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun's, when another process has failed
    try:
        train(sharded(network, tensors, dtype), tensors, data, o, metadata, dtype)
    except KeyboardInterrupt:
        sys.exit("interrupted: what came after the last --save-every is lost" if first else 1)
    except OSError as error:  # as a disk that is full
        sys.exit(f"stopped ({error}): what came after the last --save-every is lost")
    dist.destroy_process_group()

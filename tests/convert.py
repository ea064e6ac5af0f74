"""Weights from PyTorch's file to safetensors and back: in memory are one tensor and what the system keeps of the files.

    tests/convert.py model.pt OUT.safetensors     of the author's model: a state_dict, alone or as "model"
    tests/convert.py IN.safetensors OUT.pt        or IN.safetensors.index.json: a state_dict for his code

What it is: names without torch.compile's "_orig_mod.", numbers as they are, and the metadata that no shape says, which
are those of the author's released 1000-layer model unless a flag says otherwise.
What it is not: a check of the weights. `mvsplit` makes it when it reads them.
"""
import argparse, collections, ctypes, json, math, mmap, os, pathlib, pickle, re, signal, sys
try:
    import torch
except ImportError:
    sys.exit("tests/convert.py needs PyTorch 2.1 or newer: pip install torch")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def number(kind, good, words):
    """What argparse takes for a type: from a text the number of this kind that is good, or a line with these words."""
    def read(text):
        try:
            value = kind(text)
        except (TypeError, ValueError):
            value = math.nan
        if not good(value):
            raise argparse.ArgumentTypeError(f"{text} must be {words}")
        return value
    return read


positive = number(float, lambda x: 0 < x < math.inf, "a number, and positive")
fraction = number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")
count = number(int, lambda x: x > 0, "a positive integer")


def state_dict(path):
    """{name: tensor}, mapped from the file. Its pickle may hold tensors and plain containers only."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError) as error:
        held = re.search(r"GLOBAL (\S+)", str(error))
        sys.exit(f"{path} {f'holds {held[1]}' if held else 'is no file of torch.save'}: expected tensors and plain "
                 "containers alone, so save the state_dict without the rest")
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found or not all(
            isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in found.items()):
        sys.exit(f"{path} holds no state_dict, {{name: tensor}}, at its top or under \"model\" or \"state_dict\"")
    tensors = {}
    for name, x in found.items():
        name = name.replace("_orig_mod.", "")
        if name in tensors:
            sys.exit(f"{path} holds {name} twice, with _orig_mod. and without")
        if name == "__metadata__":
            sys.exit(f"{path}: no tensor of a safetensors file can have the name {name}: give it another")
        if x.layout != torch.strided or x.device.type != "cpu":
            sys.exit(f"{path}: {name} is {x.layout} on device {x.device}, expected numbers in rows: save it dense")
        if x.dtype not in DTYPES.values():
            sys.exit(f"{path}: {name} is {x.dtype}, which safetensors readers do not take")
        tensors[name] = x
    return tensors


def metadata(tensors, path, o):
    """What data/checkpoint.h writes. The number of text tokens is a prompt's own: it is left out."""
    def shape(name, rank):
        if name not in tensors or tensors[name].dim() != rank:
            sys.exit(f"{path}: tensor {name} with {rank} dimensions is missing: not the weights of this model")
        return tensors[name].shape
    width, channels, patch, _ = shape("patch_embed.patch_proj.weight", 4)
    depth = sum(re.fullmatch(r"blocks\.\d+\.ffn\.w2\.weight", name) is not None for name in tensors)
    sizes = {"depth": depth, "width": width, "heads": o.heads, "ffn": shape("blocks.0.ffn.w2.weight", 2)[1],
             "channels": channels, "patch": patch, "height": o.size, "image_width": o.size, "means": "segment",
             "text_dim": shape("context_proj.weight", 2)[1] if "context_proj.weight" in tensors else width,
             "norm_eps": o.norm_eps, "time_shift": o.time_shift}
    if all(f"blocks.0.fused_mvsplit_norm{i}.{gate}" in tensors for i in (1, 2) for gate in ("alpha", "beta")):
        sizes["residual"] = "mvsplit"
    return {key: str(value) for key, value in sizes.items()}


def to_safetensors(path, file, o):
    tensors = state_dict(path)
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": metadata(tensors, path, o)}, 0
    # Wide types first: then every tensor lies at a multiple of its own size.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in order:
        x = tensors[name]
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        x = tensors.pop(name).contiguous()
        if x.numel():
            file.write((ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr()))


def mapped(path):
    """{name: tensor} of a safetensors file, each a storage of its own that is read when it is used."""
    tensors = collections.OrderedDict()
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, t in header.items():
            dtype, (begin, end) = DTYPES[t["dtype"]], t["data_offsets"]
            numbers = (end - begin) // dtype.itemsize
            x = torch.frombuffer(data, dtype=dtype, count=numbers, offset=start + begin) if numbers else torch.empty(0)
            tensors[name] = x.to(dtype).reshape(t["shape"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole .safetensors of types that PyTorch has: {error!r}") from None
    return tensors


def placed(path):
    """The tensors that an index places, each in its shard and nowhere else."""
    index, tensors = json.loads(path.read_text()), collections.OrderedDict()
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        sys.exit(f"{path} has no weight_map, {{tensor: file}}, expected one of the .safetensors beside it")
    for shard in sorted(set(places.values())):
        for name, x in mapped(path.with_name(shard)).items():
            if places.get(name) != shard:
                sys.exit(f"{path}: {shard} holds {name}, which the index does not place there")
            tensors[name] = x
    for name in places.keys() - tensors.keys():
        sys.exit(f"{path}: {name} is not in {places[name]}, where the index places it")
    return tensors


def to_pt(path, file, o):
    torch.save(placed(path) if path.suffix == ".json" else mapped(path), file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--heads", type=count, default=8, help="attention heads (default: 8)")
    parser.add_argument("--norm-eps", type=fraction, default=1e-5, help="of the RMSNorms (default: 1e-5)")
    parser.add_argument("--time-shift", type=positive, default=4.0, help="as trained (default: 4)")
    parser.add_argument("--size", type=count, default=16, help="numbers along a latent's side (default: 16)")
    options = parser.parse_args()
    source, out = options.source, options.out
    sources = {".safetensors": (".pt", ".pth", ".ckpt", ".bin"), ".pt": (".safetensors", ".json")}
    if source.suffix not in sources.get(out.suffix, ()):
        sys.exit("tests/convert.py wants a .pt and the name of a .safetensors, or the other way round")
    temporary = out.with_name(out.name + ".tmp")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with open(temporary, "wb") as file:
            (to_safetensors if out.suffix == ".safetensors" else to_pt)(source, file, options)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)  # whole, or as it was
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        sys.exit(f"cannot make {out} of {source}: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {out} is as it was")
    finally:
        if os.path.isfile(temporary):
            temporary.unlink()

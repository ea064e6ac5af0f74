#!/usr/bin/env bash
# convert_check.sh PROGRAM: tests/convert.py on a small model of the author's kind: PROGRAM draws with it, from
# prompt features in a file of text alone, and what comes back to PyTorch is what was there. AUTHOR=FOLDER, a
# clone of the author's repository: his classes and sampler get the same numbers from it. Exit status 77
# where there is no PyTorch; 1 and a line a fault otherwise.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
python=${PYTHON:-python3} faults=0
"$python" -c 'import torch' 2>/dev/null || {
  echo "convert_check: skipped: $python has no PyTorch (PYTHON= names another)"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fault() {
  echo "convert_check: $1"
  faults=$((faults + 1))
}
convert() { "$python" tests/convert.py "$@" >"$work/log" 2>&1; }
refused() {  # refused WORDS ARGUMENT...: fails with these words, and leaves nothing
  convert "${@:2}" && fault "not refused: $1"
  ! grep -q Traceback "$work/log" || fault "a traceback instead of: $1"
  grep -qF -- "$1" "$work/log" || fault "no '$1' but: $(tail -n 1 "$work/log")"
  ! compgen -G "$work/new*" >/dev/null || fault "left something behind: $1"
}

# The author's names; text as wide as the trunk has no projection; norms have gains of one. Two dtypes,
# and a tensor that lies in memory otherwise than in the file.
"$python" - "$work" <<'MODEL' || fault "no model"
import argparse, sys, torch
torch.manual_seed(1)
D, F, C, L = 32, 48, 6, 3
draw = lambda *shape: torch.randn(shape) / shape[-1] ** 0.5
w = {"patch_embed.patch_proj.weight": draw(D, C, 1, 1), "patch_embed.patch_proj.bias": draw(D),
     "final_proj.weight": draw(D, C).T, "final_proj.bias": draw(C), "norm_img_input.weight": torch.ones(D),
     "norm_text_input.weight": torch.ones(D)}
for b in range(L):
    at = f"blocks.{b}."
    w |= {at + f"operator.{x}.weight": draw(D, D).bfloat16() for x in ("q_proj", "k_proj", "v_proj", "proj")}
    w |= {at + "ffn.w13.weight": draw(2 * F, D), at + "ffn.w2.weight": draw(D, F)}
    for i in (1, 2):
        norm = at + f"fused_mvsplit_norm{i}."
        w |= {norm + "alpha": 0.1 * draw(D), norm + "beta": 0.3 + 0.1 * draw(D), norm + "weight": torch.ones(D)}
assert not w["final_proj.weight"].is_contiguous()
folder = sys.argv[1]
torch.save(w, folder + "/plain.pt")
torch.save({"model": {"_orig_mod." + name: x for name, x in w.items()}, "step": 7}, folder + "/model.pt")
torch.save({**w, "_orig_mod.final_proj.bias": w["final_proj.bias"]}, folder + "/twice.pt")
torch.save({"step": 7}, folder + "/none.pt")
torch.save({"a": w["final_proj.bias"]}, folder + "/other.pt")
torch.save({"model": w, "args": argparse.Namespace(a=1)}, folder + "/args.pt")
torch.save({1: w["final_proj.bias"]}, folder + "/one.pt")
torch.save({**w, "__metadata__": w["final_proj.bias"]}, folder + "/named.pt")
torch.save({**w, "final_proj.bias": torch.ones(C, device="meta")}, folder + "/meta.pt")
torch.save({**w, "final_proj.bias": torch.ones(C).to_sparse()}, folder + "/sparse.pt")
text = torch.randn(2, 5, D)
header = '{"text":{"dtype":"F32","shape":[2,5,32],"data_offsets":[0,%d]}}' % (text.numel() * 4)
with open(folder + "/text.safetensors", "wb") as file:
    file.write(len(header).to_bytes(8, "little") + header.encode() + bytes(text.flatten().view(torch.uint8).tolist()))
MODEL

convert "$work/model.pt" "$work/model.safetensors" || fault "to safetensors: $(tail -n 1 "$work/log")"
convert "$work/plain.pt" "$work/plain.safetensors" || fault "to safetensors: $(tail -n 1 "$work/log")"
cmp "$work/model.safetensors" "$work/plain.safetensors" || fault "_orig_mod. makes a difference"
said=$(head -c 2000 "$work/model.safetensors" | tr -d "\0")
for words in '"heads": "8"' '"norm_eps": "1e-05"' '"time_shift": "4.0"' '"height": "16"' '"depth": "3"' \
  '"residual": "mvsplit"'; do
  [[ $said == *"$words"* ]] || fault "the metadata does not say $words"
done
draw() { "$1" sample --device cpu --weights "$work/model.safetensors" --data "$work/text.safetensors" --prompt 1 \
  --columns 1 --steps 35 --cfg 2 --out "$work/$2" >"$work/log" 2>&1; }
draw "$1" drawn.safetensors || fault "sample: $(tail -n 1 "$work/log")"
! grep 'does not say' "$work/log" || fault "the metadata does not say all"
[[ $(head -c 200 "$work/drawn.safetensors" | tr -d "\0") == *'"shape":[1,6,16,16]'* ]] || fault "no latents were drawn"
draw "$1" drawn.png
grep -q 'name a .safetensors' "$work/log" || fault "a picture of six channels is not refused"

# And back: in one file, and in two with an index.
convert "$work/model.safetensors" "$work/back.pt" || fault "to .pt: $(tail -n 1 "$work/log")"
convert "$work/model.safetensors.index.json" "$work/sharded.pt" && fault "a missing index is read"
index() {  # index NAME EDIT: of text and model, with what EDIT, Python, makes of the map {tensor: file}
  "$python" -c 'import json, sys; sys.path.insert(0, "tests"); from convert import mapped
folder, name, edit = sys.argv[1:]
x = {t: shard for shard in ("text.safetensors", "model.safetensors") for t in mapped(f"{folder}/{shard}")}
exec(edit); json.dump({"weight_map": x}, open(f"{folder}/{name}.safetensors.index.json", "w"))' "$work" "$@"
}
index two ''
convert "$work/two.safetensors.index.json" "$work/two.pt" || fault "shards to .pt: $(tail -n 1 "$work/log")"
"$python" - "$work" <<'SAME' || fault "what comes back is not what was there"
import sys, torch
there, back, two = (torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True) for name in ("plain", "back", "two"))
same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
assert there.keys() == back.keys() and two.keys() == {*there, "text"}
assert all(same(x, back[name]) and same(x, two[name]) for name, x in there.items())
SAME

refused 'twice, with _orig_mod. and without' "$work/twice.pt" "$work/new.safetensors"
refused 'holds no state_dict' "$work/none.pt" "$work/new.safetensors"
refused 'not the weights of this model' "$work/other.pt" "$work/new.safetensors"
refused 'cannot make' "$work/absent.pt" "$work/new.safetensors"
refused 'cannot make' "$work/absent.safetensors" "$work/new.pt"
refused 'holds argparse.Namespace: expected tensors' "$work/args.pt" "$work/new.safetensors"
refused 'holds no state_dict' "$work/one.pt" "$work/new.safetensors"
refused 'can have the name __metadata__' "$work/named.pt" "$work/new.safetensors"
refused 'final_proj.bias is torch.strided on device meta' "$work/meta.pt" "$work/new.safetensors"
refused 'final_proj.bias is torch.sparse_coo on device cpu' "$work/sparse.pt" "$work/new.safetensors"
for flag in --heads=-3 --norm-eps=nan --time-shift=x --size=0; do
  refused "argument ${flag%=*}: ${flag#*=} must be" "$work/model.pt" "$work/new.safetensors" "$flag"
done
for edit in 'x = [x]' 'x = {}' 'x["text"] = 1'; do
  index bad "$edit"
  refused 'has no weight_map, {tensor: file}' "$work/bad.safetensors.index.json" "$work/new.pt"
done
echo '[]' >"$work/bad.safetensors.index.json"
refused 'has no weight_map, {tensor: file}' "$work/bad.safetensors.index.json" "$work/new.pt"
index bad 'x["more"] = "text.safetensors"'
refused 'more is not in text.safetensors' "$work/bad.safetensors.index.json" "$work/new.pt"
cp "$work/text.safetensors" "$work/again.safetensors"
index bad 'x["more"] = "again.safetensors"'
refused 'again.safetensors holds text, which the index does not place' "$work/bad.safetensors.index.json" "$work/new.pt"
head -c 100 "$work/model.safetensors" >"$work/cut.safetensors"
refused 'cut.safetensors is no whole .safetensors' "$work/cut.safetensors" "$work/new.pt"
refused 'cannot make' "$work/model.pt" "$work/$(printf %0240d 1).safetensors"
refused 'or the other way round' "$work/model.pt" "$work/new.pt"

# The author's own classes, with what they fall back on where Triton is missing: the same velocities, after the way
# back too, and from the same noise the same latents.
if [ -z "${AUTHOR:-}" ]; then
  echo "convert_check: skipped: the author's classes (AUTHOR= names his repository; PYTHON= with einops)"
else
  "$python" - "$work" "$1" "$AUTHOR" >"$work/log" <<'CLASSES' || fault "the author's classes: see above"
import subprocess, sys, types, unittest.mock
folder, program, author = sys.argv[1:]
sys.modules |= {name: unittest.mock.MagicMock() for name in ("PIL", "tqdm", "text_encoder", "vae")}
sys.modules["kernels"] = None  # cannot be imported
sys.path[:0] = ["tests", author]
import torch, dit, peer_torch, sample
torch.manual_seed(1)
run = lambda *arguments: subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
def model(patch, text_dim):
    m = dit.DiT(in_channels=6, patch_size=patch, hidden_size=64, depth=3, num_heads=8, num_kv_heads=8,
                mlp_hidden_dim=192, qkv_bias=False, context_dim=text_dim).requires_grad_(False)
    [torch.nn.init.uniform_(x) for name, x in m.named_parameters() if name.endswith(("alpha", "beta"))]
    return m
def mvsplit(job, weights, result, *arguments):
    out = f"{folder}/{result}.safetensors"
    run(program, job, "--device", "cpu", "--precision", "fp32", "--weights", weights, "--out", out, *arguments)
    return peer_torch.load(out)[0][result]
def check(what, ours, his):
    error = float((ours - his).norm() / his.norm())
    print(f"convert_check: {what}: ours {error:.1e} from the author's", file=sys.stderr)
    assert error <= 1e-6
for patch, text_dim in ((1, 64), (2, 40)):  # text as wide as the trunk, as released, and not
    (m, again), name = (model(patch, text_dim) for _ in range(2)), f"{folder}/author{patch}"
    torch.save({"model": {"_orig_mod." + key: x for key, x in m.state_dict().items()}}, name + ".pt")
    run(sys.executable, "tests/convert.py", name + ".pt", name + ".safetensors", "--size", "8")
    z, text = torch.randn(2, 6, 8, 12), torch.randn(2, 5, text_dim)
    peer_torch.save(name + ".in", {"z": z.double(), "text": text.double()}, {})
    check(f"patch {patch}, velocity", mvsplit("forward", name + ".safetensors", "velocity", "--inputs", name + ".in"),
          m(z, text).double())
    run(sys.executable, "tests/convert.py", name + ".safetensors", name + ".back.pt")
    again.load_state_dict(torch.load(name + ".back.pt", weights_only=True), strict=True)
    assert torch.equal(again(z, text), m(z, text))
    peer_torch.save(name + ".text.safetensors", {"text": text[:1].double(), "empty": text[1].double()}, {})
    w, metadata = peer_torch.load(name + ".safetensors")
    silent = {key: 0 * x if key.startswith("final_proj") else x for key, x in w.items()}  # their samples are the noise
    peer_torch.save(name + ".silent.safetensors", silent, metadata)
    draw = ("--data", name + ".text.safetensors", "--prompt", "0", "--columns", "2", "--steps", "35", "--cfg", "2")
    noise, ours = (mvsplit("sample", name + x + ".safetensors", "samples", *draw) for x in (".silent", ""))
    encoder = types.SimpleNamespace(encode=lambda prompts: (text.repeat_interleave(2, 0), None))
    check(f"patch {patch}, 35 steps", ours, sample.perform_multi_step_sampling(
        m, noise, [""] * 2, 2.0, torch.float32, "cpu", encoder, num_inference_steps=35, alpha=4.0).double())
CLASSES
fi
echo "convert_check: $faults faults"
[ $faults = 0 ]

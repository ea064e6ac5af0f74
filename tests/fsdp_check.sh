#!/usr/bin/env bash
# fsdp_check.sh PROGRAM: `tests/peer_torch.py fsdp` does what PROGRAM's `train --weights` does, with one
# process and with two: losses, norms, and the weights that are left. On the CPU, in fp32. Exit status 77
# where there is no PyTorch, or one older than 2.6; 1 and a line a fault otherwise.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
program=$1 python=${PYTHON:-python3} faults=0
"$python" -c 'import numpy; from torch.distributed.fsdp import fully_shard' 2>/dev/null || {
  echo "fsdp_check: skipped: $python has no PyTorch from 2.6 on, or no NumPy (PYTHON= names another)"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fault() {
  echo "fsdp_check: $1"
  faults=$((faults + 1))
}
last() { grep -v '^ *$' "$work/log" | tail -n 1; }

ours() {  # ours NAME FLAG...: a run
  "$program" train --device cpu --precision fp32 --batch 4 --steps 3 --columns 1 --val-images 2 --save weights \
    --out "$work/$1" "${@:2}" >"$work/log" 2>&1 || fault "train: $(last)"
}
theirs() {  # theirs PROCESSES NAME FLAG...: NAME.safetensors, and what is printed in NAME.txt
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$1" tests/peer_torch.py fsdp --batch 4 --steps 3 \
    --out "$work/$2.safetensors" "${@:3}" >"$work/$2.txt" 2>"$work/log" || fault "fsdp: $(last)"
}
agree() {  # agree OURS THEIRS: in losses and norms of all steps, to 1e-5
  awk '/^step / { print $4, $6 }' "$work/$2.txt" |
    paste -d ' ' <(tail -n +2 "$work/$1/log.csv" | tr , ' ') - >"$work/both"
  awk 'function off(a, b) { return !(a - b < 1e-5 * a && b - a < 1e-5 * a) }
    NF != 6 || off($2, $5) || off($3, $6) { bad = 1 }
    END { exit bad || NR != 3 }' "$work/both"
}
same() {  # same PROCESSES NAME WEIGHTS FLAG...: both, and that they agree
  ours "$2" --weights "${@:3}"
  theirs "$1" "$2" --weights "${@:3}"
  agree "$2" "$2" || fault "$2: step, loss, norm, rate, and their loss and norm: $(tr '\n' ';' <"$work/both")"
}
model=(--depth 3 --width 32 --heads 2 --ffn 48 --writer-std 0.1 --final-std 0.1)
flags=(--lr 1e-2 --warmup 3 --weight-decay 0.2 --clip 0.5 --dropout 0.5 --time-shift 2)

ours start "${model[@]}" --patch 8
start=$work/start/weights.safetensors
same 1 one "$start" "${flags[@]}"
same 2 two "$start" "${flags[@]}" --accumulate 2 --seed 2
! agree one two || fault "another seed makes no difference"

# Latents, of which each 16th is held out; text as wide as the trunk; three rows and one, which two processes
# cannot share alike; weights in fp64, with a gain of ones, which stays.
"$python" - "$work" "$start" <<'DATA' || fault "no latents"
import json, sys, torch
sys.path.insert(0, "tests")
from convert import mapped
from peer_torch import save
torch.manual_seed(1)
x = {"latents": torch.randn(37, 3, 4, 6), "text": torch.randn(5, 7, 32), "empty": torch.randn(7, 32)}
x = {name: t.double() for name, t in x.items()}
save(sys.argv[1] + "/data.safetensors", x | {"caption": torch.arange(37) % 5}, {})
w = {name: t.double() for name, t in mapped(sys.argv[2]).items() if "mvsplit" not in name and "context" not in name}
w |= {f"blocks.{b}.rezero{i}": torch.tensor([0.3]).double() for b in range(3) for i in (1, 2)}
w |= {"patch_embed.patch_proj.weight": torch.randn(32, 3, 1, 1).double(), "final_proj.bias": torch.randn(3).double(),
      "final_proj.weight": torch.randn(3, 32).double() / 4, "norm_img_input.weight": torch.ones(32).double()}
save(sys.argv[1] + "/wide.safetensors", w, {"residual": "rezero", "depth": 3, "width": 32, "heads": 2, "ffn": 48,
     "channels": 3, "height": 4, "image_width": 6, "patch": 1, "text_dim": 32, "norm_eps": 1e-5})
DATA
data=(--data "$work/data.safetensors")
same 2 latents "$work/wide.safetensors" "${data[@]}" "${flags[@]}"

# The form of what is written, and what was learned since the start. In sums: the few numbers whose gradient is
# all rounding move as far as the others, either way.
"$python" - "$work" "$start" >"$work/log" 2>&1 <<'SAME' || fault "weights: $(last)"
import sys
sys.path.insert(0, "tests")
from convert import mapped
work, start = sys.argv[1:]
form = lambda x: {name: (t.dtype, t.shape) for name, t in x.items()}
for run, path in ("one", start), ("two", start), ("latents", work + "/wide.safetensors"):
    began, ours, theirs = map(mapped, (path, f"{work}/{run}/weights.safetensors", f"{work}/{run}.safetensors"))
    assert form(theirs) == form(began), f"{run}: another form"
    for name, x in ours.items():
        off, moved = (theirs[name] - x).abs().sum(), (x - began[name]).abs().sum()
        assert off < 1e-4 * moved, f"{run}: {name} is off by {off / moved:.1e} of what it moved"
SAME

# The program takes what they leave.
"$program" sample --device cpu --weights "$work/two.safetensors" --prompt sneaker --columns 1 --steps 2 \
  --out "$work/drawn.png" >"$work/log" 2>&1 || fault "sample: $(last)"
! grep 'does not say' "$work/log" || fault "the metadata does not say all"
ours on --weights "$work/latents.safetensors" "${data[@]}"

refused() {  # refused WORDS ARGUMENT...: before step 1
  RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 "$python" tests/peer_torch.py fsdp --weights "$start" --out "$work/new" "${@:2}" \
    >"$work/log" 2>&1 && fault "not refused: $1"
  ! grep -q Traceback "$work/log" || fault "a traceback instead of: $1"
  grep -qF -- "$1" "$work/log" || fault "no '$1' but: $(last)"
}
refused 'is shared by 2 processes' --batch 3
refused 'cannot be written' --out /proc/o.safetensors
refused 'is no .safetensors: sharded weights and .pt files are not read here' --weights w.safetensors.index.json
refused 'cannot read none.safetensors' --data none.safetensors
refused 'is for 1 x 32 x 32 and text of 64 numbers, the data have 3 x 4 x 6 and 32' "${data[@]}"

# The same in one process: flags, and files whose tensors x or metadata m were edited.
RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 "$python" - "$work" >"$work/log" 2>&1 <<'REFUSED' || fault "refused: $(last)"
import contextlib, io, json, sys
sys.path.insert(0, "tests")
import torch, peer_fsdp, peer_torch
work = sys.argv[1]
files = {kind: f"{work}/{name}.safetensors" for kind, name in (("data", "data"), ("weights", "wide"))}
def refused(words, *arguments):
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            peer_fsdp.main(["--weights", files["weights"], "--data", files["data"], "--out", work + "/new", *arguments])
    except SystemExit as error:
        assert words in f"{said.getvalue()}{error}", f"no '{words}' but: {said.getvalue()}{error}"
    else:
        raise AssertionError(f"not refused: {words}")
def bad(kind, words, edit):
    x, path = peer_fsdp.mapped(files[kind]), work + "/bad.safetensors"
    with open(files[kind], "rb") as file:
        m = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    exec(edit)
    peer_torch.save(path, x, m)
    refused(f"{path}: {words}", "--" + kind, path)
for out in "/dev/null", "/proc/o.safetensors", work + "/" + 253 * "o", work + "/none/o":
    refused(f"--out {out} cannot be written", "--out", out)
for flag in ("clip=-1 time-shift=0 time-shift=x dropout=2 weight-decay=-1 warmup=-5 seed=-1 save-every=-1 lr=nan lr=-1 "
             "steps=0").split():
    refused("argument --{}: {} must be".format(*flag.split("=")), "--" + flag)
refused("cannot read none.safetensors", "--weights", "none.safetensors")
bad("data", "empty has shape (3, 32), expected (7, 32)", "x['empty'] = x['empty'][:3]")
bad("data", "empty holds numbers that are not finite", "x['empty'][0] = torch.nan")
bad("data", "caption is torch.float64 of shape (37,), expected integers", "x['caption'] = x['caption'].double()")
bad("data", "caption holds something else than 37 numbers", "x['caption'] = x['caption'][1:]")
bad("data", "caption is torch.int64 of shape (37, 1), expected", "x['caption'] = x['caption'][:, None]")
bad("data", "latents is torch.int64 of shape", "x['latents'] = x['latents'].long()")
bad("data", "latents is torch.float64 of shape (0, 3, 4, 6), expected", "x['latents'] = x['latents'][:0]")
bad("data", "text is torch.float64 of shape (5, 224), expected", "x['text'] = x['text'].flatten(1)")
bad("data", "tensor text is missing", "del x['text']")
bad("data", "more is not known", "x['more'] = x['text']")
for key, value in ("heads", "0"), ("patch", "x"), ("norm_eps", "nan"), ("time_shift", "x"):
    bad("weights", f"metadata {key} {value} must be", f"m['{key}'] = '{value}'")
bad("weights", "its metadata say width 32, 3 heads", "m['heads'] = 3")
bad("weights", "its metadata say width 32, 2 heads, patch 3", "m['patch'] = 3")
bad("weights", "patch_embed.patch_proj.weight has shape (32, 3, 1, 1), expected (16, 3, 1, 1)", "m['width'] = 16")
bad("weights", "blocks.0.ffn.w13.weight has shape (96, 32), expected (198, 32)", "m['ffn'] = 99")
bad("weights", "blocks.1.rezero2 is missing", "del x['blocks.1.rezero2']")
REFUSED

# Stopped, it says so, and leaves nothing half written.
RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=0 "$python" tests/peer_torch.py fsdp --weights \
  "$start" --batch 4 --steps 100000 --save-every 1 --out "$work/stopped" >"$work/said" 2>"$work/end" &
until grep -q '^weights' "$work/said" || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
refused 'another run writes --out' --out "$work/stopped"
kill $! && ! wait $! || fault "it cannot be stopped"
grep -q '^interrupted: what came after' "$work/end" || fault "no 'interrupted' but: $(tail -n 1 "$work/end")"
[ ! -e "$work/stopped.tmp" ] && [ ! -e "$work/stopped.lock" ] || fault "it left stopped.tmp or stopped.lock"
echo "fsdp_check: $faults faults"
[ $faults = 0 ]

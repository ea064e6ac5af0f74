#!/usr/bin/env bash
# notebook_check.sh PROGRAM: the cells of tests/notebook.ipynb in their order, in a copy of this folder and
# without a GPU or Jupyter, as plain Python and bash. Few steps: that what they show is there, not what it
# looks like. Exit status 1 and a line a fault otherwise; 77 where there is no Python.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
export STEPS=10 CUDA_VISIBLE_DEVICES=
command -v python3 >/dev/null || {
  echo "notebook_check: skipped: there is no python3"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
folder=$(dirname "$1")
# With the times of files: nothing is to be built anew.
tar -c --exclude=./build --exclude=./run --exclude=./experiments --exclude=./.git --exclude=./data/downloads \
  . | tar -x -C "$work"
mkdir -p "$work/$folder"
cp -a "$1" "$folder/compiler" "$work/$folder"
ln -s "$PWD/data/downloads" "$work/data"
cat >"$work/cells.py" <<'CELLS'
import json, subprocess, sys, types

shown = []
display = types.ModuleType("IPython.display")
display.display = shown.append
display.HTML = str
display.Image = lambda path: open(path, "rb").read()
sys.modules["IPython"], sys.modules["IPython.display"] = types.ModuleType("IPython"), display

names = {}
for cell in json.load(open("notebook.ipynb"))["cells"]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        continue
    if cell["outputs"] or cell["execution_count"]:
        sys.exit("a cell has outputs: clear them")
    if source.startswith("%%bash\n"):
        subprocess.run(["bash", "-c", source.split("\n", 1)[1]], check=True)
    else:
        exec(compile(source, source.split("\n")[0], "exec"), names)
pages, pictures = ([x for x in shown if isinstance(x, kind)] for kind in (str, bytes))
if [page.count("&lt;/html&gt;") for page in pages] != [1, 1] or not all("step,layer" in page for page in pages):
    sys.exit("there are not two pages of diagnosed runs")
if [picture[:4] for picture in pictures] != [b"\x89PNG"]:
    sys.exit("there is not one picture")
CELLS
cd "$work/tests" || exit 1
python3 ../cells.py >"$work/log" 2>&1 && exit 0
echo "notebook_check: $(grep . "$work/log" | tail -n 3)"
exit 1

#!/usr/bin/env bash
# page_check.sh PROGRAM: the page of a run in headless Chromium. It loads without an error and without a
# network, holds the numbers of diagnostics.csv, and what the slider, the keys and the pointer do is seen.
# A long run's page is under 2 MB; so are the committed ones. Leaves a picture to be looked at,
# build/page.png. Exit status 1 and a line a fault otherwise; 77 where there is no Chromium.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
chromium=$(command -v chromium || command -v google-chrome) || {
  echo "page_check: skipped: there is no Chromium (Debian's package chromium)"
  exit 77
}
faults=0
fault() {
  echo "page_check: $1"
  faults=$((faults + 1))
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
browse() {
  timeout 100 "$chromium" --headless --no-sandbox --disable-gpu --user-data-dir="$work/profile" --window-size=1400,2600 \
    --virtual-time-budget=5000 "$@" 2>"$work/log"
}

# asked PAGE [CSV]: what the page answers to the questions below: "ok", or a fault. CSV: its diagnostics.csv.
asked() {
  {
    head -n 1 "$1"
    cat <<'QUESTIONS'
<script>
const faults = [];
addEventListener("error", (e) => faults.push(e.message));
addEventListener("load", () => {
  const picture = () => [...document.querySelectorAll("canvas")].map((c) => c.toDataURL()).join();
  const changes = (what, act) => {
    const before = picture() + $("shown").textContent;
    act();
    if (picture() + $("shown").textContent == before) faults.push(`${what} changes nothing`);
  };
  const key = (key) => dispatchEvent(new KeyboardEvent("keydown", {key}));
  try {
    changes("the slider", () => { $("step").value = 0, $("step").dispatchEvent(new Event("input")); });
    changes("a key", () => key("ArrowRight"));
    changes("coming closer", () => key("+"));
    changes("all steps", () => key("0"));
    const map = document.querySelector("#panels canvas"), at = map.getBoundingClientRect();
    changes("a click", () => map.dispatchEvent(new MouseEvent("click", {clientX: at.right - 12, clientY: at.top + 40})));
    map.dispatchEvent(new PointerEvent("pointermove", {clientX: at.left + 60, clientY: at.top + 40}));
    if (!/^step \d+, layer \d+\n\w+ [-\d]/.test($("tip").textContent)) faults.push("hovering tells no number");
    if (document.documentElement.scrollWidth > innerWidth) faults.push("it is wider than the window");
    for (const line of expected.textContent.trim().split("\n").slice(1)) {
      const [step, layer, ...values] = line.split(","), f = frames.find((f) => f.step == step);
      values.forEach((text, i) => {  // three digits; what floats do not hold is zero or infinity
        const v = f.of[i][f.layers.indexOf(+layer)], x = +text.replace("inf", "Infinity");
        if (!Object.is(v, x) && !(isFinite(x) && Math.abs(v - x) <= 0.005 * Math.abs(x)))
          faults.push(`step ${step}, layer ${layer}, ${names[i]}: ${v} for ${x}`);
      });
    }
  } catch (e) { faults.push(e.message); }
  document.body.dataset.answer = faults.slice(0, 3).join("; ") || "ok";
});
</script>
QUESTIONS
    tail -n +2 "$1"
    echo "<pre hidden id=expected>"
    [ -z "${2:-}" ] || grep -v '^#' "$2"
    echo "</pre>"
  } >"$work/asked.html"
  browse --dump-dom "file://$work/asked.html" | sed -n 's/.*data-answer="\([^"]*\)".*/\1/p'
}
# answers PAGE [CSV]
answers() {
  local answer
  answer=$(asked "$@")
  [ "$answer" = ok ] || fault "$1: ${answer:-no answer: $(tail -n 1 "$work/log")}"
  [ "$(wc -c <"$1")" -lt 2000000 ] || fault "$1 is not under 2 MB"
  ! grep -qiE '(src|href)="?[a-z]+:/|url\(|@import|fetch\(' "$1" || fault "$1 asks for a network"
}

# A run that the program makes, which makes its page; with numbers of every kind, and text that is not markup.
run="$work/a <b> & c"
"$1" train --device cpu --depth 4 --width 16 --heads 2 --ffn 32 --patch 8 --batch 4 --steps 8 --columns 1 --val-images 4 \
  --diagnose-every 2 --diagnose-layers all --out "$run" >"$work/log" 2>&1 || fault "train: $(tail -n 1 "$work/log")"
[ -s "$run/page.html" ] || fault "a diagnosed run has left no page"
awk -F, -v OFS=, '/^[0-9]/ { split("nan inf 0 1e-38 -9.996e-12 9.995 0.0009996 -123.456 1e44", v, " ")
    $(3 + n % (NF - 2)) = v[1 + n++ % 9] }
  { print }' "$run/diagnostics.csv" >"$work/odd.csv" && mv "$work/odd.csv" "$run/diagnostics.csv"
printf 'Spike at step 6: </pre><script>throw "not text"</script>\nVerdict: & none.\n\nThe rest\n' >"$run/spike_000006.txt"
printf '%s\n' "data=a</pre>' b" 'out="my run"' >>"$run/config.ini"
echo '9,0.5,</pre><script>throw "not text"</script>' >>"$run/validation.csv"
for other in final '0+step[$(touch obeyed)]'; do cp "$run/samples.png" "$run/samples_$other.png"; done
bash data/page.sh "$run" >/dev/null || fault "page.sh failed"
[ ! -e obeyed ] || { rm obeyed; fault "a file's name was obeyed"; }
page=$run/page.html
answers "$page" "$run/diagnostics.csv"
cp "$page" "$work/page.html"
mkdir -p build
browse --screenshot=build/page.png "file://$work/page.html"
[ "$(wc -c <build/page.png)" -gt 100000 ] || fault "build/page.png shows hardly anything"

# What must be found out: a page that fails, one whose slider is dead, and one with a wrong number.
sed 's/^"use strict";/&undefined.x;/' "$page" >"$work/fails.html"
sed 's/oninput = /onnothing = /' "$page" >"$work/dead.html"
sed 's/^\(0 .*\)...$/\1abc/' "$page" >"$work/wrong.html"
for wrong in fails dead wrong; do
  answer=$(asked "$work/$wrong.html" "$run/diagnostics.csv")
  [ -n "$answer" ] && [ "$answer" != ok ] || fault "the check does not see that it $wrong"
done

# 400 layers, 29 columns, 60 diagnosed steps of 6000; a run without diagnostics.
mkdir "$work/long" "$work/short"
awk 'BEGIN { print "step,loss,gradient_norm,lr"; for (s = 1; s <= 6000; s++) print s ",0.5,1,0.001" }' >"$work/long/log.csv"
awk 'BEGIN { printf "step,layer"; for (c = 0; c < 29; c++) printf ",column_%d", c
  for (s = 1; s <= 60; s++) for (l = 0; l < 400; l++) { printf "\n%d,%d", 100 * s, l; for (c = 0; c < 29; c++) printf ",%d", l + s + c }
  print "" }' >"$work/long/diagnostics.csv"
head -n 20 "$work/long/log.csv" >"$work/short/log.csv"
for of in long short; do bash data/page.sh "$work/$of" >/dev/null || fault "page.sh failed"; done
answers "$work/long/page.html"
browse --dump-dom "file://$work/short/page.html" | grep 'This run was not diagnosed' >/dev/null ||
  fault "an undiagnosed run has no page"
for page in data/figures/*.html; do
  answers "$page"
  [ -z "$(diff data/page.html "$page" | grep '^<' | grep -v '<!-- put ')" ] ||
    fault "$page is older than data/page.html: make experiment NAME=all REDRAW=1"
done
echo "page_check: $faults faults"
[ $faults = 0 ]

#!/usr/bin/env bash
# page_check.sh PROGRAM: the page of a run in headless Chromium. It loads without an error and without a
# network, holds the numbers of diagnostics.csv, and what the slider, the keys and the pointer do is seen.
# Of files that are cut off, too long or garbage it shows what is there, and invents nothing.
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

# made FOLDER: puts $work/FOLDER on a page.
made() { bash data/page.sh "$work/$1" >"$work/log" 2>&1 || fault "page.sh $1: $(tail -n 1 "$work/log")"; }
# says FOLDER WANTED SCRIPT: its page loads without an error, and the script returns WANTED.
says() {
  local answer
  {
    head -n 1 "$work/$1/page.html"
    echo '<script>let error = ""; addEventListener("error", (e) => error = e.message);</script>'
    tail -n +2 "$work/$1/page.html"
    echo '<script>const key = (key) => dispatchEvent(new KeyboardEvent("keydown", {key}));'
    echo 'const bar = (step) => { go(steps.indexOf(step)); return $("shown").textContent.trim(); };'
    echo 'const shown = () => all(".sample").filter((p) => p.style.display == "block").map((p) => p.dataset.step).join();'
    echo "document.body.dataset.answer = error || (() => { $3 })();</script>"
  } >"$work/asked.html"
  answer=$(browse --dump-dom "file://$work/asked.html" | sed -n 's/.*data-answer="\([^"]*\)".*/\1/p')
  [ "$answer" = "$2" ] || fault "$1: \"$answer\" for \"$2\""
}
# begins FOLDER ROWS: a run with so many rows of log.csv.
begins() {
  mkdir "$work/$1"
  awk -v n="$2" 'BEGIN { print "step,loss,gradient_norm,lr"
    for (s = 1; s <= n; s++) print s ",0.5," s ",0.001" }' >"$work/$1/log.csv"
}

# Pictures and reports of steps that were not diagnosed, and the last step.
begins last 22
printf '%s\n' step,layer,attention_tcs {6,12,18},{0,1},0.5 >"$work/last/diagnostics.csv"
cp "$run/samples.png" "$work/last"
cp "$run/samples.png" "$work/last/samples_000020.png"
sed 's/step 6/step 9/' "$run/spike_000006.txt" >"$work/last/spike_000009.txt"
made last
says last "6 9 12 18 20 22; 22 step 22; 20 step 20; step 9  ▼; at step 18: layer →" '
  const after = (name) => (key(name), shown() + " " + $("shown").textContent.split("  ")[0]);
  const ends = after("End") + "; " + after("ArrowLeft");
  const report = bar(9).replace(/  loss.*  /, "  ");
  key("End");
  return [steps.join(" "), ends, report, all("#panels canvas").at(-1).ariaLabel].join("; ");'

# Numbers that are missing, cut off, infinite or none.
begins cut 22
printf '%s\n' step,layer,attention_tcs,ffn_tcs 10,0,0.5,0.5 10,1,0.5 >"$work/cut/diagnostics.csv"
printf '10,2,0.5,0.2' >>"$work/cut/diagnostics.csv"
printf '\n23,1\n\n24,1.1e-\n25,inf,nan,0.001\n26,1,2,0.0' >>"$work/cut/log.csv"
made cut
says cut "25; step 25  loss Infinity  norm NaN  rate 0.001; step 10  loss 0.5  norm 10  rate 0.001; NaN; 0 1; 1  ; NaN" '
  const row = (step) => losses.find((r) => r[0] == step);
  return [logged.at(-1), bar(25), bar(10), frames[0].of[1][1], frames[0].layers.join(" "), row(23).slice(1).join(" "),
    row(24)[1]].join("; ");'
mkdir "$work/normless"
printf '%s\n' step,loss,lr 1,0.5,0.01 2,0.4,0.01 >"$work/normless/log.csv"
made normless
says normless "step 2  loss 0.4  rate 0.01, loss lr" \
  'return [bar(2), all("[data-log]").map((a) => a.dataset.log).join(" ")].join(", ");'

# A run that goes on: log.csv ends before diagnostics.csv.
begins running 150
printf '%s\n' step,layer,attention_tcs {100,165},{0,1},0.5 >"$work/running/diagnostics.csv"
made running
says running "step 165  (step 150: loss 0.5  norm 150  rate 0.001), step 100  loss 0.5  norm 100  rate 0.001" \
  'return [bar(165), bar(100)].join(", ");'

# Little: one step, none, and garbage.
begins one 1
made one
says one "3; 1 1 1" 'let lines = 0, ticks = [];
  for (const c of all(".sheet canvas")) {  // the colour of the line is somewhere
    const {data} = c.getContext("2d").getImageData(0, 0, c.width, c.height);
    const blue = (i) => data[i] < 60 && data[i + 1] > 80 && data[i + 1] < 190 && data[i + 2] > 150;
    lines += data.some((_, i) => i % 4 == 0 && blue(i));
  }
  CanvasRenderingContext2D.prototype.fillText = (text, x, y) => y == 170 - 6 && ticks.push(text);
  look(0, Infinity);
  return lines + "; " + ticks.join(" ");'
mkdir "$work/none"
echo step,loss,gradient_norm,lr >"$work/none/log.csv"
cp "$run/samples.png" "$work/none"
made none
says none ", At the end." 'return $("shown").textContent + ", " + $("sampled").textContent;'
begins garbage 20
printf '\n\n' >>"$work/garbage/log.csv"
cp "$run/samples.png" "$work/garbage"
printf '%s\n' 'data="a\x b"' 'lr=0.5' >"$work/garbage/config.ini"
for garbage in "$(head -c 3000 "$run/samples.png" | tr -d '\0')" $'a,b,c\n1,2\n@x' $'step,layer\n1,1' \
  $'step,layer,x\nstep,layer,x\n1,a,3\n-1,2\n5,0,abc'; do
  printf '%s\n' "$garbage" >"$work/garbage/diagnostics.csv"
  made garbage
  says garbage "step 20  loss 0.5  norm 20  rate 0.001; After step 20.; a\\x b" \
    'return [bar(20), $("sampled").textContent, set.data.slice(1, -1)].join("; ");'
done

# Much of everything; a step with a report stays, pictures are taken evenly.
begins much 10000
awk 'BEGIN { printf "step,layer"; for (c = 0; c < 29; c++) printf ",column_%d", c
  for (s = 1; s <= 400; s++) for (l = 0; l < 70; l++) {
    printf "\n%d,%d", 25 * s, l; for (c = 0; c < 29; c++) printf ",%d", l + s + c }
  print "" }' >"$work/much/diagnostics.csv"
awk 'BEGIN { print "step,loss"; for (s = 1; s <= 60000; s++) print s ",0.123456" }' >"$work/much/validation.csv"
awk 'BEGIN { for (s = 1; s <= 60000; s++) print "a" s "=<&" s }' >"$work/much/config.ini"
for s in {250..10000..250}; do head -c 25000 /dev/urandom >"$work/much/samples_$(printf %06d "$s").png"; done
for s in {50..10000..50}; do
  { printf '%s\n' "Spike at step $s: norm" Verdict; head -c 3000 /dev/urandom | base64; } \
    >"$work/much/spike_$(printf %06d "$s").txt"
done
made much
answers "$work/much/page.html"
says much "250 10000 true true true true true" '
  const at = pictures.map((p) => +p.dataset.step), of = reports.map((r) => +r.dataset.step);
  const even = (list) => list.length > 8 && list.slice(1).every((s, i) => s - list[i] < 1500);
  return [at[0], at.at(-1), even(at), even(of), of.every((s) => diagnosed.includes(s)), diagnosed.length < 400,
    /4 at a time.*means of 60.*of 200 reports.*of 40 pictures/s.test(document.body.innerText)].join(" ");'

# Two at once, and a page that is a link.
for i in 1 2 3 4 5 6; do bash data/page.sh "$work/long" >/dev/null 2>"$work/log.$i" & done
for i in 1 2 3 4 5 6; do wait -n || fault "page.sh beside another: $(cat "$work"/log.*)"; done
[ "$(ls "$work/long")" = "$(printf '%s\n' diagnostics.csv log.csv page.html)" ] || fault "page.sh leaves a file"
mkdir "$work/elsewhere"
ln -s ../elsewhere/page.html "$work/short/linked.html"
for i in 1 2; do bash data/page.sh "$work/short" "$work/short/linked.html" >/dev/null || fault "a link $i"; done
[ -L "$work/short/linked.html" ] && [ -s "$work/elsewhere/page.html" ] || fault "a page's link was replaced, not its target"

for page in data/figures/*.html; do
  answers "$page"
  [ -z "$(diff data/page.html "$page" | grep '^<' | grep -v '<!-- put ')" ] ||
    fault "$page is older than data/page.html: make experiment NAME=all REDRAW=1"
done
echo "page_check: $faults faults"
[ $faults = 0 ]

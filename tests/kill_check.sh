#!/usr/bin/env bash
# kill_check.sh PROGRAM [KILLS [SEED]]: a run of PROGRAM that saves every step is killed (kill -9) at
# KILLS (default 50) random moments, of its start and of its steps alike, and goes on each time. It must
# leave what the unbroken run leaves, bit for bit: weights, their average, state, pictures and logs.
# Exit status 1 and a line a fault otherwise.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
[[ -x ${1:-} && ${2:-50} =~ ^[1-9][0-9]*$ ]] || { echo "kill_check.sh PROGRAM [KILLS [SEED]]" >&2; exit 2; }
program=$1 kills=${2:-50} seed=${3:-1} steps=100 killed=0 faults=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fault() {
  echo "kill_check: $1"
  faults=$((faults + 1))
}

# Random latents, 32 of 1x4x4, all with the one caption of 2 words of 4 numbers; a number's upper bytes
# make it one from 0.5 to 2, with a sign.
{
  header='{"latents":{"dtype":"F32","shape":[32,1,4,4],"data_offsets":[0,2048]},
"text":{"dtype":"F32","shape":[1,2,4],"data_offsets":[2048,2080]},
"caption":{"dtype":"I32","shape":[32],"data_offsets":[2080,2208]}}'
  printf "\\x$(printf %x ${#header})\0\0\0\0\0\0\0%s" "$header"
  # shellcheck disable=SC2059
  printf "$(awk 'BEGIN { srand(1)
    for (i = 0; i < 520; i++) printf "\\000\\000\\%03o\\%s", rand() * 256, (rand() < 0.5 ? "077" : "277") }')"
  head -c 128 /dev/zero
} >"$work/latents.safetensors"

train() {  # train FOLDER
  exec "$program" train --device cpu --depth 2 --width 8 --heads 1 --ffn 8 --patch 2 --batch 4 --steps $steps \
    --data "$work/latents.safetensors" --val-images 2 --columns 1 --save-every 1 --ema 0.9 --val-every 3 \
    --sample-every 7 --diagnose-every 1 --spike-factor 1.1 --log-every 1 --resume --out "$work/$1" >"$work/log" 2>&1
}

start=$EPOCHREALTIME
(train unbroken) || { fault "the unbroken run failed: $(tail -n 1 "$work/log")"; exit 1; }
middle=$EPOCHREALTIME
(train unbroken) || { fault "a run that is done did not go on: $(tail -n 1 "$work/log")"; exit 1; }
# From its start to some steps on: what the start takes is at most what this second call took.
longest=$(awk -v a="$start" -v b="$middle" -v c="$EPOCHREALTIME" -v n=$steps 'BEGIN { print c - b + 4 * (b - a) / n }')

[ "$(tail -n +2 "$work/unbroken/log.csv" | cut -d, -f1)" = "$(seq $steps)" ] || fault "log.csv has not each step once"

RANDOM=$seed
while [ $killed -lt "$kills" ]; do
  rm -rf "$work/broken"
  status=137
  while [ $status = 137 ]; do
    (train broken) &
    if [ $killed -lt "$kills" ]; then
      sleep "$(awk -v most="$longest" -v r="$RANDOM" 'BEGIN { print most * r / 32768 }')"
      kill -9 $! 2>/dev/null
    fi
    wait $!
    status=$?
    killed=$((killed + (status == 137)))
  done 2>/dev/null  # bash tells of each kill
  [ $status = 0 ] || { fault "after $killed kills: $(tail -n 1 "$work/log")"; break; }
  # A start before the first save keeps the files of the one before; a report of a spike is a process's own,
  # and the page has these and the folder's name.
  rm -f "$work"/*broken/{spike_*,page.html} "$work"/broken/*.[0-9]*
  diff -rq "$work/unbroken" "$work/broken" || fault "after $killed kills what the run leaves is another"
done
echo "kill_check: $killed kills, seed $seed, $faults faults"
[ $faults = 0 ]

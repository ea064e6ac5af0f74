#!/usr/bin/env bash
# Runs experiments and draws what came out of them: data/experiment.sh NAME... (or all). It is what
# `make experiment NAME=scream` calls.
#
# data/experiments/NAME.sh is an experiment's recipe, of two functions: `runs` calls `run` for each of
# its runs, with what sets that one apart from data/experiments/SCALE.ini; `draw` turns what came out
# into figures and Markdown. Both may use data/experiments/draw.sh. A third, `after`, is for what has to
# be done with a trained network before its run counts as over.
#
# A run's folder, experiments/NAME/RUN, holds its config.ini (`mvsplit train --config` repeats it),
# what train writes, train.log, and, once it is over, `result`: a run that has one is not run again, one
# without goes on from its last save. To run one again, remove its folder.
#
# When the runs are over, their losses, diagnostics and a line for each are packed into
# data/figures/csv/NAME_*.csv.gz, and from these files alone the figures and tables are made:
# `make experiment NAME=scream REDRAW=1` draws again on a machine that has none of the runs.
#
# QUICK=1 is a reduced version (of scream, cure and law), SCALE=tiny a trial of the scripts; both leave
# everything in experiments/SCALE. JOBS=4 makes four runs at a time, several GPUs by turns; on one GPU they
# overlap only under CUDA's MPS. MINUTES=60 begins no run that would not be over by then.
set -euo pipefail
cd "$(dirname "$0")/.."
recipes=data/experiments
program=build/mvsplit
all="scream cure frontier thousand law front one-branch probe ablations pictures lean size"

die() { echo "experiment: $*" >&2; exit 2; }
# "1h02m", "3m20s", "12s" for a number of seconds.
duration() {
  awk -v s="$1" 'BEGIN { s = int(s + 0.5)
    if (s >= 3600) printf "%dh%02dm", s / 3600, s % 3600 / 60
    else if (s >= 60) printf "%dm%02ds", s / 60, s % 60
    else printf "%ds", s }'
}

# --- What to run -----------------------------------------------------------------------------

# The scale's folders and sizes. A quick version on a GPU has the full depth, fewer and shorter runs.
choose_scale() {
  SCALE=${SCALE:-$([ -n "${QUICK:-}" ] && echo quick || echo full)}
  machine=CPU name="CPU, $(nproc) threads"
  if name_of_gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) &&
     [ -n "$name_of_gpu" ]; then
    machine=GPU name=$name_of_gpu
  fi
  case $SCALE in
    full) root=experiments figures=data/figures base=$recipes/full.ini ;;
    quick) root=experiments/quick figures=$root/figures
           base=$recipes/$([ $machine = GPU ] && echo quick || echo small).ini ;;
    tiny) root=experiments/tiny figures=$root/figures base=$recipes/tiny.ini ;;
    *) die "SCALE is full, quick or tiny, not $SCALE" ;;
  esac
  csv=$figures/csv
  mkdir -p "$root" "$csv"
}

# The value of option $1 in the ini file $2, by default the scale's; or nothing.
option() { sed -n "s/^$1=//p" "${2:-$base}"; }

# $1 blocks of $2 (by default the scale's depth), evenly spaced from the first to the last.
layers() {
  awk -v n="$1" -v depth="${2:-$(option depth)}" 'BEGIN {
    if (n > depth) n = depth
    for (i = 0; i < n; i++) printf "%s%d", i ? "," : "", (depth - 1) * i / (n > 1 ? n - 1 : 1) + 0.5 }'
}

# run RUN KEY=VALUE...: one run of the experiment, called by `runs` in a recipe. RUN ends in _SEED if
# there are several seeds. A key is an option of `mvsplit train`, or
#   keep=weights  leave weights.safetensors in place when the run is over
# Writes the run's config.ini, with the latter as a comment.
run() {
  [ -z "${REDRAW:-}" ] || return 0
  local dir=$root/$experiment/$1 new
  shift
  new=$(printf '%s\n' "$@" | awk -F= '
    NR == FNR { key = $1; sub(/^[^=]*=/, ""); value[key] = $0; next }
    /^#/ { next }
    $1 in value { print $1 "=" value[$1]; delete value[$1]; next }
    { print }
    /^\[train\]/ && "keep" in value { print "#keep=" value["keep"]; delete value["keep"] }
    END { for (k in value) print k "=" value[k] | "sort" }' - "$base")
  if [ -e "$dir/config.ini" ] && [ "$new" != "$(cat "$dir/config.ini")" ]; then
    die "$dir was made with another config.ini than $recipes has now: remove it"
  fi
  mkdir -p "$dir"
  echo "$new" >"$dir/config.ini"
  listed+=("$dir")
}

# Sets what a recipe may: `columns` (of diagnostics.csv that the figures need), `bin` (steps a row of the
# losses), `pictures` and `spikes` (runs whose samples and spike report are kept), `tables` (further
# csv files in the runs' folders, without the .csv), and the functions `runs`, `draw`, `after` and `packed`;
# `after` gets the folder of a run that has trained to its end, with its weights.safetensors, and its
# exit status says whether that went well; `packed` is called when the csv files are there, and may
# choose `pictures` and `spikes` by them.
read_recipe() {
  experiment=$1 columns="" bin=5 pictures="" spikes="" tables=""
  after() { :; }
  packed() { :; }
  [ -e "$recipes/$1.sh" ] || die "there is no experiment $1, but $all"
  # shellcheck source=/dev/null
  source "$recipes/$1.sh"
}

# --- How long it will take --------------------------------------------------------------------

# For the run in folder $1, of two runs of a few steps of its width and batch at 16 blocks, measured
# once a machine: milliseconds that a block takes a step, that diagnosing a block adds, and seconds that
# a run takes besides.
measure_speed() {
  local speeds=$root/speed dir=$root/speed.tmp size="" few plain diagnosed o
  few=(--config "$base" --depth 16 --steps 16 --log-every 8 --save weights --columns 1)
  for o in width heads ffn patch batch; do
    size+="$o=$(option $o "$1/config.ini") " few+=("--$o" "$(option $o "$1/config.ini")")
  done
  if [ "$(head -n 1 "$speeds" 2>/dev/null)" != "$name" ]; then echo "$name" >"$speeds"; fi
  if ! grep -q "^$size" "$speeds"; then
    rm -rf "$dir"
    echo "measuring the speed of this machine, $name: $size"
    plain=$(timed "${few[@]}" --out "$dir/plain")
    diagnosed=$(timed "${few[@]}" --out "$dir/diagnosed" --diagnose-every 1 --diagnose-layers all)
    rm -rf "$dir"
    awk -v size="$size" -v a="$plain" -v b="$diagnosed" 'BEGIN {
      split(a, p); split(b, d)
      other = p[2] - 36 * p[1] / 1000  # drawing and validating cost about 20 steps
      printf "%s%.4f %.4f %.1f\n", size, p[1] / 16, (d[1] > p[1] ? (d[1] - p[1]) / 16 : 0), (other > 0 ? other : 0) }' \
      >>"$speeds"
  fi
  read -r ms_layer ms_diagnosed startup <<<"$(sed -n "s/^$size//p" "$speeds")"
}
# Milliseconds a step, and seconds of wall time, of a training run with these options.
timed() {
  local start=$EPOCHREALTIME
  "$program" train "$@" | awk '/ms\/step/ { for (i = 2; i <= NF; i++) if ($i == "ms/step") ms = $(i - 1) }
    END { print ms }' | tr '\n' ' '
  awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }'
}

# Seconds that the run in folder $1 will take, at the speed that was measured last.
seconds_of() {
  awk -F= -v a="$ms_layer" -v b="$ms_diagnosed" -v other="$startup" '
    { sub(/^#/, ""); o[$1] = $2 }
    END {
      measured = o["diagnose-layers"] == "" ? 5 : o["diagnose-layers"] == "all" ? o["depth"] : split(o["diagnose-layers"], l, ",")
      every = o["diagnose-every"]; steps = o["steps"]
      times = every ? steps / every : 0
      print other + (a * o["depth"] * (steps + 20) + b * measured * times) / 1000 }' "$1/config.ini"
}

anything_to_do() {
  local dir
  for dir in "${listed[@]}"; do [ -s "$dir/result" ] || return 0; done
  return 1
}

# Prints what will be run and for how long.
announce() {
  local dir total=0 n=0 seconds
  for dir in "${listed[@]}"; do
    if [ -s "$dir/result" ]; then
      printf '  %-44s done: %s\n' "${dir#"$root"/}" "$(result "$dir" result)"
    else
      measure_speed "$dir"
      seconds=$(seconds_of "$dir")
      printf '  %-44s %5s steps of %4s layers  about %s\n' "${dir#"$root"/}" \
        "$(option steps "$dir/config.ini")" "$(option depth "$dir/config.ini")" "$(duration "$seconds")"
      total=$(awk -v a="$total" -v b="$seconds" 'BEGIN { print a + b }') n=$((n + 1))
    fi
  done
  echo "$n runs to do, about $(duration "$total") on this machine, $name (from the speeds in $root/speed, which" \
    "were measured; remove it to measure again: ms a layer and step, ms more where diagnosed, s a run besides)"
}

# --- Running -----------------------------------------------------------------------------------

# The value of key $2 in the result of the run in folder $1.
result() { sed -n "s/^$2=//p" "$1/result"; }

# mvsplit train in folder $1 with further options. The exit status is train's.
train() {
  local dir=$1 status=0
  shift
  "$program" train --config "$dir/config.ini" --resume --out "$dir" "${share[@]}" "$@" >>"$dir/train.log" 2>&1 ||
    status=$?
  return $status
}

# Runs what is listed, or goes on with it.
do_run() {
  local dir=$1 status=0 outcome=finished start=$SECONDS before=0
  [ -s "$dir/result" ] && return
  # Without a state there is nothing to go on from: afresh.
  [ -e "$dir/state.safetensors" ] || find "$dir" -type f ! -name config.ini -delete
  [ -s "$dir/seconds" ] && before=$(cat "$dir/seconds")
  echo "$(date +%H:%M:%S) $dir (tail -f $dir/train.log)"
  train "$dir" || status=$?
  if [ $status = 1 ] && grep -q 'training has diverged' "$dir/train.log"; then
    outcome=diverged status=0
  fi
  if [ $status = 0 ] && [ $outcome = finished ]; then
    read_recipe "$(basename "${dir%/*}")"
    after "$dir" >>"$dir/train.log" 2>&1 || status=$?
  fi
  echo $((before + SECONDS - start)) >"$dir/seconds"
  case $status in
    0) ;;
    130 | 143) echo "stopped: the same command goes on"; exit 130 ;;
    *) echo "FAILED: $(tail -n 1 "$dir/train.log")" >&2
       echo "$dir" >>"$root/failed"
       return ;;
  esac
  printf '%s\n' "result=$outcome" "seconds=$(cat "$dir/seconds")" "machine=$name" \
    "commit=$(git describe --always --dirty 2>/dev/null || echo unknown)" >"$dir/result"
  rm -f "$dir/state.safetensors" "$dir/seconds"
  [ "$(option '#keep' "$dir/config.ini")" = weights ] || rm -f "$dir/weights.safetensors"
}

# All that is listed, JOBS runs at a time.
run_all() {
  local i pid pids=() status=0
  gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l) at_once=${JOBS:-1} share=()
  rm -rf "$root/claims" "$root/failed"
  mkdir "$root/claims"
  if [ "$at_once" = 1 ]; then
    worker 0
    return
  fi
  trap : INT  # the runs have it too: they save and end
  for ((i = 0; i < at_once; i++)); do
    worker $i &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    until wait "$pid" || status=$?; ! kill -0 "$pid" 2>/dev/null; do :; done  # a signal ends a wait
  done
  trap - INT
  [ $status = 0 ] || exit $status
}

# The $1-th of those that take the next run until there is none. Each has its share of a GPU or of the processors.
worker() {
  local dir side_by_side=$at_once
  if [ "$machine" = GPU ]; then side_by_side=$(((at_once + gpus - 1) / gpus)); fi
  if [ "$at_once" -gt 1 ] && [ "$machine" = GPU ]; then
    export CUDA_VISIBLE_DEVICES=$(($1 % gpus))
    share=(--memory "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits -i $(($1 % gpus)) |
      awk -v n="$side_by_side" '{ print ($1 * 1.048576e-3 - 1) / n - 0.6 }')")
  elif [ "$at_once" -gt 1 ]; then
    export OMP_NUM_THREADS=$((($(nproc) + at_once - 1) / at_once))
  fi
  for dir in "${listed[@]}"; do
    [ ! -s "$dir/result" ] || continue
    if [ -n "${MINUTES:-}" ]; then
      measure_speed "$dir"
      awk -v s="$(seconds_of "$dir")" -v n="$side_by_side" -v left=$((60 * MINUTES - SECONDS)) \
        'BEGIN { exit (s * n > left) }' || continue
    fi
    mkdir "$root/claims/$(echo "${dir#"$root"/}" | tr / _)" 2>/dev/null || continue
    do_run "$dir"
  done
}

# --- Packing what came out ----------------------------------------------------------------------

# What became of a run, from the loss: predicting the mean costs 1.44 (`floor`). All means are over
# 25 steps.
#   trained     it ended at most 0.1 above its best
#   relapsed    it ended further above its best, but not half of the way back from there to the floor
#   collapsed   it ended above that half; the step is the first that is above, as is the mean from
#               there on
#   stuck       it never was clearly under the floor
# Prints outcome, loss at the end, best loss, step of the collapse, largest norm after step 50 and its step.
judge() {
  awk -F, -v floor=1.44 'NR > 1 && $2 ~ /^[0-9.e+-]+$/ { loss[++n] = $2; if ($1 > 50 && $3 > norm) { norm = $3; at = $1 } }
    function mean(from,  i, s) { for (i = from; i < from + 25; i++) s += loss[i]; return s / 25 }
    END {
      if (n < 25) { print "short,nan,nan,," norm "," at; exit }
      best = mean(1); where = 1; end = mean(n - 24)
      for (i = 2; i <= n - 24; i++) if ((m = mean(i)) < best) { best = m; where = i }
      half = (best + floor) / 2
      outcome = best > floor - 0.1 ? "stuck" : end > half ? "collapsed" : end - best > 0.1 ? "relapsed" : "trained"
      if (outcome == "collapsed") {
        for (i = where; i < n - 24 && (mean(i) < half || loss[i] < half); i++);
        step = i }
      printf "%s,%.4f,%.4f,%s,%.4g,%d\n", outcome, end, best, step, norm, at }' "$1"
}

# Image and text tokens of a run on Fashion-MNIST, padded to 32 pixels a side.
tokens_of() { local patch; patch=$(option patch "$1"); echo $(((32 / patch) * (32 / patch) + 8)); }

# Medians over the lines of a train.log: milliseconds a step, tokens a second, HFU in percent of the
# dense peak (on a GPU whose peak train knows), as "ms,tokens,hfu".
pace() {
  awk "$statistics"'
    /ms\/step/ { n++; hfu[n] = ""
      for (i = 2; i <= NF; i++) {
        if ($i == "ms/step") ms[n] = $(i - 1)
        if ($i == "tokens/s") tokens[n] = $(i - 1)
        if ($(i - 1) == "HFU") hfu[n] = $i + 0 } }
    END { if (!n) print ",,"
      else printf "%.1f,%.0f,%s\n", quantile(ms, n, 0.5), quantile(tokens, n, 0.5), hfu[1] == "" ? "" : quantile(hfu, n, 0.5) }' "$1"
}

# Replaces $csv/$experiment_$1.csv.gz with standard input (the same bytes for the same numbers).
pack() { gzip -9n >"$csv/${experiment}_$1.csv.gz.tmp"; mv "$csv/${experiment}_$1.csv.gz"{.tmp,}; }

# The csv files of an experiment from its runs' folders.
pack_runs() {
  local dir run
  for dir in "${listed[@]}"; do
    [ -s "$dir/result" ] || { echo "$experiment is not complete: nothing is drawn"; return 1; }
  done
  {
    echo "run,depth,lr,steps,outcome,loss,best,collapse,norm,norm_step,validation,seconds,machine,commit,tokens,ms,tokens_per_s,hfu"
    for dir in "${listed[@]}"; do
      local c=$dir/config.ini verdict
      verdict=$(judge "$dir/log.csv")
      [ "$(result "$dir" result)" = finished ] || verdict=diverged,${verdict#*,}
      echo "${dir##*/},$(option depth "$c"),$(option lr "$c"),$(option steps "$c"),$verdict,$(
        tail -n 1 "$dir/validation.csv" | awk -F, '$1 ~ /^[0-9]/ { printf "%.4f", $2 }'),$(
        result "$dir" seconds),$(result "$dir" machine | tr ',' ';'),$(result "$dir" commit),$(tokens_of "$c"),$(pace "$dir/train.log")"
    done
  } | pack runs
  {
    echo "run,step,loss,norm"
    for dir in "${listed[@]}"; do
      awk -F, -v run="${dir##*/}" -v bin="$bin" 'NR > 1 {
        sum += $2; if ($3 > norm) norm = $3
        if (++n == bin) { printf "%s,%d,%.4f,%.4g\n", run, $1, sum / n, norm; n = sum = norm = 0 } }' "$dir/log.csv"
    done
  } | pack losses
  [ -z "$columns" ] || {
    echo "run,step,layer,$(echo "${columns:?}" | xargs | tr ' ' ',')"
    for dir in "${listed[@]}"; do
      [ ! -e "$dir/diagnostics.csv" ] || awk -F, -v run="${dir##*/}" -v want="$columns" '
        /^#/ { next }
        !n { n = split(want, w, " "); for (i = 1; i <= NF; i++) at[$i] = i; next }
        { printf "%s,%d,%d", run, $1, $2
          for (i = 1; i <= n; i++) printf ",%.4g", $at[w[i]]
          print "" }' "$dir/diagnostics.csv"
    done
  } | pack diagnostics
  local table
  for table in $tables; do
    for dir in "${listed[@]}"; do
      [ ! -e "$dir/$table.csv" ] || awk -v run="${dir##*/}" '
        /^#/ { next }
        { print (named++ ? run : "run") "," $0 }' "$dir/$table.csv"
    done | awk 'NR == 1 || !/^run,/' | pack "$table"
  done
  packed
  keep_files "${listed[@]}"
}

# Pictures of the runs named in `pictures`; of those in `spikes` the report nearest to the event. Both
# are small, and kept as they are.
keep_files() {
  local dir run step
  for dir in "${listed[@]}"; do
    run=${dir##*/}
    case " ${pictures} " in
      *" $run "*) [ ! -e "$dir/samples.png" ] || cp "$dir/samples.png" "$figures/${experiment}_$run.png" ;;
    esac
    case " ${spikes} " in
      *" $run "*)
        step=$(judge "$dir/log.csv" | awk -F, '{ print $4 == "" ? $6 : $4 }')
        find "$dir" -maxdepth 1 -name 'spike_*.txt' |
          awk -F'[_.]' -v at="$step" '{ away = $(NF - 1) - at; print (away < 0 ? -away : away), $0 }' |
          sort -g | awk 'NR == 1 { print $2 }' |
          while read -r report; do cp "$report" "$csv/${experiment}_${run}_spike.txt"; done ;;
    esac
  done
}

# --- All of it -----------------------------------------------------------------------------------

main() {
  choose_scale
  # shellcheck source=data/experiments/draw.sh
  source "$recipes/draw.sh"
  local names=("$@") one listed=()
  if [ "${names[*]}" = all ]; then
    if [ "$SCALE" = quick ]; then names=(scream cure law); else read -ra names <<<"$all"; fi
  fi
  for one in "${names[@]}"; do
    read_recipe "$one"
    runs
  done
  if [ -z "${REDRAW:-}" ] && anything_to_do; then
    [ -x "$program" ] || die "$program is missing: make"
    announce
    run_all
  fi
  for one in "${names[@]}"; do
    listed=()
    read_recipe "$one"
    runs
    if [ ${#listed[@]} = 0 ] || pack_runs; then draw_all; fi
  done
  [ ! -s "$root/failed" ] || die "these runs failed: $(xargs <"$root/failed")"
}

# The figures and the Markdown of an experiment, the latter also into $root/NAME.md.
draw_all() {
  work=$(mktemp -d)
  { echo "### $experiment"; echo; draw; } | tee "$root/$experiment.md"
  rm -rf "$work"
}

main "$@"

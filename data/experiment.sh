#!/usr/bin/env bash
# Runs experiments and draws what came out of them: data/experiment.sh NAME... (or all). It is what
# `make experiment NAME=scream` calls.
#
# data/experiments/NAME.sh is an experiment's recipe, of two functions: `runs` calls `run` for each of
# its runs, with what sets that one apart from data/experiments/SCALE.ini; `draw` turns what came out
# into figures and Markdown. Both may use data/experiments/draw.sh. A third, `after`, is for what has to
# be done with a trained network before its run counts as over.
#
# A run's folder, experiments/NAME/RUN, holds its recipe.ini (`mvsplit train --config` repeats it),
# what train writes, train.log, and, once it is over, `result`: a run that has one is not run again, one
# without goes on from its last save. To run one again, remove its folder.
#
# When the runs are over, their losses, diagnostics and a line for each are packed into
# data/figures/csv/NAME_*.csv.gz, and from these files alone the figures and tables are made:
# `make experiment NAME=scream REDRAW=1` draws again on a machine that has none of the runs (and with
# TABLES=1 makes the tables only). What is packed of runs that this machine has not made stays.
#
# QUICK=1 is a reduced version (of scream, cure and law), SCALE=tiny a trial of the scripts; both leave
# everything in experiments/SCALE. JOBS=4 makes four runs at a time, several GPUs by turns; on one GPU they
# overlap only under CUDA's MPS. What will take more than an hour begins only with YES=1, or with
# MINUTES=60, which begins no run that would not be over by then.
set -euo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
cd "$(dirname "$0")/.."
recipes=data/experiments
program=build/mvsplit
all="scream cure frontier thousand law front one-branch probe ablations pictures lean size failures \
fp32event appendixj survival leak cure1e3 deep quality demo table1 size32 long1000"
quick="scream cure law"  # those that have a quick version

die() { echo "experiment: $*" >&2; exit 2; }
is_in() { case " $2 " in *" $1 "*) ;; *) return 1 ;; esac; }
# "1h02m", "3m20s", "12s" for a number of seconds.
duration() {
  awk -v s="$1" 'BEGIN { s = int(s + 0.5)
    if (s >= 3600) printf "%dh%02dm", s / 3600, s % 3600 / 60
    else if (s >= 60) printf "%dm%02ds", s / 60, s % 60
    else printf "%ds", s }'
}

# --- What to run -----------------------------------------------------------------------------

processors=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

# The folders and sizes of SCALE. A quick version on a GPU has the full depth, fewer and shorter runs.
choose_scale() {
  machine=CPU name="CPU, $processors threads"
  # A GPU is of use to a program that was built for one; nvidia-smi may be there without a GPU.
  if name_of_gpu=$(nvidia-smi --query-gpu=compute_cap,name --format=csv,noheader 2>/dev/null |
       sed -n '1s/^[0-9]*\.[0-9]*, *//p') && [ -n "$name_of_gpu" ] &&
     ldd "$program" 2>/dev/null | grep cublas >/dev/null; then
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
#   keep=weights  leave weights.safetensors in place when the run is over; keep=state: state.safetensors
#   from=RUN      go on from where that run, which has keep=state, ended, with this one's options
# Writes the run's recipe.ini, with the latter as comments.
run() {
  [ -z "$REDRAW" ] || return 0
  local dir=$root/$experiment/$1 new
  shift
  [ -e "$dir/train.log" ] || rm -f "$dir"/*.ini  # nothing has run by it; a kill may have left half
  new=$(recipe "$@")
  if [ -e "$dir/recipe.ini" ] && [ "$new" != "$(cat "$dir/recipe.ini")" ]; then
    die "$dir was made with another recipe.ini than $recipes has now: remove it"
  fi
  mkdir -p "$dir"
  echo "$new" >"$dir/recipe.ini"
  listed+=("$dir")
}

# The options of a merge at 400 layers, by the name of its runs. Keel is norm(2 L X + F), DeepNorm norm((2 L)^(1/4) X
# + F): of a X + F RMSNorm sees X + F / a alone. Its own start has a gain of (8 L)^(-1/4).
merge() {
  case $1 in
    postnorm) echo "residual=postnorm" ;;
    mvsplit) ;;
    mvsplit-*) echo "${1#*-}" ;;
    layerscale-*) echo "residual=layerscale lambda=${1#*-}" ;;
    keel) echo "residual=rezero lambda=1.25e-3 fix=lambda writer-std=0" ;;
    deepnorm) echo "residual=rezero lambda=0.188 fix=lambda writer-std=0" ;;
    deepnorm-own) echo "residual=rezero lambda=0.188 fix=lambda xavier-gain=0.133" ;;
    *) die "no merge is called $1" ;;
  esac
}

# Sets what a recipe may: `columns` (of diagnostics.csv that the figures need), `bin` (steps a row of the
# losses), `pictures` and `spikes` (runs whose samples and spike report are kept), `reports` (not empty: a
# line of each spike report is packed), `tables` (further csv files in the runs' folders, without the .csv),
# and the functions `runs`, `draw`, `after` and `packed`; `after` gets the folder of a run that has trained
# to its end, with its weights.safetensors, and its exit status says whether that went well; `packed` is
# called when the csv files are there, and may choose `pictures` and `spikes` by them.
read_recipe() {
  experiment=$1 columns="" bin=5 pictures="" spikes="" reports="" tables="" without="" only=""
  after() { :; }
  packed() { :; }
  # shellcheck source=/dev/null
  source "$recipes/$1.sh"
}

# The scale's ini file with KEY=VALUE... in place of, or beside, what it says.
recipe() {
  printf '%s\n' "$@" | awk -F= '
    NR == FNR { key = $1; sub(/^[^=]*=/, ""); value[key] = $0; next }
    /^#/ { next }
    $1 in value { print $1 "=" value[$1]; delete value[$1]; next }
    { print }
    /^\[train\]/ { for (k in value) if (k == "keep" || k == "from") { print "#" k "=" value[k]; delete value[k] } }
    END { for (k in value) print k "=" value[k] | "sort" }' - "$base"
}

# --- How long it will take --------------------------------------------------------------------

# For the run in folder $1, of two runs of a few steps at 16 blocks, measured once a machine:
# milliseconds that a block takes a step, that diagnosing a block adds, and seconds that a run takes
# besides. They have the run's width and batch; without a GPU those of the small version, since the
# full one's would take minutes or hours. A larger block then counts by its operations, which is up to
# twice too much: wide ones are quicker at each.
measure_speed() {
  local speeds=$root/speed dir=$root/speed.tmp of=$1/recipe.ini size="" few plain diagnosed o
  if [ "$machine" = CPU ]; then of=${base/full/small}; fi
  few=(--config "$base" --depth 16 --steps 16 --log-every 8 --save weights --columns 1)
  for o in width heads ffn patch batch; do
    size+="$o=$(option $o "$of") " few+=("--$o" "$(option $o "$of")")
  done
  if [ "$(head -n 1 "$speeds" 2>/dev/null)" != "$name" ]; then echo "$name" >"$speeds"; fi
  if ! grep -qE "^${size}[0-9.]+ [0-9.]+ [0-9.]+$" "$speeds"; then
    rm -rf "$dir"
    mkdir "$dir"
    echo "measuring the speed of this machine, $name: $size"
    if ! plain=$(timed "${few[@]}" --out "$dir/plain") ||
       ! diagnosed=$(timed "${few[@]}" --out "$dir/diagnosed" --diagnose-every 1 --diagnose-layers all); then
      die "the speed of this machine was not measured: $(tail -n 1 "$dir/log")"
    fi
    rm -rf "$dir"
    awk -v size="$size" -v a="$plain" -v b="$diagnosed" 'BEGIN {
      split(a, p); split(b, d)
      other = p[2] - 36 * p[1] / 1000  # drawing and validating cost about 20 steps
      printf "%s%.4f %.4f %.1f\n", size, p[1] / 16, (d[1] > p[1] ? (d[1] - p[1]) / 16 : 0), (other > 0 ? other : 0) }' \
      >>"$speeds"
  fi
  read -r ms_layer ms_diagnosed startup <<<"$(sed -n "s/^$size//p" "$speeds" |
    awk -v a="$(operations "$1/recipe.ini")" -v b="$(operations "$of")" '{ print $1 * a / b, $2 * a / b, $3 }')"
}
# Milliseconds a step, and seconds of wall time, of a training run with these options; its exit status.
timed() {
  local start=$EPOCHREALTIME
  "$program" train "$@" >"$dir/log" 2>&1 || return
  awk -v a="$start" -v b="$EPOCHREALTIME" '
    { for (i = 2; i <= NF; i++) if ($i == "ms/step") ms = $(i - 1) }
    END { print ms, b - a }' "$dir/log"
}
# A number in proportion to the operations of a block and step with the sizes in the ini file $1.
operations() {
  awk -F= -v t="$(tokens_of "$1")" '{ o[$1] = $2 }
    END { d = o["width"]; print o["batch"] * t * d * (4 * d + 3 * o["ffn"] + 2 * t) }' "$1"
}

# Seconds that the run in folder $1 will take, at the speed that was measured last.
seconds_of() {
  local from
  from=$(option '#from' "$1/recipe.ini")
  awk -F= -v begun="${from:+$(option steps "${1%/*}/$from/recipe.ini")}" -v a="$ms_layer" -v b="$ms_diagnosed" -v other="$startup" '
    { sub(/^#/, ""); o[$1] = $2 }
    END {
      measured = o["diagnose-layers"] == "" ? 5 : o["diagnose-layers"] == "all" ? o["depth"] : split(o["diagnose-layers"], l, ",")
      every = o["diagnose-every"]; steps = o["steps"] - begun
      times = every ? steps / every : 0
      print other + (a * o["depth"] * (steps + 20) + b * measured * times) / 1000 }' "$1/recipe.ini"
}

anything_to_do() {
  local dir
  for dir in "${listed[@]}"; do [ -s "$dir/result" ] || return 0; done
  return 1
}

# Prints what will be run and for how long; ends the script instead if that is more than was asked for.
announce() {
  local dir total=0 n=0 seconds line lines=()
  for dir in "${listed[@]}"; do
    if [ -s "$dir/result" ]; then
      printf -v line '  %-44s done: %s' "${dir#"$root"/}" "$(result "$dir" result)"
    else
      measure_speed "$dir"
      seconds=$(seconds_of "$dir")
      printf -v line '  %-44s %5s steps of %4s layers  about %s' "${dir#"$root"/}" \
        "$(option steps "$dir/recipe.ini")" "$(option depth "$dir/recipe.ini")" "$(duration "$seconds")"
      total=$(awk -v a="$total" -v b="$seconds" 'BEGIN { printf "%.0f", a + b }') n=$((n + 1))
    fi
    lines+=("$line")
  done
  if [ -z "${YES:-}" ] && { [ -n "$not_quick" ] || { [ -z "${MINUTES:-}" ] && [ "$total" -gt 3600 ]; }; }; then
    refuse "about $(duration "$total") on this machine, $name"
  fi
  printf '%s\n' "${lines[@]}"
  echo "$n runs to do, about $(duration "$total") on this machine, $name (from the speeds in $root/speed, which" \
    "were measured; remove it to measure again: ms a layer and step, ms more where diagnosed, s a run besides)"
}

# Ends the script, which has begun nothing and leaves nothing, because of the time $1.
refuse() {
  local dir smaller=""
  [ "$SCALE" != full ] || smaller=", or QUICK=1 for a smaller version (of $quick)"
  for dir in "${listed[@]}"; do
    [ -e "$dir/train.log" ] || rm -f "$dir"/*.ini
    rmdir -p "$dir" 2>/dev/null || true  # what is empty
  done
  [ -z "$not_quick" ] ||
    die "$quick have a quick version,$not_quick not: in full it takes $1; to begin that say YES=1"
  die "this takes $1: to begin say YES=1, or MINUTES=60 for what an hour holds$smaller"
}

# --- Running -----------------------------------------------------------------------------------

# The value of key $2 in the result of the run in folder $1.
result() { sed -n "s/^$2=//p" "$1/result"; }

# mvsplit train in folder $1 with further options. The exit status is train's.
train() {
  local dir=$1 status=0
  shift
  "$program" train --config "$dir/recipe.ini" --resume --out "$dir" "${share[@]}" "$@" >>"$dir/train.log" 2>&1 ||
    status=$?
  return $status
}

# Runs what is listed, or goes on with it.
do_run() {
  local dir=$1 status=0 outcome=finished start=$SECONDS before=0 last from
  [ -s "$dir/result" ] && return
  # Without a state there is nothing to go on from: afresh.
  if [ ! -e "$dir/state.safetensors" ]; then
    find "$dir" -type f ! -name recipe.ini -delete
    from=$(option '#from' "$dir/recipe.ini")
    [ -z "$from" ] || branch_off "${dir%/*}/$from" "$dir" || { echo "$dir is left: $from is not over"; return 0; }
  fi
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
    *) last=$(tail -n 1 "$dir/train.log")
       echo "FAILED: ${last:-exit status $status and no word: is the disk full?}" >&2
       echo "$dir" >>"$root/failed"
       return ;;
  esac
  printf '%s\n' "result=$outcome" "seconds=$(cat "$dir/seconds")" "machine=$name" \
    "commit=$(git describe --always --dirty 2>/dev/null || echo unknown)" >"$dir/result.tmp"
  mv "$dir/result.tmp" "$dir/result"
  rm -f "$dir/seconds"
  [ "$(option '#keep' "$dir/recipe.ini")" = state ] || rm -f "$dir/state.safetensors"
  [ "$(option '#keep' "$dir/recipe.ini")" = weights ] || rm -f "$dir/weights.safetensors"
}

# The folder that says that a worker has taken the run in folder $1.
claim() { echo "$root/claims/$(echo "${1#"$root"/}" | tr / _)"; }

# Gives folder $2 the state and the logs of the run in folder $1, once this is over. A state of bf16 weights has
# master weights and moments in fp32: to go on in fp32 it needs no other change than to say so.
branch_off() {
  local at
  while [ ! -s "$1/result" ]; do  # another worker may be at it
    [ -d "$(claim "$1")" ] && [ "$at_once" -gt 1 ] && ! grep -qxs "$1" "$root/failed" || return 1
    sleep 1
  done
  cp "$1/config.ini" "$1/log.csv" "$2" && cp "$1/state.safetensors" "$2/state.tmp" || return 1
  if [ "$(option precision "$2/recipe.ini")" = fp32 ]; then
    at=$(head -c 4096 "$2/state.tmp" | grep -abo '"precision":"bf16"' | cut -d: -f1)
    [ -z "$at" ] || printf fp32 | dd of="$2/state.tmp" bs=1 seek=$((at + 13)) conv=notrunc 2>/dev/null
  fi
  mv "$2/state.tmp" "$2/state.safetensors"
}

# Makes the run in folder $1 again, bit for bit the same, with every step diagnosed from $3 steps before step $2
# to $4 after it (not with decay-steps, which hang on the run's end), and options of train for that; puts the rows among those of the run's diagnostics.csv.
diagnose_event() {
  local run=$1 dir=$1/event first last steps
  steps=$(option steps "$1/recipe.ini")
  first=$(($2 > $3 ? $2 - $3 : 1)) last=$(($2 + $4 < steps ? $2 + $4 : steps))
  rm -rf "$dir"
  mkdir "$dir" && cp "$run/recipe.ini" "$dir" &&
    train "$dir" --steps $((first - 1)) && train "$dir" --steps $last --diagnose-every 1 "${@:5}" &&
    cmp "$dir/log.csv" <(head -n $((last + 1)) "$run/log.csv") &&
    {
      grep '^[^0-9]' "$dir/diagnostics.csv"
      rows "$run" 1 $((first - 1)) && rows "$dir" $first $last && rows "$run" $((last + 1)) "$steps"
    } >"$run/merged" && mv "$run/merged" "$run/diagnostics.csv" && rm -r "$dir" &&
    bash data/page.sh "$run"
}
# The diagnostics of the run in folder $1 from step $2 to step $3, if it has any.
rows() {
  [ ! -e "$1/diagnostics.csv" ] || awk -F, -v from="$2" -v to="$3" '/^[0-9]/ && $1 >= from && $1 <= to' "$1/diagnostics.csv"
}

# All that is listed, JOBS runs at a time.
run_all() {
  local i pid pids=() status=0
  gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l) at_once=${JOBS:-1} share=()
  rm -rf "$root/claims"
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
    export OMP_NUM_THREADS=$(((processors + at_once - 1) / at_once))
  fi
  for dir in "${listed[@]}"; do
    [ ! -s "$dir/result" ] || continue
    if [ -n "${MINUTES:-}" ]; then
      measure_speed "$dir"
      awk -v s="$(seconds_of "$dir")" -v n="$side_by_side" -v left=$((60 * MINUTES - SECONDS)) \
        'BEGIN { exit (s * n > left) }' || continue
    fi
    mkdir "$(claim "$dir")" 2>/dev/null || continue
    do_run "$dir"
  done
}

# --- Packing what came out ----------------------------------------------------------------------

# What became of a run, from the loss. Two predictions know nothing of the image: the mean of all pixels
# costs 1.44 (`floor`), each position's own average 1.2665. All means are over 25 steps.
#   trained    it ended at most 0.1 above its best
#   relapsed   it ended further above its best, but not above 1.0
#   failed     it ended above 1.0
#   plateau    it failed and ended within 0.03 of 1.2665
# One that had been 0.1 below the floor and ended above half of the way back from its best has the step of
# its collapse: the first that is above that half, as is the mean from there on.
# Prints outcome, loss at the end, best loss, step of the collapse, largest norm after step 50 and its step.
judge() {
  awk -F, -v floor=1.44 'NR > 1 && $2 ~ /^[0-9.e+-]+$/ { loss[++n] = $2; if ($1 > 50 && $3 > norm) { norm = $3; at = $1 } }
    function mean(from,  i, s) { for (i = from; i < from + 25; i++) s += loss[i]; return s / 25 }
    END {
      if (n < 25) { print "short,nan,nan,," norm "," at; exit }
      best = mean(1); where = 1; end = mean(n - 24)
      for (i = 2; i <= n - 24; i++) if ((m = mean(i)) < best) { best = m; where = i }
      half = (best + floor) / 2
      outcome = end > 1.2365 && end < 1.2965 ? "plateau" : end > 1 ? "failed" : end - best > 0.1 ? "relapsed" : "trained"
      if (best <= floor - 0.1 && end > half) {
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
      else printf "%.1f,%.0f,%s\n", quantile(ms, n, 0.5), quantile(tokens, n, 0.5), (hfu[1] == "" ? "" : quantile(hfu, n, 0.5)) }' "$1"
}

# Makes $csv/$experiment_$1.csv.gz.tmp of standard input, the rows of the runs that are over here, and of
# those packed before of the recipe's other runs; in the recipe's order (the same bytes for the same numbers).
pack() {
  local packed=$csv/${experiment}_$1.csv.gz
  { [ ! -e "$packed" ] || gzip -dc "$packed"; echo; cat; } | awk -F, -v names="${listed[*]##*/}" '
    BEGIN { here = 0 }
    NF == 0 && !here { here = 1; next }
    !header[here] { header[here] = $0; next }
    { line[++n] = $0 }
    !(($1, here) in first) { first[$1, here] = n }
    { last[$1, here] = n }
    END {
      if (header[1] == "") header[1] = header[0]  # no run here has such a file
      print header[1]
      m = split(names, name, " ")
      for (i = 1; i <= m; i++) {
        which = (name[i], 1) in first
        if (which || ((name[i], 0) in first && header[0] == header[1]))
          for (j = first[name[i], which]; j <= last[name[i], which]; j++) print line[j] } }' |
    gzip -9n >"$packed.tmp"
}

# The csv files of an experiment from the folders of its runs that are over. They take their places when all
# are whole.
pack_runs() {
  local dir file over=()
  for dir in "${listed[@]}"; do [ ! -s "$dir/result" ] || over+=("$dir"); done
  {
    echo "run,depth,lr,steps,outcome,loss,best,collapse,norm,norm_step,validation,seconds,machine,commit,tokens,ms,tokens_per_s,hfu"
    for dir in "${over[@]}"; do
      local c=$dir/recipe.ini verdict
      verdict=$(judge "$dir/log.csv")
      [ "$(result "$dir" result)" = finished ] || verdict=diverged,${verdict#*,}
      echo "${dir##*/},$(option depth "$c"),$(option lr "$c"),$(option steps "$c"),$verdict,$(
        tail -n 1 "$dir/validation.csv" | awk -F, '$1 ~ /^[0-9]/ { printf "%.4f", $2 }'),$(
        result "$dir" seconds),$(result "$dir" machine | tr ',' ';'),$(result "$dir" commit),$(tokens_of "$c"),$(pace "$dir/train.log")"
    done
  } | pack runs
  {
    echo "run,step,loss,norm"
    for dir in "${over[@]}"; do
      awk -F, -v run="${dir##*/}" -v bin="$bin" 'NR > 1 {
        sum += $2; if ($3 > norm) norm = $3
        if (++n == bin) { printf "%s,%d,%.4f,%.4g\n", run, $1, sum / n, norm; n = sum = norm = 0 } }' "$dir/log.csv"
    done
  } | pack losses
  [ -z "$columns" ] || {
    echo "run,step,layer,$(echo "${columns:?}" | xargs | tr ' ' ',')"
    for dir in "${over[@]}"; do
      [ ! -e "$dir/diagnostics.csv" ] || awk -F, -v run="${dir##*/}" -v want="$columns" '
        /^#/ { next }
        !n { n = split(want, w, " "); for (i = 1; i <= NF; i++) at[$i] = i; next }
        { printf "%s,%d,%d", run, $1, $2
          for (i = 1; i <= n; i++) printf ",%.4g", $at[w[i]]
          print "" }' "$dir/diagnostics.csv"
    done
  } | pack diagnostics
  # The spike reports, a line each; an empty one for a run that has none.
  [ -z "$reports" ] || {
    echo "run,step,times,verdict,writer,layer,g_mean,g_ctr"
    for dir in "${over[@]}"; do
      find "$dir" -maxdepth 1 -name 'spike_*.txt' | sort | xargs -r awk -v run="${dir##*/}" '
        FNR == 1 { printf "%s,%d,%s,", run, $4, $9 }
        FNR == 2 { split($0, part, ": "); split(part[3], w, " "); printf "%s,%s,%s,%s,%s\n", part[2], w[3], w[6], w[8], w[14] }' |
        grep . || echo "${dir##*/},,,,,,,"
    done
  } | pack reports
  local table
  for table in $tables; do
    for dir in "${over[@]}"; do
      [ ! -e "$dir/$table.csv" ] || awk -v run="${dir##*/}" '
        /^#/ { next }
        { print (named++ ? run : "run") "," $0 }' "$dir/$table.csv"
    done | awk 'NR == 1 || !/^run,/' | pack "$table"
  done
  for file in "$csv/${experiment}"_*.csv.gz.tmp; do mv "$file" "${file%.tmp}"; done
  packed
  keep_files
}

# Pictures of the runs named in `pictures`; of those in `spikes` the report nearest to the event. Both
# are small, and kept as they are.
keep_files() {
  local dir run step
  for dir in "${over[@]}"; do
    run=${dir##*/}
    case " ${pictures} " in
      *" $run "*) [ ! -e "$dir/samples.png" ] || cp "$dir/samples.png" "$figures/${experiment}_$run.png" ;;
    esac
    case " ${spikes} " in
      *" $run "*)
        step=$(judge "$dir/log.csv" | awk -F, '{ print ($4 == "" ? $6 : $4) }')
        find "$dir" -maxdepth 1 -name 'spike_*.txt' |
          awk -F'[_.]' -v at="$step" '{ away = $(NF - 1) - at; print (away < 0 ? -away : away), $0 }' |
          sort -g | awk 'NR == 1 { print $2 }' |
          while read -r report; do cp "$report" "$csv/${experiment}_${run}_spike.txt"; done ;;
    esac
  done
}

# --- All of it -----------------------------------------------------------------------------------

main() {
  local names=("$@") one listed=() not_quick="" o dir left
  [ $# -gt 0 ] || die "NAME is one of $all, or all"
  for o in QUICK REDRAW YES; do [ "${!o:-0}" != 0 ] || printf -v "$o" ''; done
  for o in JOBS MINUTES; do
    [[ ${!o:-1} =~ ^[1-9][0-9]{0,5}$ ]] || die "$o is a whole number from 1 on, not ${!o}"
  done
  SCALE=${SCALE:-${QUICK:+quick}}
  SCALE=${SCALE:-full}
  if [ "$*" = all ]; then
    if [ "$SCALE" = quick ]; then read -ra names <<<"$quick"; else read -ra names <<<"$all"; fi
  fi
  for one in "${names[@]}"; do
    is_in "$one" "$all" || die "there is no experiment $one, but $all"
    [ "$SCALE" != quick ] || is_in "$one" "$quick" || not_quick+=" $one"
  done
  if [ -n "$not_quick" ]; then
    [ -z "$REDRAW" ] || die "$quick have a quick version,$not_quick not: REDRAW=1 without QUICK=1"
    SCALE=full
  fi
  choose_scale
  # Two at once would take the same runs. The lock is its holder's and its runs', and ends with the last.
  if [ -z "$REDRAW" ] && command -v flock >/dev/null; then
    exec 9>"$root/lock"
    flock -w 2 9 || die "another is at work in $root: wait for its end, or stop it"
  fi
  [ -n "$REDRAW" ] || rm -f "$root/failed"
  if [ -n "${TABLES:-}" ]; then
    gnuplot() { cat >/dev/null; }
  elif ! command -v gnuplot >/dev/null; then
    echo "gnuplot is missing: no figures are drawn, but tables are made" >&2
    gnuplot() { cat >/dev/null; }
  fi
  # shellcheck source=data/experiments/draw.sh
  source "$recipes/draw.sh"
  for one in "${names[@]}"; do
    read_recipe "$one"
    runs
  done
  if [ -z "$REDRAW" ] && anything_to_do; then
    [ -x "$program" ] || die "$program is missing: make"
    announce
    run_all
  fi
  for one in "${names[@]}"; do
    listed=()
    read_recipe "$one"
    runs
    left=$(for dir in "${listed[@]}"; do [ -s "$dir/result" ] || echo "$dir"; done | wc -l)
    [ "$left" = 0 ] || echo "$one: $left of ${#listed[@]} runs are left: the same command goes on with them"
    [ "$left" = ${#listed[@]} ] || pack_runs
    if [ "$one" != law ] && [ ! -e "$csv/${one}_runs.csv.gz" ]; then
      printf '### %s\n\nNo run is packed yet.\n' "$one"
      continue
    fi
    draw_all
  done
  [ -n "$REDRAW" ] || [ ! -s "$root/failed" ] || die "these runs failed: $(xargs <"$root/failed")"
}

# Markdown with its paragraphs filled up to 100 columns; tables, headings, figures as they are.
wrapped() {
  awk 'function flush() { if (line != "") print line; line = "" }
    /^([|#!].*)?$/ { flush(); print; next }
    { for (i = 1; i <= NF; i++) {
        if (line != "" && length(line) + 1 + length($i) > 100) flush()
        line = line (line == "" ? "" : " ") $i } }
    END { flush() }'
}

# The figures and the Markdown of an experiment, the latter also into $root/NAME.md.
draw_all() {
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  { echo "### $experiment"; echo; draw; } | wrapped | tee "$root/$experiment.md.tmp"
  mv "$root/$experiment.md"{.tmp,}
  rm -rf "$work"
}

main "$@"

#!/usr/bin/env bash
# Builds and tests in bare Debian 12, 13 and sid and Ubuntu 24.04 (those that this machine's apt has a
# mirror of), with the compilers of each, and prints a table. As root: debootstrap makes the systems,
# in $CHROOTS, where they stay for the next time.
#   distros.sh [SUITE[:COMPILER]]...     GOAL=all: build the program only, in place of every test
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
cd "$(dirname "$0")/.."
declare -A names=([bookworm]="Debian 12" [trixie]="Debian 13" [sid]="Debian sid" [noble]="Ubuntu 24.04")
chroots=${CHROOTS:-/var/tmp/mvsplit-distros} goal=${GOAL:-test} root=
[ "$(id -u)" -eq 0 ] && mkdir -p "$chroots" || { echo "distros.sh is for root" >&2; exit 2; }
exec {lock}>"$chroots/lock" && flock -n "$lock" || { echo "distros.sh runs already" >&2; exit 2; }
command -v debootstrap >/dev/null || { apt-get update && apt-get install -y debootstrap; } >/dev/null ||
  { echo "please install debootstrap" >&2; exit 1; }

# The first mirror of the distribution $1 in this machine's own list of sources.
mirror() {
  cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | sed 's/#.*//' |
    grep -oE "https?://[^ ]*/$1/?( |$)" | head -n 1 | tr -d ' '
}
inside() {
  env -i ${http_proxy:+http_proxy="$http_proxy"} PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
    chroot "$root" "$@"
}
remove() {
  [ -z "$root" ] || { umount "$root/proc" "$root/dev/pts" 2>/dev/null; rm -rf --one-file-system "$root"; }
}
trap remove EXIT

# A bare system of the suite $1 with what README's first line installs, and this tree in it.
prepare() {
  local system=$chroots/$1 distribution=debian components=main from
  [ "$1" != noble ] || distribution=ubuntu components=main,universe
  from=$(mirror $distribution)
  [ -n "$from" ] || { echo "no mirror" && return 1; }
  if [ ! -e "$system.ready" ]; then
    rm -rf --one-file-system "$system"
    debootstrap --variant=minbase --include=ca-certificates --components=$components "$1" "$system" \
      "$from" >"$system.log" 2>&1 || { echo "debootstrap failed: $system.log" && return 1; }
    touch "$system.ready"
  fi
  remove
  cp -a --reflink=auto "$system" "$root" && mount -t proc proc "$root/proc" &&
    mount --bind /dev/pts "$root/dev/pts" &&
    apt-config dump Acquire >"$root/etc/apt/apt.conf.d/99machine" &&  # its proxy, if it has one
    { inside apt-get update && inside apt-get install -y git make; } >"$system.log" 2>&1 &&
    mkdir "$root/mv split" && git ls-files -z | tar -c --null -T - | tar -x -C "$root/mv split" ||
    { echo "no system: $system.log" && return 1; }
}
version() { inside dpkg-query -W "$1" 2>/dev/null | sed 's/.*\t//; s/^[0-9]*://; s/[-+].*//; s/.*really\.//'; }

table=("distribution|compiler|CLI11|nlohmann|gtest|result") bad=0
for suite in bookworm trixie sid noble; do
  [ $# -eq 0 ] || [[ " $*" = *" $suite"* ]] || continue
  root=$chroots/$suite.tested
  if ! why=$(prepare $suite); then
    table+=("${names[$suite]}|||||skipped: $why")
    continue
  fi
  for compiler in g++ g++-13 g++-14 g++-15 clang++; do
    [ $# -eq 0 ] || [[ " $* " = *" $suite "* || " $* " = *" $suite:$compiler "* ]] || continue
    package=${compiler/clang++/clang}
    [[ $(inside apt-cache show "$package" 2>/dev/null) = *"Package: $package"[[:space:]]* ]] || continue
    [[ $compiler = g++ || $(inside apt-cache depends g++) != *"Depends: $compiler"* ]] || continue
    log=$chroots/$suite-$compiler.log
    echo "${names[$suite]}, $compiler: $log"
    inside sh -c "cd '/mv split' && make clean && make $goal CXX=$compiler" >"$log" 2>&1 </dev/null
    status=$?
    result=$(grep -E '^[0-9]+ passed, ' "$log" | tail -n 1)
    [ $status -eq 0 ] || bad=1 result=${result:-$(grep -m 1 -iE 'error|please' "$log")}
    warnings=$(grep -c 'warning:' "$log")
    [ "$warnings" -eq 0 ] || bad=1 result+=", $warnings warnings"
    number=$(inside $compiler --version 2>/dev/null | grep -oE -m 1 '[0-9]+\.[0-9.]+' | head -n 1)
    table+=("${names[$suite]}|$compiler $number|$(version libcli11-dev)|$(version nlohmann-json3-dev)|$(
      version libgtest-dev)|${result:-built}")
  done
done
printf '%s\n' "${table[@]}" | column -t -s '|'
exit $bad

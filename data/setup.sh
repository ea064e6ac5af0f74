#!/usr/bin/env bash
# Installs what building and drawing need, or says in one line what to install. Quick when all is there.
set -euo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas

missing=()
command -v g++ >/dev/null || missing+=(g++)
has() { echo "#include <$1>" | g++ -E -x c++ - >/dev/null 2>&1; }
need() { has "$1" || missing+=("$2"); }
if [ ${#missing[@]} -eq 0 ]; then
  need gtest/gtest.h libgtest-dev
  need CLI/CLI.hpp libcli11-dev
  need nlohmann/json.hpp nlohmann-json3-dev
  need stb/stb_image_write.h libstb-dev
  need zlib.h zlib1g-dev
else
  missing+=(libgtest-dev libcli11-dev nlohmann-json3-dev libstb-dev zlib1g-dev)
fi
required=${#missing[@]}
command -v gnuplot >/dev/null || missing+=(gnuplot-nox)  # for the curves alone
[ ${#missing[@]} -gt 0 ] || exit 0

run=()
if [ "$(id -u)" -ne 0 ]; then
  if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then run=(sudo); else run=(false); fi
fi
export DEBIAN_FRONTEND=noninteractive
install() { "${run[@]}" apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1; }
if command -v apt-get >/dev/null && [ "${run[*]:-}" != false ]; then
  echo "installing ${missing[*]}"
  install || { "${run[@]}" apt-get update >/dev/null 2>&1 && install; } && exit 0
fi
if [ "$required" -eq 0 ]; then
  echo "gnuplot is missing, so curves are not drawn: install the package gnuplot-nox"
  exit 0
fi
echo "please install: apt-get install ${missing[*]}" >&2
exit 1

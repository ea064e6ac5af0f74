#!/usr/bin/env bash
# Installs what building with $CXX and drawing need, or says in one line what to install. Quick when all
# is there.
set -euo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
CXX=${CXX:-g++} name=${CXX##*[/ ]}  # g++-13 of "ccache /opt/bin/g++-13"
case $name in  # Debian's package has the compiler's name, but for these
  c++) compiler=g++ ;;
  clang++*) compiler=clang${name#clang++} ;;
  *) compiler=$name ;;
esac
compiles() { $CXX -std=c++17 "$@" -E -x c++ /dev/null >/dev/null 2>&1; }

missing=()
if ! compiles -include filesystem; then
  if command -v "${CXX##* }" >/dev/null; then
    echo "$CXX does not compile C++17: take g++ or clang++ 9 or later, as in make CXX=g++-13" >&2
    exit 1
  fi
  missing+=("$compiler")
fi
headers=(gtest/gtest.h CLI/CLI.hpp nlohmann/json.hpp stb/stb_image_write.h zlib.h)
packages=(libgtest-dev libcli11-dev nlohmann-json3-dev libstb-dev zlib1g-dev)
compiles "${headers[@]/#/-include}" || for i in "${!headers[@]}"; do
  compiles -include "${headers[i]}" || missing+=("${packages[i]}")
done

root=()
[ "$(id -u)" -eq 0 ] || root=(sudo -n)
apt() { DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get "$@" >/dev/null 2>&1; }
add() {  # by exact names: apt-get takes the + of g++-15 for a pattern's
  local names=("${@//+/\\+}")
  names=("${names[@]/#/^}")
  apt install -y --no-install-recommends "${names[@]/%/\$}"
}
install() {
  command -v apt-get >/dev/null && "${root[@]}" true 2>/dev/null || return 1
  echo "installing $*"
  add "$@" || { apt update && add "$@"; }
}
if [ ${#missing[@]} -gt 0 ] && ! install "${missing[@]}"; then
  echo "please install: apt-get install ${missing[*]}" >&2
  command -v apt-get >/dev/null || echo "(elsewhere: dnf install gcc-c++ gtest-devel cli11-devel" \
    "json-devel stb-devel zlib-devel; pacman -S gcc gtest cli11 nlohmann-json stb zlib; brew install" \
    "googletest cli11 nlohmann-json libomp, and stb's headers)" >&2
  exit 1
fi
wish() { install "$1" || echo "$2: install the package $1"; }
command -v gnuplot >/dev/null || wish gnuplot-nox "gnuplot is missing, so curves are not drawn"
[[ $name != clang++* ]] || compiles -fopenmp -include omp.h ||
  wish "libomp${compiler#clang}-dev" "$CXX has no OpenMP, so one processor does all the work"

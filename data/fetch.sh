#!/usr/bin/env bash
# Puts the four files of Fashion-MNIST into data/downloads, checked. A second call does nothing.
#
# Sources, in this order: the installed Debian or Ubuntu package dataset-fashion-mnist; the same
# package, downloaded and unpacked without root; the data set's public repository.
# The sums are of the decompressed bytes: the package's .gz files were packed anew and differ from
# the repository's in their headers (no name, no date), while what they hold is the same.
set -euo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas

package=dataset-fashion-mnist
installed=/usr/share/datasets/fashion-mnist
url=https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/downloads
declare -A sums=(
  [train-images-idx3-ubyte.gz]=c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
  [train-labels-idx1-ubyte.gz]=bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
  [t10k-images-idx3-ubyte.gz]=5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
  [t10k-labels-idx1-ubyte.gz]=0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34
)

# Are all four files in the folder $1, and right?
complete() {
  local name sum
  for name in "${!sums[@]}"; do
    sum=$(gzip -dc < "$1/$name" 2> /dev/null | sha256sum) || return 1
    [ "${sum%% *}" = "${sums[$name]}" ] || return 1
  done
} 2> /dev/null

# Unpacks the package below the folder $1, with no need of root but for an outdated package list.
unpack_package() (
  command -v apt-get > /dev/null && command -v dpkg > /dev/null || return 1
  cd "$1" || return 1
  if ! apt-get download "$package"; then
    if [ "$(id -u)" = 0 ]; then
      apt-get update
    else
      sudo -n apt-get update
    fi && apt-get download "$package"
  fi && dpkg -x "$package"_*.deb .
) > /dev/null 2>&1

# Downloads the four files into the folder $1.
download() {
  local name
  for name in "${!sums[@]}"; do
    if command -v curl > /dev/null; then
      curl -fsSL --retry 3 --connect-timeout 20 -o "$1/$name" "$url/$name" || return 1
    else
      wget -q --tries=3 --timeout=20 -O "$1/$name" "$url/$name" || return 1
    fi
  done
} 2> /dev/null

complete "$folder" && exit 0
mkdir -p "$folder"
if complete "$installed"; then
  for name in "${!sums[@]}"; do ln -sf "$installed/$name" "$folder/$name"; done
  echo "Fashion-MNIST: linked from $installed"
  exit 0
fi

# Beside their place, so that moving them is one step: a file in data/downloads is a whole file.
temporary=$(mktemp -d "$folder/.fetch.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
if unpack_package "$temporary" && complete "$temporary$installed"; then
  found=$temporary$installed origin="the package $package"
elif download "$temporary" && complete "$temporary"; then
  found=$temporary origin=$url
else
  echo "Fashion-MNIST could not be fetched: install the package $package (apt-get install" \
    "$package), or put ${!sums[*]} from $url into $folder." >&2
  exit 1
fi
for name in "${!sums[@]}"; do mv -f "$found/$name" "$folder/$name"; done
echo "Fashion-MNIST: fetched from $origin into $folder"

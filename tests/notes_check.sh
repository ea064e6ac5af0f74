#!/usr/bin/env bash
# The table "Where each equation is" in NOTES.md against the code: every file, section, function and
# test that it names must exist where it says, every row must name both code and a test, and every
# test of a statement must be in it. A name stands in backticks after its file; Suite.* means any
# test of the suite. Exit status 1 and a line a fault otherwise.
set -uo pipefail
export LC_ALL=C.UTF-8  # decimal points, not commas
notes=${1:-NOTES.md} faults=0
fault() {
  echo "$notes: $1"
  faults=$((faults + 1))
}

# Calls are indented: a line that begins in column 0 and has "name(" defines it, or declares a type.
has_function() { grep -qE "^([A-Za-z_].*[ *&]$2\(|(struct|class|enum class) $2\b)" "$1"; }
has_test() {
  local suite=${2%%.*} name=${2#*.}
  [ "$name" = '*' ] && name='\w+'
  grep -qE "^TEST(_F)?\($suite, $name\)" "$1"
}

# check_cell CELL EQUATION: counts in `named` what the cell names.
check_cell() {
  local file='' item
  named=0
  while read -r item; do
    case $item in
      *.cu | *.h) file=$item; [ -f "$file" ] || file=data/$item ;;
      *_test) file=tests/$item.cu ;;
    esac
    if [ ! -f "$file" ]; then
      fault "$2: there is no file '$file'"
      return
    fi
    case $item in
      section*) grep -qE "^// ${item#section }\.? " "$file" || fault "$2: $file has no $item" ;;
      '`'*)
        item=${item//\`/}
        case $file in
          tests/*) has_test "$file" "$item" ;;
          *) has_function "$file" "$item" ;;
        esac || fault "$2: $file has no '$item'"
        ;;
      *) continue ;;
    esac
    named=$((named + 1))
  done < <(grep -oE '`[^`]+`|[a-z]+\.(cu|h)|[a-z]+_test|section [0-9]+(\.[0-9]+)?' <<<"$1")
  [ "$named" -gt 0 ] || fault "$2: a cell names nothing"
}

table=$(sed -n '/^## Where each equation is/,/^## How/p' "$notes" | grep '^| ' | tail -n +2)
[ -n "$table" ] || fault "no table \"Where each equation is\""
while IFS='|' read -r _ equation code tests _; do
  check_cell "$code" "$equation"
  check_cell "$tests" "$equation"
done <<<"$table"
while read -r name; do
  grep -qE "Statement\.(\*|$name\b)" <<<"$table" || fault "Statement.$name is not in the table"
done < <(sed -nE 's/^TEST\(Statement, (\w+)\).*/\1/p' tests/*_test.cu)
[ "$faults" -eq 0 ]

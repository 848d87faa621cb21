#!/bin/sh
# Packs a directory of models into archives, as a trainyard task. It needs jq, tar
# and gzip. To try it:
#
#   export SOURCE_DIR=examples BACKUP_DIR=/tmp/backups
#   echo '{"directory":"data"}' | sh examples/shell/backup.sh
#
# The request's `directory` is the name of a directory in SOURCE_DIR. Each entry of
# it becomes an archive in BACKUP_DIR/<job id>. SOURCE_DIR and BACKUP_DIR are the
# task's `env`: where to read and write is not for a request to choose.
#
# There is no checkpoint, since what is already packed shows how far it came: an
# archive gets its name when it is whole, and a later attempt skips it.
#
# Exit codes: 0 done, 65 the request is wrong, 78 the worker lacks something, 66
# there is nothing to pack, 75 stopped. Trainyard tries again after the last two.
set -eu

fail() { # EXIT_CODE WORD...
  code=$1
  shift
  echo "backup: $*" >&2
  exit "$code"
}

command -v jq >/dev/null || fail 78 "jq is not installed"
for setting in "${SOURCE_DIR:-}" "${BACKUP_DIR:-}"; do
  [ -n "$setting" ] || fail 78 "SOURCE_DIR and BACKUP_DIR must be set"
done

# All of stdin is the request. The name is held against a pattern before it is used,
# and quoted wherever it is.
name=$(jq -r 'select(keys - ["name", "directory"] == []).directory | strings' 2>/dev/null) || name=
case $name in
'' | .* | -* | *[!A-Za-z0-9._-]*) fail 65 'the request must be {"directory":"NAME"}, a plain name' ;;
esac
set -- "$SOURCE_DIR/$name"/*
[ -e "$1" ] || fail 66 "there is no directory $name, or it is empty"

# A job's id is the same at each attempt, and no other job has it. The attempt is in
# the partial file's name in case an earlier one, cut off, still runs somewhere.
target=$BACKUP_DIR/${TRAINYARD_JOB_ID:-by-hand}
partial=$target/.partial-${TRAINYARD_ATTEMPT:-1}-$$
mkdir -p "$target"

# A shell runs a trap only between commands, but `wait` ends at once. So what takes
# long runs in the background, and the trap ends it.
tar=
packed=0
stop() {
  [ -z "$tar" ] || kill "$tar" 2>/dev/null || true
  rm -f "$partial"
  fail 75 "stopped after $packed of $#"
}
trap 'stop "$@"' TERM INT

for entry in "$@"; do
  archive=$target/${entry##*/}.tar.gz
  if [ ! -e "$archive" ]; then
    tar -C "$SOURCE_DIR/$name" -czf "$partial" -- "${entry##*/}" &
    tar=$!
    wait "$tar" || fail 1 "tar could not pack $entry"
    tar=
    mv "$partial" "$archive"
  fi
  packed=$((packed + 1))
  progress=$(awk "BEGIN { print $packed / $# }")
  printf '@trainyard {"progress":%s,"step":%d}\n' "$progress" "$packed"
done
# A path may hold what JSON must escape: jq does it.
result=$(jq -cn --arg to "$target" --argjson count "$#" '{result: {archives: $count, to: $to}}')
printf '@trainyard %s\n' "$result"

#!/bin/sh
# A trainyard task that packs a directory of models into archives. It needs jq, tar
# and gzip. To try it:
#
#   export SOURCE_DIR=examples BACKUP_DIR=/tmp/backups
#   echo '{"directory":"data"}' | sh examples/shell/backup.sh
#
# The request's `directory` names a directory in SOURCE_DIR. Each of its entries
# becomes an archive in BACKUP_DIR/<job id>. The task's `env` sets SOURCE_DIR and
# BACKUP_DIR, so that a request cannot choose them.
#
# It needs no checkpoint: an archive gets its final name when it is complete, and a
# later attempt skips it.
#
# Exit codes: 0 done, 65 invalid request, 78 missing program or setting, 66 nothing to
# pack, 75 stopped. Trainyard retries after the last two.
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

# Stdin is the request. The name is matched against a pattern before use, and always
# quoted.
name=$(jq -r 'select(keys - ["name", "directory"] == []).directory | strings' 2>/dev/null) || name=
case $name in
'' | .* | -* | *[!A-Za-z0-9._-]*) fail 65 'the request must be {"directory":"NAME"}, a plain name' ;;
esac
set -- "$SOURCE_DIR/$name"/*
[ -e "$1" ] || fail 66 "there is no directory $name, or it is empty"

# All attempts of a job share its id. The partial file's name has the attempt, in case
# an earlier attempt still runs elsewhere.
target=$BACKUP_DIR/${TRAINYARD_JOB_ID:-by-hand}
partial=$target/.partial-${TRAINYARD_ATTEMPT:-1}-$$
mkdir -p "$target"

# A shell runs a trap only between commands, but a signal ends `wait` at once. So tar
# runs in the background, and the trap kills it.
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
# jq escapes the path for JSON.
result=$(jq -cn --arg to "$target" --argjson count "$#" '{result: {archives: $count, to: $to}}')
printf '@trainyard %s\n' "$result"

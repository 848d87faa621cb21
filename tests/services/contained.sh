#!/usr/bin/env bash
# Runs a command so that nothing of it is left behind, however it ends.
#
#   contained.sh COMMAND [ARGUMENT...]
#
# TMPDIR is a directory of its own, removed at the end. Processes that COMMAND has
# started and that outlive it are killed; they are known by a variable that they
# inherit (on Linux). So it is, too, when COMMAND or this script is killed with -9.
#
# The exit code is COMMAND's.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/services/common.sh
. "$here/common.sh"

[ $# -gt 0 ] || {
  echo "usage: ${0##*/} COMMAND [ARGUMENT...]" >&2
  exit 2
}

dir=$(mktemp -d "${TMPDIR:-/tmp}/trainyard-test.XXXXXX")
# A server's user must be able to pass, see common.sh.
chmod 711 "$dir"
command_pid=
watcher=

# Those that live, by id.
descendants() {
  local process
  for process in /proc/[0-9]*; do
    if grep -qsxzF "CONTAINED_IN=$dir" "$process/environ"; then
      echo "${process#/proc/}"
    fi
  done
}

kill_descendants() {
  local pid signal waited
  for ((waited = 0; waited < 100; waited++)); do
    [ -n "$(descendants)" ] || return 0
    for pid in $(descendants); do
      signal=KILL
      # Killed, it would leave shared memory behind; it has five seconds.
      case $(cat "/proc/$pid/comm" 2>/dev/null) in
        postgres) [ "$waited" -ge 50 ] || signal=QUIT ;;
      esac
      kill "-$signal" "$pid" 2>/dev/null || true
    done
    sleep 0.1
  done
  say "processes of ${dir##*/} do not end: $(descendants | tr '\n' ' ')"
}

clean_up() {
  kill_descendants
  rm -rf -- "$dir"
}

# shellcheck disable=SC2317 # It is run, by the trap.
on_exit() {
  local code=$?
  # Nothing may cut the clean-up short.
  trap '' INT TERM HUP
  trap - EXIT
  clean_up
  [ -z "$watcher" ] || kill -KILL -- "-$watcher" 2>/dev/null || true
  exit "$code"
}

# shellcheck disable=SC2317 # It is run, by the traps.
on_signal() {
  trap '' INT TERM HUP
  if [ -n "$command_pid" ]; then
    kill -TERM -- "-$command_pid" 2>/dev/null || true
    for _ in $(seq 100); do
      kill -0 -- "-$command_pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL -- "-$command_pid" 2>/dev/null || true
  fi
  exit $((128 + $1))
}

trap on_exit EXIT
trap 'on_signal 1' HUP
trap 'on_signal 2' INT
trap 'on_signal 15' TERM

# A killed script (kill -9) cleans nothing up, so a second process watches for
# its end. Its own process group keeps it from being killed along.
watch_for_our_end() {
  local runner=$$
  set -m
  (
    trap '' INT TERM HUP
    trap - EXIT
    while kill -0 "$runner" 2>/dev/null; do sleep 1; done
    [ ! -d "$dir" ] || clean_up
  ) </dev/null >/dev/null 2>&1 &
  watcher=$!
  set +m
  disown
}

watch_for_our_end
code=0
contained=(env "CONTAINED_IN=$dir" "TMPDIR=$dir" "$@")
if [ -t 0 ]; then
  # At a terminal the command keeps it, and Ctrl-C reaches the command itself.
  "${contained[@]}" || code=$?
else
  # In the background, because bash puts off its traps while it waits for a
  # command in the foreground; in a group of its own (set -m), because a signal
  # is passed on to everything that the command has started.
  set -m
  "${contained[@]}" <&0 &
  command_pid=$!
  set +m
  wait "$command_pid" || code=$?
  command_pid=
fi
exit "$code"

#!/usr/bin/env bash
# Runs a command with the services that the tests talk to, and stops them after.
#
#   run.sh COMMAND [ARGUMENT...]
#
# COMMAND finds them by
#   TRAINYARD_TEST_DATABASE_URL     postgres://…, a PostgreSQL of this run alone
#   TRAINYARD_TEST_POOLER_URL       the same through PgBouncer in transaction mode
#   TRAINYARD_TEST_PUBSUB_EMULATOR  host:port of Google's Pub/Sub emulator
# One that is set already is left as it is, and nothing is started for it.
#
# What cannot be had here is said at the start and at the end as a line that
# begins with NOT TESTED, and its variable stays unset. With CI=true that is a
# failure. Otherwise the exit code is COMMAND's.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/services/common.sh
. "$here/common.sh"

[ $# -gt 0 ] || {
  echo "usage: ${0##*/} COMMAND [ARGUMENT...]" >&2
  exit 2
}

dir=$(mktemp -d "${TMPDIR:-/tmp}/trainyard-test.XXXXXX")
not_tested=()
command_pid=
watcher=

stop_services() {
  "$here/pubsub-emulator.sh" stop "$dir/pubsub" || say "the emulator did not stop"
  "$here/pgbouncer.sh" stop "$dir/pgbouncer" || say "PgBouncer did not stop"
  "$here/postgres.sh" stop "$dir/postgres" immediate || say "PostgreSQL did not stop"
  rm -rf -- "$dir"
}

print_not_tested() {
  [ ${#not_tested[@]} -eq 0 ] || printf 'NOT TESTED: %s\n' "${not_tested[@]}"
}

# shellcheck disable=SC2317 # It is run, by the trap.
on_exit() {
  local code=$?
  # Nothing may cut the clean-up short.
  trap '' INT TERM HUP
  trap - EXIT
  stop_services
  [ -z "$watcher" ] || kill -KILL -- "-$watcher" 2>/dev/null || true
  print_not_tested
  if [ "$code" = 0 ] && [ ${#not_tested[@]} -gt 0 ] && [ "${CI:-}" = true ]; then
    say "failing, because CI=true and not everything was tested"
    code=1
  fi
  exit "$code"
}

# shellcheck disable=SC2317 # It is run, by the traps.
on_signal() {
  trap '' INT TERM HUP
  if [ -n "$command_pid" ]; then
    kill -TERM -- "-$command_pid" 2>/dev/null || true
    for _ in $(seq 50); do
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

# A killed run.sh (kill -9) cleans nothing up, so a second process watches for
# its end. Its own process group keeps it from being killed along.
watch_for_our_end() {
  local runner=$$
  set -m
  (
    trap '' INT TERM HUP
    while kill -0 "$runner" 2>/dev/null; do sleep 1; done
    [ ! -d "$dir" ] || stop_services
  ) </dev/null >/dev/null 2>&1 &
  watcher=$!
  set +m
  disown
}

# start_service VARIABLE WHAT SCRIPT SUBDIRECTORY [ARGUMENT...]
start_service() {
  local variable=$1 what=$2 script=$3 subdirectory=$4 value code=0
  shift 4
  if [ -n "${!variable:-}" ]; then
    say "$variable is set: using that"
    return
  fi
  value=$("$here/$script" start "$subdirectory" "$@" 2>"$dir/stderr") || code=$?
  cat "$dir/stderr" >&2
  case $code in
    0) export "$variable=$value" ;;
    3) not_tested+=("$what, because $(tail -n 1 "$dir/stderr" | sed 's/^[^:]*: //')") ;;
    *) die "$script failed" ;;
  esac
}

watch_for_our_end
# The server's user must be able to pass, see postgres.sh.
chmod 711 "$dir"
start_service TRAINYARD_TEST_DATABASE_URL "the PostgreSQL store" postgres.sh "$dir/postgres"
if [ -n "${TRAINYARD_TEST_DATABASE_URL:-}" ]; then
  # Idle sessions would keep too many of the server's connections from other tests.
  start_service TRAINYARD_TEST_POOLER_URL "PgBouncer" pgbouncer.sh "$dir/pgbouncer" \
    "$TRAINYARD_TEST_DATABASE_URL" "server_idle_timeout = 2"
fi
start_service TRAINYARD_TEST_PUBSUB_EMULATOR "Google's Pub/Sub emulator" pubsub-emulator.sh "$dir/pubsub"
print_not_tested

code=0
if [ -t 0 ]; then
  # At a terminal the command keeps it, and Ctrl-C reaches the command itself.
  "$@" || code=$?
else
  # In the background, because bash puts off its traps while it waits for a
  # command in the foreground; in a group of its own (set -m), because a signal
  # is passed on to everything that the command has started.
  set -m
  "$@" <&0 &
  command_pid=$!
  set +m
  wait "$command_pid" || code=$?
  command_pid=
fi
exit "$code"

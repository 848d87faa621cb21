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
# failure. Otherwise the exit code is COMMAND's. Nothing is left behind, see
# contained.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/services/common.sh
. "$here/common.sh"

[ $# -gt 0 ] || {
  echo "usage: ${0##*/} COMMAND [ARGUMENT...]" >&2
  exit 2
}

[ "${1:-}" = --contained ] || exec "$here/contained.sh" "$here/run.sh" --contained "$@"
shift
dir=$TMPDIR/services
mkdir -m 711 "$dir"
not_tested=()

stop_services() {
  "$here/pubsub-emulator.sh" stop "$dir/pubsub" || say "the emulator did not stop"
  "$here/pgbouncer.sh" stop "$dir/pgbouncer" || say "PgBouncer did not stop"
  "$here/postgres.sh" stop "$dir/postgres" immediate || say "PostgreSQL did not stop"
}

print_not_tested() {
  [ ${#not_tested[@]} -eq 0 ] || printf 'NOT TESTED: %s\n' "${not_tested[@]}"
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

trap stop_services EXIT
start_service TRAINYARD_TEST_DATABASE_URL "the PostgreSQL store" postgres.sh "$dir/postgres"
if [ -n "${TRAINYARD_TEST_DATABASE_URL:-}" ]; then
  # Idle sessions would keep too many of the server's connections from other tests.
  start_service TRAINYARD_TEST_POOLER_URL "PgBouncer" pgbouncer.sh "$dir/pgbouncer" \
    "$TRAINYARD_TEST_DATABASE_URL" "server_idle_timeout = 2"
fi
start_service TRAINYARD_TEST_PUBSUB_EMULATOR "Google's Pub/Sub emulator" pubsub-emulator.sh "$dir/pubsub"
print_not_tested

code=0
"$@" || code=$?
print_not_tested
if [ "$code" = 0 ] && [ ${#not_tested[@]} -gt 0 ] && [ "${CI:-}" = true ]; then
  say "failing, because CI=true and not everything was tested"
  code=1
fi
exit "$code"

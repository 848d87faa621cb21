#!/usr/bin/env bash
# Google's own Pub/Sub emulator for tests, run from its jar: the gcloud wrapper
# takes seconds longer and leaves the java process behind when it is killed.
#
#   pubsub-emulator.sh start DIR   starts it, prints host:port and nothing else
#   pubsub-emulator.sh stop DIR
#
# It keeps nothing: after a restart, on the same port, it is empty.
#
# Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the emulator is not installed.
set -euo pipefail
# shellcheck source=tests/services/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  echo "usage: ${0##*/} start DIR | stop DIR" >&2
  exit 2
}

# ---- where the emulator is --------------------------------------------------

jar_under() {
  local newest
  newest=$(printf '%s\n' "$1"/platform/pubsub-emulator/lib/cloud-pubsub-emulator-*-all.jar |
    sort -V | tail -n 1)
  [ -r "$newest" ] && jar=$newest
}

find_jar() {
  local gcloud root
  [ -z "${CLOUDSDK_ROOT:-}" ] || ! jar_under "$CLOUDSDK_ROOT" || return 0
  if gcloud=$(command -v gcloud); then
    ! jar_under "$(dirname -- "$(dirname -- "$(readlink -f -- "$gcloud")")")" || return 0
  fi
  for root in /usr/lib/google-cloud-sdk /usr/share/google-cloud-sdk ~/google-cloud-sdk \
    /opt/google-cloud-sdk /opt/*/google-cloud-sdk /snap/google-cloud-*/current; do
    ! jar_under "$root" || return 0
  done
  # Last, because it takes seconds.
  if [ -n "$gcloud" ]; then
    root=$(gcloud info --format='value(installation.sdk_root)' 2>/dev/null </dev/null) || return 1
    [ -n "$root" ] && jar_under "$root" && return
  fi
  return 1
}

# ---- the server -------------------------------------------------------------

# The process id, if the process is still the one that was started here.
running_pid() {
  local pid
  pid=$(cat -- "$dir/pid" 2>/dev/null) || return 1
  # An id is reused in time, so the id alone proves nothing. Small images have
  # no ps, other systems no /proc.
  { cat "/proc/$pid/cmdline" || ps -ww -o args= -p "$pid"; } 2>/dev/null |
    grep -aq 'cloud-pubsub-emulator' || return 1
  echo "$pid"
}

# It answers "Ok" to a plain GET once it serves.
answers() {
  local line
  {
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf 'GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
    IFS= read -r -t 5 line <&3 || line=
    exec 3>&-
  } 2>/dev/null
  case $line in 'HTTP/1.1 200'*) ;; *) return 1 ;; esac
}

# Returns 0 when it serves, 1 when the port was taken; anything else ends.
try_to_start() {
  local port=$1 log=$dir/emulator.log deadline=$((SECONDS + 60))
  : >"$log"
  # Its own process group (set -m), so that Ctrl-C in the terminal does not stop
  # it before the tests that use it; no descriptor of ours, so that a caller
  # that reads our output is not kept waiting for the server to end.
  (
    set -m
    # Starting fast matters more here than peak speed.
    java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xmx1g -jar "$jar" \
      --host=127.0.0.1 --port="$port" </dev/null >"$log" 2>&1 3>&- &
    echo $! >"$dir/pid"
  )
  until grep -q 'Server started' "$log" && answers "$port"; do
    if grep -q 'Address already in use' "$log"; then
      stop_process
      return 1
    fi
    if [ "$SECONDS" -ge "$deadline" ] || ! kill -0 "$(cat "$dir/pid")" 2>/dev/null; then
      stop_process
      tail -n 30 "$log" >&2
      die "the Pub/Sub emulator did not start"
    fi
    sleep 0.1
  done
  echo "$port" >"$dir/port"
}

stop_process() {
  local pid waited=0
  pid=$(running_pid) || return 0
  kill "$pid" 2>/dev/null || return 0
  while running_pid >/dev/null; do
    [ "$waited" -lt 50 ] || kill -9 "$pid" 2>/dev/null || true
    waited=$((waited + 1))
    sleep 0.1
  done
  rm -f -- "$dir/pid"
}

start() {
  local attempt port
  if ! command -v java >/dev/null; then
    say "there is no java on PATH to run it with"
    exit 3
  fi
  if ! find_jar; then
    say "it is not installed (gcloud components install pubsub-emulator)"
    exit 3
  fi
  dir=$(absolute_dir "$1")
  if ! running_pid >/dev/null; then
    for attempt in 1 2 3 4 5; do
      if [ -s "$dir/port" ]; then port=$(cat "$dir/port"); else port=$(free_port); fi
      try_to_start "$port" && break
      say "port $port was taken (attempt $attempt)"
      [ "$attempt" -lt 5 ] || die "no port could be had"
      # A restart keeps its port, which may take a moment to be free again.
      sleep 0.5
    done
  fi
  echo "127.0.0.1:$(cat "$dir/port")"
}

stop() {
  [ -d "$1" ] || return 0
  dir=$(absolute_dir "$1")
  stop_process
}

case "${1:-}:$#" in
  start:2) shift && start "$@" ;;
  stop:2) shift && stop "$@" ;;
  *) usage ;;
esac

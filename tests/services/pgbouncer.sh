#!/usr/bin/env bash
# A private PgBouncer in transaction mode for tests.
#
#   pgbouncer.sh start DIR URL [LINE...]   starts it in front of URL's server, prints
#                                          the URL to use instead and nothing else;
#                                          LINEs are added to its configuration
#   pgbouncer.sh stop DIR
#
# Exit codes: 0 done, 1 failed, 2 wrong usage, 3 PgBouncer is not installed.
set -euo pipefail
# shellcheck source=tests/services/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  echo "usage: ${0##*/} start DIR URL [LINE...] | stop DIR" >&2
  exit 2
}

# Debian's is in a directory that only root has on PATH.
PATH=$PATH:/usr/sbin:/usr/local/sbin

is_installed() { command -v pgbouncer >/dev/null; }

install_pgbouncer() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  say "PgBouncer is not installed: running apt-get install -y pgbouncer"
  export DEBIAN_FRONTEND=noninteractive
  # No server of the package's own, see postgres.sh.
  export RUNLEVEL=1
  { apt-get install -y pgbouncer || { apt-get update && apt-get install -y pgbouncer; }; } >&2
}

must_be_installed() {
  is_installed && return
  if install_pgbouncer && is_installed; then
    return
  fi
  say "PgBouncer is not installed (no pgbouncer on PATH)"
  exit 3
}

configure() {
  local url=$1 port=$2 server
  shift 2
  server=${url#*@}
  server=${server%%/*}
  as_server_user tee "$dir/users.txt" >/dev/null <<<'"trainyard" ""'
  {
    cat <<CONF
[databases]
* = host=${server%:*} port=${server##*:}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = $port
unix_socket_dir =
auth_type = trust
auth_file = $dir/users.txt
pidfile = $dir/pid
logfile = $dir/log
pool_mode = transaction
max_client_conn = 1000
default_pool_size = 5
CONF
    [ $# = 0 ] || printf '%s\n' "$@"
  } | as_server_user tee "$dir/pgbouncer.ini" >/dev/null
}

start() {
  local url=$2 port
  dir=$(absolute_dir "$1")
  shift 2
  must_be_installed
  choose_user
  open_the_way
  cd -- "$dir"
  for _ in 1 2 3 4 5; do
    port=$(free_port)
    configure "$url" "$port" "$@"
    as_server_user pgbouncer -q -d "$dir/pgbouncer.ini" </dev/null >&2 || continue
    for _ in $(seq 100); do
      if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        echo "postgres://trainyard@127.0.0.1:$port/${url##*/}"
        return
      fi
      sleep 0.05
    done
  done
  tail -n 30 "$dir/log" >&2 || true
  die "PgBouncer did not start"
}

stop() {
  local pid
  pid=$(cat -- "$1/pid" 2>/dev/null) || return 0
  # At once, without waiting for clients.
  kill -TERM "$pid" 2>/dev/null || true
}

case "${1:-}:$#" in
  start:1 | start:2) usage ;;
  start:*) shift && start "$@" ;;
  stop:2) shift && stop "$@" ;;
  *) usage ;;
esac

#!/usr/bin/env bash
# A private PostgreSQL for tests.
#
#   postgres.sh start DIR [PORT]   makes the cluster in DIR if there is none,
#                                  starts it, prints its URL and nothing else
#   postgres.sh stop DIR [MODE]    MODE: fast (default) or immediate, which is
#                                  a crash as far as the data are concerned
#
# Starting again on the same DIR brings the same cluster back on the same port,
# so a test can crash the database under a running worker.
#
# The URL's user `trainyard` owns its database and may create others; a test
# that needs a superuser connects as `postgres`. No password is asked for: the
# server listens on loopback only.
#
# TRAINYARD_TEST_PG_OPTIONS is appended to the server's options, for example
# "-c fsync=off". TRAINYARD_TEST_PG_BINDIR names the binaries to use.
#
# Exit codes: 0 done, 1 failed, 2 wrong usage, 3 PostgreSQL is not installed.
set -euo pipefail
# shellcheck source=tests/services/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  echo "usage: ${0##*/} start DIR [PORT] | stop DIR [fast|immediate]" >&2
  exit 2
}

# ---- where PostgreSQL is ----------------------------------------------------

# Wrappers are common: distributions put scripts named pg_ctl on PATH that pick
# a version or switch users. Only a directory that also holds the server and
# initdb, as ELF or Mach-O programs and not as scripts, will do.
is_bindir() {
  local program
  for program in pg_ctl postgres initdb; do
    [ -x "$1/$program" ] || return 1
    [ "$(head -c 2 -- "$1/$program" | tr -d '\0')" != '#!' ] || return 1
  done
}

installed_bindir() {
  local candidate
  if [ -n "${TRAINYARD_TEST_PG_BINDIR:-}" ]; then
    echo "$TRAINYARD_TEST_PG_BINDIR"
    return
  fi
  if candidate=$(command -v pg_ctl); then
    candidate=$(dirname -- "$(readlink -f -- "$candidate")")
    if is_bindir "$candidate"; then
      echo "$candidate"
      return
    fi
  fi
  # Newest version first.
  while IFS= read -r candidate; do
    if is_bindir "$candidate"; then
      echo "$candidate"
      return
    fi
  done < <(printf '%s\n' /usr/lib/postgresql/*/bin /usr/pgsql-*/bin | sort -rV)
  return 1
}

install_postgres() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  say "PostgreSQL is not installed: running apt-get install -y postgresql"
  export DEBIAN_FRONTEND=noninteractive
  # The package would start a server of its own on the standard port. Run level
  # 1 (single user) tells its scripts to leave services alone.
  export RUNLEVEL=1
  { apt-get install -y postgresql || { apt-get update && apt-get install -y postgresql; }; } >&2
}

find_bindir() {
  bindir=$(installed_bindir) && return
  if install_postgres && bindir=$(installed_bindir); then
    return
  fi
  say "PostgreSQL is not installed (no pg_ctl on PATH or under /usr/lib/postgresql)"
  exit 3
}

# ---- the cluster ------------------------------------------------------------

make_cluster() {
  local unfinished=$dir/data.unfinished
  as_server_user rm -rf -- "$unfinished"
  # --no-sync: only an operating-system crash during the test run could lose
  # what it would have flushed. The server itself runs with fsync on.
  as_server_user "$bindir/initdb" -D "$unfinished" -U postgres --auth=trust \
    --encoding=UTF8 --no-locale --no-sync >"$dir/initdb.log" 2>&1 </dev/null ||
    { cat "$dir/initdb.log" >&2 && die "initdb failed"; }
  # Single-user mode needs no running server and no psql.
  printf '%s\n' \
    'CREATE ROLE trainyard LOGIN CREATEDB REPLICATION;' \
    'CREATE DATABASE trainyard OWNER trainyard;' |
    as_server_user "$bindir/postgres" --single -D "$unfinished" postgres >"$dir/bootstrap.log" 2>&1 ||
    { cat "$dir/bootstrap.log" >&2 && die "could not create the test database"; }
  printf '%s\n' "include 'test.conf'" |
    as_server_user tee -a "$unfinished/postgresql.conf" >/dev/null
  # Last, so that an interrupted attempt is never taken for a cluster.
  as_server_user mv -- "$unfinished" "$dir/data"
}

configure() {
  local port=$1 socket_dir=$dir
  # A socket's path may have about 100 characters.
  [ ${#dir} -le 80 ] || socket_dir=
  as_server_user tee "$dir/data/test.conf" >/dev/null <<CONF
listen_addresses = '127.0.0.1'
port = $port
unix_socket_directories = '$socket_dir'
max_connections = 400
wal_level = logical
CONF
}

is_running() {
  ! is_defunct && as_server_user "$bindir/pg_ctl" status -D "$dir/data" >/dev/null 2>&1
}

# A killed server whose parent has not collected it yet, which in a container
# may be never. PostgreSQL takes such a process for a running one.
is_defunct() {
  local pid
  pid=$(head -n 1 -- "$dir/data/postmaster.pid" 2>/dev/null) || return 1
  grep -q '^State:[[:space:]]*Z' "/proc/$pid/status" 2>/dev/null
}

# Removes the lock of a defunct server, once its children have left the data.
clear_defunct() {
  local waited process in_use=yes
  is_defunct || return 0
  for ((waited = 0; waited < 100; waited++)); do
    in_use=
    for process in /proc/[0-9]*; do
      [ "$(readlink -- "$process/cwd" 2>/dev/null)" != "$dir/data" ] || in_use=yes
    done
    [ -n "$in_use" ] || break
    sleep 0.1
  done
  [ -z "$in_use" ] || die "the server was killed, but processes of it are still at work in $dir/data"
  rm -f -- "$dir/data/postmaster.pid"
}

try_to_start() {
  local log=$dir/server.log
  as_server_user "$bindir/pg_ctl" start -D "$dir/data" -w -t 60 -s -l "$log" \
    -o "${TRAINYARD_TEST_PG_OPTIONS:-}" </dev/null >"$dir/pg_ctl.log" 2>&1
}

start_new() {
  local wanted=$1 port attempt
  for attempt in 1 2 3 4 5; do
    port=${wanted:-$(free_port)}
    configure "$port"
    if try_to_start; then
      echo "$port" >"$dir/port"
      return
    fi
    # Another server may have taken the port since it was chosen.
    [ -z "$wanted" ] || break
    grep -q 'could not bind' "$dir/server.log" || break
    say "port $port was taken (attempt $attempt)"
  done
  fail_to_start
}

start_again() {
  local deadline=$((SECONDS + 20))
  clear_defunct
  configure "$(cat "$dir/port")"
  until try_to_start; do
    # After a kill -9 of the server its children hold the shared memory and the
    # port for a moment longer.
    [ "$SECONDS" -lt "$deadline" ] || fail_to_start
    sleep 0.2
    clear_defunct
  done
}

fail_to_start() {
  tail -n 30 "$dir/server.log" "$dir/pg_ctl.log" >&2 || true
  die "PostgreSQL did not start"
}

start() {
  local wanted=${2:-}
  dir=$(absolute_dir "$1")
  find_bindir
  choose_user
  if [ ! -e "$dir/data/PG_VERSION" ]; then
    # DIR changes owner below: never do that to a directory with other contents.
    [ -e "$dir/data.unfinished" ] || [ -z "$(ls -A -- "$dir")" ] ||
      die "$dir is neither empty nor a test cluster"
    open_the_way
    cd -- "$dir"
    make_cluster
  fi
  cd -- "$dir"
  if is_running; then
    : # Print the URL again.
  elif [ -s "$dir/port" ] && [ "${wanted:-$(cat "$dir/port")}" = "$(cat "$dir/port")" ]; then
    start_again
  else
    start_new "$wanted"
  fi
  echo "postgres://trainyard@127.0.0.1:$(cat "$dir/port")/trainyard"
}

stop() {
  local mode=${2:-fast}
  case $mode in fast | immediate) ;; *) usage ;; esac
  [ -e "$1/data/PG_VERSION" ] || return 0
  dir=$(absolute_dir "$1")
  find_bindir
  choose_user
  cd -- "$dir"
  is_running || return 0
  as_server_user "$bindir/pg_ctl" stop -D "$dir/data" -m "$mode" -w -t 60 -s >&2
}

case "${1:-}:$#" in
  start:2 | start:3) shift && start "$@" ;;
  stop:2 | stop:3) shift && stop "$@" ;;
  *) usage ;;
esac

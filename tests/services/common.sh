# shellcheck shell=bash
# Shared by the scripts beside it; sourced, not run.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# A loopback port that nothing listens on. It comes from below the range that
# systems hand to outgoing connections, so only another server can take it
# before ours binds; the callers try again with another port when one does.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# The absolute form of a directory, which is made if it is missing.
absolute_dir() {
  mkdir -p -- "$1" && (cd -- "$1" && pwd -P)
}

# Sets server_user: PostgreSQL and its poolers refuse to run as root.
choose_user() {
  server_user=
  [ "$(id -u)" = 0 ] || return 0
  for server_user in postgres nobody; do
    id -u "$server_user" >/dev/null 2>&1 && return
  done
  die "running as root, and there is no user postgres or nobody to run the server as"
}

as_server_user() {
  if [ -z "$server_user" ]; then
    "$@"
  elif command -v setpriv >/dev/null; then
    setpriv --reuid="$server_user" --regid="$(id -g "$server_user")" --init-groups -- "$@"
  elif command -v runuser >/dev/null; then
    runuser -u "$server_user" -- "$@"
  else
    su -s /bin/sh "$server_user" -c "$(printf '%q ' "$@")"
  fi
}

# Lets the server's user reach $dir. Temporary directories are made for their
# owner only, so one that root made is opened for passage (not for listing);
# a directory outside the temporary ones is not ours to change.
open_the_way() {
  local parent=$dir tmp
  [ -n "$server_user" ] || return 0
  chown "$server_user" "$dir"
  tmp=$(cd -- "${TMPDIR:-/tmp}" && pwd -P)
  while parent=$(dirname -- "$parent") && [ "$parent" != / ]; do
    as_server_user test -x "$parent" && continue
    case $parent in
      "$tmp"/* | /tmp/*) chmod o+x "$parent" ;;
      *) continue ;;
    esac
  done
  as_server_user test -w "$dir" ||
    die "user $server_user cannot reach $dir: use a directory under ${TMPDIR:-/tmp}"
}

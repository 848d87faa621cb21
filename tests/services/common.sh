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

#!/usr/bin/env bash
# Checks the built-in emulator with Google's own Python client: what another
# client can do with it is the proof that it speaks Pub/Sub and not a dialect.
#
#   python-client.sh [ARGUMENT...]    the arguments go to pubsub_client.py
#
# It needs the built binary: target/debug/trainyard, or what TRAINYARD_BIN names.
# Without Python or its packages it says NOT TESTED, a failure with CI=true.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/services/common.sh
. "$here/common.sh"
root=$(cd -- "$here/../.." && pwd -P)

# Pinned, so that a new release of the client cannot fail an old commit.
package=google-cloud-pubsub==2.44.0

target=${CARGO_TARGET_DIR:-$root/target}
venv=$target/test-venv
trainyard=${TRAINYARD_BIN:-$target/debug/trainyard}

not_tested() {
  echo "NOT TESTED: the built-in emulator with Google's Python client, because $1"
  [ "${CI:-}" != true ] || die "failing, because CI=true and not everything was tested"
  exit 0
}

make_venv() {
  # The stamp is written last: a half-made environment is made again.
  [ "$(cat -- "$venv/installed" 2>/dev/null)" != "$package" ] || return 0
  command -v python3 >/dev/null || not_tested "there is no python3 on PATH"
  rm -rf -- "$venv"
  mkdir -p -- "$target"
  python3 -m venv "$venv" >&2 || not_tested "python3 -m venv failed (Debian: apt-get install python3-venv)"
  "$venv/bin/pip" install -q --disable-pip-version-check "$package" >&2 </dev/null ||
    not_tested "pip could not install $package"
  echo "$package" >"$venv/installed"
}

# shellcheck disable=SC2317 # It is run, by the trap.
on_exit() {
  local code=$? waited
  trap '' INT TERM HUP
  trap - EXIT
  if [ -n "$emulator" ]; then
    kill "$emulator" 2>/dev/null || true
    for ((waited = 0; waited < 100; waited++)); do
      kill -0 "$emulator" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$emulator" 2>/dev/null || true
    wait "$emulator" 2>/dev/null || true
  fi
  [ "$code" = 0 ] || sed 's/^/emulator: /' "$dir/stderr" >&2 || true
  rm -rf -- "$dir"
  exit "$code"
}

[ -x "$trainyard" ] || die "$trainyard is not built: run make build"
make_venv

dir=$(mktemp -d "${TMPDIR:-/tmp}/trainyard-test.XXXXXX")
emulator=
trap on_exit EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

"$trainyard" emulator --port 0 </dev/null >"$dir/stdout" 2>"$dir/stderr" &
emulator=$!
# It prints one line when it serves: export PUBSUB_EMULATOR_HOST=127.0.0.1:PORT
deadline=$((SECONDS + 30))
until host=$(sed -n 's/^export PUBSUB_EMULATOR_HOST=//p' "$dir/stdout") && [ -n "$host" ]; do
  kill -0 "$emulator" 2>/dev/null || die "the emulator ended before it was ready"
  [ "$SECONDS" -lt "$deadline" ] || die "the emulator did not say that it is ready within 30 s"
  sleep 0.05
done

PUBSUB_EMULATOR_HOST=$host "$venv/bin/python" "$root/tests/python/pubsub_client.py" "$@"

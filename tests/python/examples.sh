#!/usr/bin/env bash
# Tests the example tasks of examples/python and examples/shell.
#
#   examples.sh [ARGUMENT...]    the arguments go to test_examples.py, for example
#                                -v -k sigterm
#
# Without Python 3.9 or jq it says NOT TESTED, a failure with CI=true.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

missing=
not_tested() {
  echo "NOT TESTED: $1, because $2"
  missing=1
}

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
  not_tested "the example tasks" "there is no python3 of version 3.9 or newer on PATH"
else
  command -v jq >/dev/null || not_tested "the example task in shell" "there is no jq on PATH"
  python3 "$here/test_examples.py" "$@" </dev/null
fi
if [ -n "$missing" ] && [ "${CI:-}" = true ]; then
  echo "${0##*/}: failing, because CI=true and not everything was tested" >&2
  exit 1
fi

#!/bin/sh
# Run the test suite; arguments go to pytest: sh run_tests.sh -k resume
repository=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$repository/setup_env.sh"
cd "$repository" && exec python -m pytest "$@"

#!/bin/sh
# Run the test suite; arguments go to pytest: sh run_tests.sh -k resume
repository=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
requirements=requirements-dev.txt
. "$repository/setup_env.sh"
cd "$repository" && exec python -m pytest "$@"

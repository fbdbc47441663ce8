#!/bin/sh
# Run the tests; options go to pytest:
#   sh run_tests.sh
#   sh run_tests.sh -k resume
#   sh run_tests.sh -m gpu        the tests that need a CUDA GPU
repository=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
requirements=requirements-dev.txt
. "$repository/setup_env.sh"
cd "$repository" || exit 1
case " $* " in
    *" -m gpu "* | *" -n "* | *" --pdb "*) ;;  # one after another: the tests of a GPU share it
    *) set -- -n auto --maxprocesses 4 --dist loadgroup "$@" ;;
esac
exec python -m pytest "$@"

#!/bin/sh
# Table 4, training with gradient in the last K = 5, 10 or 15 steps; test_grad_steps.sh tests what comes of it.
#   sh recipes/grad_steps.sh 10
recipe=grad_steps_$1
. "$(dirname -- "$0")/common.sh"

case ${1:-} in '' | *[!0-9]*) usage "K, the number of steps with gradient," ;; esac
grad_steps=$1
shift
train 256 --clip 1 --aesthetic 0.3333333 --pickscore 1 --hpsv2 1 --grad_steps "$grad_steps" "$@"

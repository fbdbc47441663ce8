#!/bin/sh
# Table 5, the encoder of paper.sh under other schedulers (aesthetic, PickScore, HPS v2):
#   DDIM 25 (5.8800, 19.157, 0.2805)       DDIM 50 (6.0178, 19.121, 0.2769)
#   PNDM 25 (5.0991, 18.479, 0.2632)       PNDM 50 (5.9355, 19.026, 0.2748)
#   DPMSolver 25 (5.8564, 19.145, 0.2803)  Euler 25 (5.9098, 19.151, 0.2804)
# The tuned encoder drives the last three fifths of the steps, 15 of 25.
#   sh recipes/test_scheduler.sh PNDM 50
recipe=scheduler_$1_$2
. "$(dirname -- "$0")/common.sh"

case ${2:-} in '' | *[!0-9]*) usage "a scheduler and its number of steps" ;; esac
scheduler=$1 steps=$2
shift 2
test_images paper --scheduler "$scheduler" --step "$steps" --grad_steps "$((steps * 3 / 5))" "$@"

#!/bin/sh
# Table 4, K in training and steps driven in the test (aesthetic, PickScore, HPS v2):
#   5 5 (6.0688, 19.195, 0.2835)    5 10 (6.3871, 19.336, 0.2847)   5 15 (6.5295, 19.355, 0.2828)
#   5 25 (6.5758, 19.071, 0.2722)   10 10 (5.8680, 19.158, 0.2799)  15 15 (5.3533, 18.919, 0.2735)
#   sh recipes/test_grad_steps.sh 5 15
recipe=grad_steps_$1_$2
. "$(dirname -- "$0")/common.sh"

case ${1:-x}${2:-x} in *[!0-9]*) usage "K in training and the number of steps to drive" ;; esac
trained=$1 driven=$2
shift 2
test_images "grad_steps_$trained" --grad_steps "$driven" "$@"

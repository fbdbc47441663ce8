#!/bin/sh
# Table 1, one reward beside the CLIP term (aesthetic, PickScore, HPS v2 reached):
#   aesthetic (5.5212, 18.956, 0.2670)   pickscore (5.2662, 19.023, 0.2641)   hpsv2 (5.4506, 18.922, 0.2800)
# hpsv2 is also Table 2, "TextCraftor (HPS v2 alone)" (average 0.2910); Figures 4 and 5 use such encoders.
#   sh recipes/single_reward.sh aesthetic
recipe=$1
. "$(dirname -- "$0")/common.sh"

weights=$(alone "${1:-}") || exit 1
shift
train 256 --clip 1 $weights "$@"

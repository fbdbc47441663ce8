#!/bin/sh
# Figure 6, one reward without the CLIP term, whose score then rises while the pictures collapse: aesthetic (9.35),
# pickscore (23.42) or hpsv2 (0.3176).
#   sh recipes/no_clip.sh aesthetic
recipe=$1_no_clip
. "$(dirname -- "$0")/common.sh"

weights=$(alone "${1:-}") || exit 1
shift
train 256 --clip 0 $weights "$@"

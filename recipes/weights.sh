#!/bin/sh
# Table 6, weights of CLIP, aesthetic score, PickScore and HPS v2 as the paper counts them (the four scores reached):
#   200 3 1 100 (0.2952, 6.0900, 19.123, 0.2757)   100 6 1 100 (0.2385, 7.1680, 19.435, 0.2730)
#   100 3 2 100 (0.2615, 6.6831, 19.494, 0.2798)   100 3 1 200 (0.2711, 6.4020, 19.306, 0.2850)
#   sh recipes/weights.sh 100 6 1 100
recipe=weights_$1_$2_$3_$4
. "$(dirname -- "$0")/common.sh"

case "$1 $2 $3 $4" in
    *[!0-9.\ ]* | *"  "* | *\ ) usage "four weights, of CLIP, aesthetic score, PickScore and HPS v2," ;;
esac
# Training multiplies --clip and --hpsv2 by 100 and --aesthetic by 3.
weights=$(awk 'BEGIN { print "--clip", ARGV[1] / 100, "--aesthetic", ARGV[2] / 3, "--pickscore", ARGV[3] / 1, \
    "--hpsv2", ARGV[4] / 100 }' "$1" "$2" "$3" "$4")
shift 4
train 256 $weights "$@"

#!/bin/sh
# The paper's CLIP term, equation 8, in place of the released script's: the image against the text embedding of the
# encoder in training. Otherwise paper.sh.
recipe=clip_constraint
. "$(dirname -- "$0")/common.sh"

train 256 --clip 0 --clip_constraint 1 --aesthetic 0.3333333 --pickscore 1 --hpsv2 1 "$@"

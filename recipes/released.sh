#!/bin/sh
# The released script's settings: 32 images per update (there 8 GPUs of 4) and the weights 50/3/1/100 of CLIP, aesthetic
# score, PickScore and HPS v2. The released text encoder is the one after 10,000 updates.
recipe=released
. "$(dirname -- "$0")/common.sh"

train 32 --clip 0.5 --aesthetic 1 --pickscore 1 --hpsv2 1 "$@"

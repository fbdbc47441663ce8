#!/bin/sh
# Table 1, "TextCraftor, text, all" (aesthetic 5.8800, PickScore 19.157, HPS v2 0.2805), and Table 2, "TextCraftor
# (all)" (average 0.2807): 256 images per update (there 64 GPUs of 4), weights 100/1/1/100.
recipe=paper
. "$(dirname -- "$0")/common.sh"

train 256 --clip 1 --aesthetic 0.3333333 --pickscore 1 --hpsv2 1 "$@"

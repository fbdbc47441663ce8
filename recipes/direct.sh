#!/bin/sh
# Table 1, "direct fine-tuning, all" (aesthetic 5.2880, PickScore 18.750, HPS v2 0.2701): section 3.2.1, one prediction
# from a noised picture. The paper's pictures are of LAION-2B (no NSFW, aesthetic score above 5); bring your own.
#   sh recipes/direct.sh FOLDER
recipe=direct
. "$(dirname -- "$0")/common.sh"

case ${1:-} in '' | -*) usage "a folder of pictures with captions" ;; esac
images=$1
shift
train 256 --method direct --images "$images" --clip 1 --aesthetic 0.3333333 --pickscore 1 --hpsv2 1 "$@"

#!/bin/sh
# Figure 4, the original embeddings and those of an encoder tuned for one reward, mixed: weight 0, 0.25, 0.5, 0.75 or 1.
#   sh recipes/test_mix.sh aesthetic 0.25
recipe=$1_mix_$2
. "$(dirname -- "$0")/common.sh"

[ $# -ge 2 ] || usage "a reward and the weight of the tuned embeddings"
reward=$1 weight=$2
shift 2
test_images "$reward" --prompt_weighting "$weight" "$@"

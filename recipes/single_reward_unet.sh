#!/bin/sh
# Table 2, "+ UNet (HPS v2 alone)" (average 0.2983): the UNet under the text encoder of single_reward.sh, same reward.
#   sh recipes/single_reward_unet.sh hpsv2
recipe=$1_unet
. "$(dirname -- "$0")/common.sh"
per_gpu=1  # 23.6 GiB, 30 on several GPUs with accumulation; four images need 7.9 more

weights=$(alone "${1:-}") || exit 1
encoder=${output}_$1/tc_text.safetensors
shift
train 256 --text_path "$encoder" --lr_text 0 --lr_unet 1e-6 --clip 1 $weights "$@"

#!/bin/sh
# Table 1, "TextCraftor, text then UNet" (aesthetic 6.4166, PickScore 19.479, HPS v2 0.2900), and Table 2, "+ UNet
# (all)" (average 0.2847): tunes the UNet under the text encoder of paper.sh, which stays as it is.
recipe=unet
. "$(dirname -- "$0")/common.sh"
per_gpu=1  # 23.6 GiB, 30 on several GPUs with accumulation; four images need 7.9 more

train 256 --text_path "${output}_paper/tc_text.safetensors" --lr_text 0 --lr_unet 1e-6 \
    --clip 1 --aesthetic 0.3333333 --pickscore 1 --hpsv2 1 "$@"

#!/bin/sh
# Table 1, "TextCraftor, UNet, all" (aesthetic 6.0062, PickScore 19.281, HPS v2 0.2867): tunes the UNet under the
# original text encoder.
recipe=unet_alone
. "$(dirname -- "$0")/common.sh"
per_gpu=1  # 23.6 GiB, 30 on several GPUs with accumulation; four images need 7.9 more

train 256 --lr_text 0 --lr_unet 1e-6 --clip 1 --aesthetic 0.3333333 --pickscore 1 --hpsv2 1 "$@"

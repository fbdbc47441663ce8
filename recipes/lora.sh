#!/bin/sh
# Not in the paper: all rewards as in paper.sh, with a LoRA of rank 16 in place of all weights of the text encoder. The
# learning rate of 1e-4 is the usual one for LoRAs; nobody has tuned it for this task.
recipe=lora
. "$(dirname -- "$0")/common.sh"

train 256 --lora_rank 16 --lr_text 1e-4 --clip 1 --aesthetic 0.3333333 --pickscore 1 --hpsv2 1 "$@"

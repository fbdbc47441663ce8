#!/bin/sh
# Train on every visible GPU, or on the CPU if there is none. On 8 GPUs this is the released script's run. Options that
# you add override these:
#   sh run_textcraftor.sh
#   sh run_textcraftor.sh --hpsv2 2. --output-path output/more_hpsv2
#   sh run_textcraftor.sh --model miniature        the small model in this repository, in minutes, with its own defaults
repository=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$repository/setup_env.sh"

case " $* " in
    *" --model miniature "* | *" --model=miniature "*) ;;
    *) set -- --clip 0.5 --aesthetic 1. --pickscore 1. --hpsv2 1. --grad_steps 5 \
        --lr_text 1e-6 --lr_unet 0. --batch-size 4 "$@" ;;
esac

launch train_textcraftor.py "$@"

#!/bin/sh
# Train on every visible GPU, or on the CPU of a machine without. Without arguments this is the
# released script's run on 8 GPUs; what you add comes last and wins:
#   sh run_textcraftor.sh
#   sh run_textcraftor.sh --hpsv2 2. --output-path output/more_hpsv2
#   sh run_textcraftor.sh --model miniature        the small model that ships here, in minutes, with its own defaults
repository=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$repository/setup_env.sh"

case " $* " in
    *" --model miniature "* | *" --model=miniature "*) ;;
    *) set -- --clip 0.5 --aesthetic 1. --pickscore 1. --hpsv2 1. --grad_steps 5 \
        --lr_text 1e-6 --lr_unet 0. --batch-size 4 "$@" ;;
esac

launch train_textcraftor.py "$@"

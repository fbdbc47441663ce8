#!/bin/sh
# Train on every visible GPU, or on the CPU of a machine without. Without arguments this is the paper's run; what you
# add comes last and wins:
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

gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 1
if [ "$gpus" -gt 1 ]; then
    set -- accelerate launch --multi_gpu --num_machines 1 --num_processes "$gpus" --mixed_precision no \
        --dynamo_backend no "$repository/train_textcraftor.py" "$@"
else
    set -- python "$repository/train_textcraftor.py" "$@"
fi
exec "$@"

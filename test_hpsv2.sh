#!/bin/sh
# The HPSv2 benchmark, generated and scored on every visible GPU, or on the CPU of a machine without. It is the paper's
# text encoder unless the arguments say what to test; what you add comes last and wins:
#   sh test_hpsv2.sh
#   sh test_hpsv2.sh --text_path output/tc_text.safetensors
#   sh test_hpsv2.sh --text_path ''           the original model
#   sh test_hpsv2.sh --model miniature        the small model that ships here, in minutes
repository=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$repository/setup_env.sh"

case " $* " in
    *" --model miniature "* | *" --model=miniature "*) ;;
    *" --text"[_-]"path"[\ =]* | *" --unet"[_-]"path"[\ =]* | *" --prompt"[_-]"eng"[\ =]* | *" --score"[_-]"only"[\ =]*) ;;
    *) set -- --text_path checkpoints/tc_text_e_0_iter_10000.pth --grad_steps 15 --seed 2023 "$@" ;;
esac

launch test_hpsv2.py "$@"

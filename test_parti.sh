#!/bin/sh
# PartiPrompts, generated and scored on all visible GPUs, or on the CPU if there is none. Without arguments that say
# what to test, it tests the paper's text encoder. Your arguments come last, so they win:
#   sh test_parti.sh
#   sh test_parti.sh --text_path output/tc_text.safetensors
#   sh test_parti.sh --text_path ''           the original model
#   sh test_parti.sh --model miniature        the small model in this repository, in minutes
repository=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$repository/setup_env.sh"

case " $* " in
    *" --model miniature "* | *" --model=miniature "*) ;;
    *" --text"[_-]"path"[\ =]* | *" --unet"[_-]"path"[\ =]* | *" --prompt"[_-]"eng"[\ =]* | *" --score"[_-]"only"[\ =]*) ;;
    *) set -- --text_path checkpoints/tc_text_e_0_iter_10000.pth --grad_steps 15 --seed 2023 "$@" ;;
esac

launch test_parti.py "$@"

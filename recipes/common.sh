# Sourced by the recipes beside it, with `recipe` set to a name for the run's folder. Defines what they share.
repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
. "$repository/setup_env.sh"

case " $* " in
    *" --model miniature "* | *" --model=miniature "*) miniature=yes output=$repository/output_miniature ;;
    *) miniature='' output=$repository/output ;;
esac

# train IMAGES OPTIONS...: train with IMAGES per optimizer step on any number of GPUs and write to output_RECIPE. Each
# GPU takes micro-batches of the --batch-size among the options, else of $per_gpu, else of 4. All recipes share 25 steps,
# K = 5, a learning rate of 1e-6 and 10,000 updates of the text encoder; options given here come later and win. With
# `--model miniature` the batch, K, the text encoder's learning rate and the number of updates are the miniature's own.
train() {
    images=$1
    shift
    if [ "$miniature" ]; then
        launch train_textcraftor.py --output-path "${output}_$recipe" "$@"
    fi
    batch=${per_gpu:-4} last=
    for option; do
        case $last in --batch-size | --batch_size) batch=$option ;; esac
        case $option in --batch-size=* | --batch_size=*) batch=${option#*=} ;; esac
        last=$option
    done
    case $batch in '' | 0* | *[!0-9]*) echo "error: --batch-size $batch: expected a whole number" >&2 && exit 1 ;; esac
    count_gpus
    at_once=$((batch * nodes * (gpus > 0 ? gpus : 1)))
    if [ "$at_once" -gt "$images" ]; then
        echo "error: $at_once images at once ($nodes nodes, $gpus GPUs each, --batch-size $batch) are more than the" \
            "$images per optimizer step of this recipe; give a smaller --batch-size" >&2
        exit 1
    fi
    accumulation=$(((images + at_once / 2) / at_once))
    if [ $((accumulation * at_once)) -ne "$images" ]; then
        echo "$((accumulation * at_once)) images per optimizer step, not $images, which is no multiple of $at_once"
    fi
    launch train_textcraftor.py --model "$repository/stable-diffusion-v1-5" --prompts "$repository/openprompts.csv" \
        --output-path "${output}_$recipe" --step 25 --guidance 7.5 --grad_steps 5 --lr_text 1e-6 --lr_unet 0 \
        --max_steps 10000 --batch-size "$batch" --gradient_accumulation_steps "$accumulation" "$@"
}

# The options for reward $1 without the other two, at the weights of paper.sh.
alone() {
    case ${1:-} in
        aesthetic) echo --aesthetic 0.3333333 --pickscore 0 --hpsv2 0 ;;
        pickscore) echo --aesthetic 0 --pickscore 1 --hpsv2 0 ;;
        hpsv2) echo --aesthetic 0 --pickscore 0 --hpsv2 1 ;;
        *) usage "aesthetic, pickscore or hpsv2" ;;
    esac
}

usage() {
    echo "error: expected $1 first; see $repository/recipes/README.md" >&2
    exit 1
}

# test_images TRAINED OPTIONS...: test the text encoder of recipe TRAINED on PartiPrompts, into tests/RECIPE.
test_images() {
    encoder=${output}_$1/tc_text.safetensors
    shift
    [ "$miniature" ] || set -- --model "$repository/stable-diffusion-v1-5" "$@"
    launch test_parti.py --text_path "$encoder" --output_path "$repository/tests/${miniature:+miniature_}$recipe" "$@"
}

"""
Heat maps of words: where the UNet attends to each word of a prompt, with the original and the tuned text encoder.

$ python heatmaps.py "a red fox and a blue cat" --text_path output/tc_text.safetensors
$ python heatmaps.py "a red fox and a blue cat" --text_path output/tc_text.safetensors --model miniature -o fox.png

The program draws the prompt twice from the same noise and writes one picture. The upper row shows the image of the
original encoder, the lower row the image for which the tuned encoder drove the last --grad_steps steps. Beside each
image stands a map for every word: the cross-attention of guidance's conditional half, averaged over heads, layers and
those last steps. The steps before them are left out, since both images share them.
"""

from textcraftor.errors import run_program
from textcraftor.heatmap_options import parse_options
from textcraftor.options import check_all


def main(argv=None):
    """The program; UserError for what the user can mend."""
    args = parse_options(__doc__, argv)

    # Imported only now, so that mistakes on the command line are answered at once.
    import copy

    from accelerate import Accelerator

    from textcraftor.heatmaps import draw_with_maps, heatmap_page, prompt_words, word_maps
    from textcraftor.models import check_model, latent_shape, load_model, make_networks, quiet_libraries
    from textcraftor.pictures import save
    from textcraftor.precision import PRECISIONS, choose_precision
    from textcraftor.recorded import tunes_unconditional
    from textcraftor.sampling import make_scheduler, prompt_noise
    from textcraftor.weight_files import check_text_encoder, load_text_encoder

    check_all([(check_model, args.model), (check_text_encoder, args.text_path)])
    quiet_libraries()
    device = Accelerator(mixed_precision="no", dynamo_backend="no").device
    precision, why = choose_precision(args.mixed_precision, device)
    model = load_model(args.model)
    words, cut = prompt_words(model.tokenizer, args.prompt)
    tuned = copy.deepcopy(model.text_encoder)
    load_text_encoder(tuned, args.text_path)
    for network in (model.text_encoder, tuned, model.unet, model.vae):
        network.to(device, PRECISIONS[precision])
    scheduler = make_scheduler(model.scheduler_config, args.step)
    noise = prompt_noise(args.seed, [0], latent_shape(model))
    print(f"{len(words)} words, 2 images of {args.step} steps, on {device}, precision {precision} ({why})")

    drawn, both = [], tunes_unconditional([args.text_path])
    for encoder in (model.text_encoder, tuned):
        networks = make_networks(model, encoder, both)
        image, maps = draw_with_maps(
            networks, scheduler, args.prompt, noise, args.grad_steps, args.guidance, args.prompt_weighting
        )
        drawn.append((image, word_maps(maps, words)))
    note = (
        f"Cross-attention of each word, mean over heads, layers and the last {args.grad_steps} of {args.step} steps, "
        "which the tuned encoder drives in the lower row"
    )
    if cut:
        note += (
            f" · words beyond the {model.tokenizer.model_max_length} tokens that the model reads, without maps: {cut}"
        )
    save(heatmap_page(args.prompt, words, *drawn, note), args.output_path)
    print(f"wrote {args.output_path}")


if __name__ == "__main__":
    run_program(main)

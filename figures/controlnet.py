"""Figure 8: ControlNet with the tuned text encoder, without more training: edges, original encoder, tuned encoder.

python -m figures.controlnet --image photo.jpg --prompt "a red fox in the snow"
"""

from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image, ImageFilter

from figures.common import IMAGE, load, original_and_tuned, parse, starting_picture, write
from textcraftor.errors import UserError, first_line, run_program

CANNY = "lllyasviel/control_v11p_sd15_canny"


def main(argv=None):
    controlnet = ("--controlnet", CANNY, "ControlNet for edges, folder or hub id, of the same model")
    args = parse(__doc__, "controlnet", (IMAGE, controlnet), argv)
    pipeline = load(args)
    try:
        network = ControlNetModel.from_pretrained(args.controlnet).to(pipeline.device)
    except (OSError, ValueError, RuntimeError) as problem:
        raise UserError(f"--controlnet {args.controlnet}: cannot be loaded ({first_line(problem)})") from problem
    width, expected = network.config.cross_attention_dim, pipeline.unet.config.cross_attention_dim
    if width != expected:
        raise UserError(
            f"--controlnet {args.controlnet}: takes text embeddings of width {width}, the model's have {expected}: "
            "they are of different models"
        )
    edges = edges_of(starting_picture(pipeline, args))
    pipeline = StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=network)
    pictures = original_and_tuned(pipeline, args, image=edges)
    write(args, [[edges, *pictures]], ["edges, original, tuned"], "ControlNet")


def edges_of(picture):
    """White edges on black, one to two pixels wide, where a smoothed picture changes much."""
    smooth = picture.convert("L").filter(ImageFilter.GaussianBlur(1.4))
    edges = smooth.filter(ImageFilter.FIND_EDGES).point(lambda value: 255 * (value > 24))
    clean = Image.new("L", edges.size)
    clean.paste(edges.crop((2, 2, edges.width - 2, edges.height - 2)), (2, 2))  # the border is no edge
    return clean.convert("RGB")


if __name__ == "__main__":
    run_program(main)

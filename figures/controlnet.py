"""Figure 8: ControlNet with the tuned text encoder, without more training: edges, original encoder, tuned encoder.

python -m figures.controlnet --image photo.jpg --prompt "a red fox in the snow"
"""

from pathlib import Path

import numpy as np
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter

from figures.common import IMAGE, load, original_and_tuned, parse, starting_picture, write
from textcraftor.errors import UserError, first_line, run_program

CANNY = "lllyasviel/control_v11p_sd15_canny"


def main(argv=None):
    controlnet = ("--controlnet", CANNY, "ControlNet for edges, folder or hub id, of the same model")
    args = parse(__doc__, "controlnet", (IMAGE, controlnet), argv)
    try:
        network = ControlNetModel.from_pretrained(args.controlnet)
    except (OSError, ValueError, RuntimeError) as problem:
        raise UserError(f"--controlnet {args.controlnet}: cannot be loaded ({first_line(problem)})") from problem
    pipeline = load(args)
    width, expected = network.config.cross_attention_dim, pipeline.unet.config.cross_attention_dim
    if width != expected:
        raise UserError(
            f"--controlnet {args.controlnet}: takes text embeddings of width {width}, the model's have {expected}: "
            "they are of different models"
        )
    edges = edges_of(starting_picture(pipeline, args))
    pipeline = StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=network.to(pipeline.device))
    pictures = original_and_tuned(pipeline, args, image=edges)
    write(args, [[edges, *pictures]], [f"edges for {Path(args.controlnet).name}"], "ControlNet: edges, original, tuned")


def edges_of(picture):
    """White lines on black where brightness changes most across them: Canny's, without its weak ones."""
    grey = np.array(picture.convert("L"), dtype=np.float32)
    down, right = (gaussian_filter(grey, 1.4, order=order) for order in ((1, 0), (0, 1)))
    slope = np.hypot(down, right)
    steeper = [maximum_filter(slope, size) for size in ((3, 1), (1, 3))]  # among neighbours across the line
    ridge = slope == np.where(np.abs(down) > np.abs(right), *steeper)
    return Image.fromarray(np.uint8(255 * (ridge & (slope > 15)))).convert("RGB")


if __name__ == "__main__":
    run_program(main)

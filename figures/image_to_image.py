"""Image to image with the tuned text encoder: the picture to start from, the original encoder's and the tuned one's.

python -m figures.image_to_image --model miniature --image photo.jpg
"""

import math

from diffusers import StableDiffusionImg2ImgPipeline

from figures.common import IMAGE, load, original_and_tuned, parse, starting_picture, write
from textcraftor.errors import UserError, run_program


def main(argv=None):
    strength = ("--strength", 0.8, "how much to change: 0.8 skips the first fifth of the steps")
    args = parse(__doc__, "image_to_image", (IMAGE, strength), argv)
    if not (args.strength <= 1 and int(args.step * args.strength) >= 1):
        least = math.ceil(100 / args.step) / 100
        raise UserError(f"--strength {args.strength}: must be between {least}, a single step of {args.step}, and 1")
    pipeline = load(args)
    image = starting_picture(pipeline, args)
    pipeline = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    pictures = original_and_tuned(pipeline, args, image=image, strength=args.strength)
    write(args, [[image, *pictures]], [f"strength {args.strength}"], "image to image: start, original, tuned")


if __name__ == "__main__":
    run_program(main)

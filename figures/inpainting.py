"""Figure 9: inpainting with the tuned text encoder, without more training: input, original encoder, tuned encoder.

python -m figures.inpainting --model miniature
python -m figures.inpainting --image photo.jpg --mask mask.png --prompt "a red fox in the snow"
"""

from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageOps

from figures.common import IMAGE, load, original_and_tuned, parse, read_picture, starting_picture, write
from textcraftor.errors import run_program


def main(argv=None):
    mask = ("--mask", "", "picture that is white where to paint; without one, a square in the middle is painted")
    args = parse(__doc__, "inpainting", (IMAGE, mask), argv)
    given = read_picture(args.mask, "--mask").convert("L") if args.mask else None
    pipeline = load(args)
    image = starting_picture(pipeline, args)
    width, height = image.size
    if given:
        mask = ImageOps.fit(given, image.size)
    else:
        mask = Image.new("L", image.size)
        mask.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
    # The pipeline tells models for inpainting, of 9 channels, from others by their 4; a small model may have others.
    pipeline.unet.register_to_config(in_channels=4)
    pipeline = StableDiffusionInpaintPipeline.from_pipe(pipeline)
    pictures = original_and_tuned(pipeline, args, image=image, mask_image=mask, strength=1.0)
    hidden = Image.composite(Image.new("RGB", image.size, "gray"), image, mask)
    write(args, [[hidden, *pictures]], ["grey is painted"], "inpainting: input, original, tuned")


if __name__ == "__main__":
    run_program(main)

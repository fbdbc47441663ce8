"""What the figures share: options, loading, and drawing with the original and the tuned text encoder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from textcraftor.benchmark.images import image_size, load_pipeline
from textcraftor.errors import UserError, first_line
from textcraftor.files import check_picture_name
from textcraftor.image_files import upright_rgb
from textcraftor.models import check_model, quiet_libraries
from textcraftor.options import (
    MINIATURE_MODEL,
    TEST_SEED,
    TEST_STEPS,
    TEST_TUNED_STEPS,
    check_all,
    make_parser,
    miniature_defaults,
    require,
)
from textcraftor.pictures import grid, save
from textcraftor.pipelines import attach_encoder, detach_encoder
from textcraftor.recorded import shared_settings
from textcraftor.weight_files import check_text_encoder

MODEL = ("--model", "./stable-diffusion-v1-5", "SD v1 folder, single file or hub id; or `miniature`")
TEXT_PATH = ("--text_path", "output/tc_text.safetensors", "tuned text encoder: weight file, folder or hub id")
IMAGE = ("--image", "", "picture to start from; without one, the original model draws it from the prompt")


def parse(description, name, extra=(), argv=None, model=MODEL, text_path=TEXT_PATH, check=check_model):
    """Command line -> options of the figure `name`, whose model and tuned encoder exist."""
    quiet_libraries()
    prompt = ("--prompt", "a photo of a big fox on a blue background", "what to draw")
    common = (model, text_path, prompt, ("--seed", TEST_SEED, "seed of the noise"))
    output = ("-o --output", f"output_figures/{name}.png", "the picture to write")
    args = make_parser(description, (*common, *extra, output)).parse_args(argv)
    paths = args.text_path if isinstance(args.text_path, list) else [args.text_path]
    settings = {"step": TEST_STEPS, "grad_steps": TEST_TUNED_STEPS, "guidance": 7.5}
    if args.model == "miniature":
        args.model, settings["guidance"] = MINIATURE_MODEL, miniature_defaults()["guidance"]
    # What the encoders were trained for comes before these.
    per_encoder = {"tune_unconditional", "prompt_weighting"}  # attach_encoder reads them
    vars(args).update(settings | shared_settings(paths, per_encoder, "use encoders that agree"))
    require(args, {"seed": 0})
    if not args.prompt.strip():
        raise UserError("--prompt is empty; say what to draw")
    check_picture_name(Path(args.output), "--output")
    files = [(getattr(args, name, ""), f"--{name}") for name in ("image", "mask")]
    checks = [(read_picture, path, option) for path, option in files if path]
    check_all([(check, args.model), *((check_text_encoder, path) for path in paths), *checks])
    return args


def load(args):
    """A StableDiffusionPipeline with the settings of the tests: fp32, DDIM."""
    return load_pipeline(args.model, "DDIM", args.step)[0].to("cuda" if torch.cuda.is_available() else "cpu")


def draw(pipeline, args, **inputs):
    """One picture; the same options draw it from the same noise."""
    noise = torch.Generator().manual_seed(args.seed)
    options = {"num_inference_steps": args.step, "guidance_scale": args.guidance, "generator": noise} | inputs
    return pipeline(args.prompt, **options).images[0]


def original_and_tuned(pipeline, args, **inputs):
    """The same picture twice, without the tuned encoder and with it in the last steps."""
    original = draw(pipeline, args, **inputs)
    attach_encoder(pipeline, args.text_path, args.grad_steps)
    tuned = draw(pipeline, args, **inputs)
    detach_encoder(pipeline)
    return [original, tuned]


def starting_picture(pipeline, args):
    """--image, cropped and scaled to the model's size, or what the original model draws from the prompt."""
    if not args.image:
        return draw(pipeline, args)
    return ImageOps.fit(read_picture(args.image, "--image"), image_size(pipeline))


def read_picture(path, option):
    """A picture file as RGB; UserError names the option that asked for it."""
    try:
        with Image.open(path) as picture:
            return upright_rgb(picture)
    except (OSError, ValueError, Image.DecompressionBombError) as problem:
        why = getattr(problem, "strerror", None) or first_line(problem)
        raise UserError(f"{option} {path}: cannot be read as a picture ({why})") from problem


def write(args, groups, notes, title):
    """Write one picture with a cell for each group of PIL pictures of one size, which lie side by side."""
    cells = [[torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in group] for group in groups]
    save(grid(cells, [args.prompt] * len(cells), notes, title), args.output)
    print(args.output)

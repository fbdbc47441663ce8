"""Figure 7: the tuned ViT-L in SDXL in place of its own, the other encoder kept: original beside tuned.

python -m figures.sdxl --text_path output/tc_text.safetensors --prompt "a red fox in the snow"
"""

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from figures.common import original_and_tuned, parse, write
from textcraftor.errors import UserError, first_line, run_program

SDXL = ("--model", "stabilityai/stable-diffusion-xl-base-1.0", "SDXL folder or hub id")


def check_sdxl(model):
    """Raise UserError unless `model` is a folder or hub id of SDXL; fetches only its small index."""
    try:
        found = StableDiffusionXLPipeline.load_config(model).get("_class_name", "of no known kind")
    except (OSError, ValueError) as problem:
        raise UserError(f"--model {model}: no SDXL folder or hub id ({first_line(problem)})") from problem
    if "StableDiffusionXL" not in found:
        raise UserError(f"--model {model}: is {found}; expected SDXL, such as {SDXL[1]}")


def main(argv=None):
    args = parse(__doc__, "sdxl", argv=argv, model=SDXL, check=check_sdxl)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(args.model, add_watermarker=False)
    except (OSError, ValueError, RuntimeError, TypeError) as problem:
        raise UserError(f"--model {args.model}: cannot be loaded ({first_line(problem)})") from problem
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pictures = original_and_tuned(pipeline.to(device, dtype), args)
    write(args, [pictures], ["the second text encoder is SDXL's own"], "SDXL: original, tuned")


if __name__ == "__main__":
    run_program(main)

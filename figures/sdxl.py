"""Figure 7: the tuned ViT-L in SDXL in place of its own, the other encoder kept: original beside tuned.

python -m figures.sdxl --text_path output/tc_text.safetensors --prompt "a red fox in the snow"
"""

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from figures.common import TEXT_PATH, original_and_tuned, parse, write
from textcraftor.errors import UserError, first_line, run_program

SDXL = ("--model", "stabilityai/stable-diffusion-xl-base-1.0", "SDXL folder or hub id")


def main(argv=None):
    args = parse(__doc__, "sdxl", argv=argv, model=SDXL, text_path=TEXT_PATH, check=lambda model: None)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(args.model, torch_dtype=dtype, add_watermarker=False)
    except (OSError, ValueError, RuntimeError, TypeError) as problem:
        raise UserError(f"--model {args.model}: cannot be loaded as SDXL ({first_line(problem)})") from problem
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pictures = original_and_tuned(pipeline.to(device), args)
    write(args, [pictures], ["original, tuned"], "SDXL with the tuned first text encoder")


if __name__ == "__main__":
    run_program(main)

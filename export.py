"""
Write a tuned text encoder in the form that another program reads, and share it on the hub.

--form diffusers      a whole folder for StableDiffusionPipeline.from_pretrained
--form text_encoder   a folder for CLIPTextModel.from_pretrained, in transformers 4 and 5
--form clip_l         one file with the text encoder alone, for ComfyUI
--form checkpoint     one file with the whole model, for A1111, ComfyUI and others
--form lora           the difference to the original encoder as a LoRA, for diffusers and ComfyUI
--form lora_kohya     the same under the names of kohya's scripts, for A1111 and ComfyUI

$ python export.py --text_path output/tc_text.safetensors --form checkpoint -o tuned.safetensors
$ python export.py --text_path output/tc_text.safetensors --form lora --lora_rank 32 -o tuned_lora.safetensors
$ python export.py --text_path output/tc_text.safetensors --form text_encoder -o tuned --push_to_hub USER/NAME

The hub wants a login: `hf auth login`, or HF_TOKEN.
"""

from pathlib import Path

from textcraftor.errors import run_program
from textcraftor.exporting.options import parse_options
from textcraftor.options import check_all

if __name__ == "__main__":
    run_program(lambda: parse_options(__doc__))  # before the slow imports: --help and mistakes are answered at once

import torch

from textcraftor.exporting.card import find_run, model_card, run_parts
from textcraftor.exporting.forms import export
from textcraftor.exporting.hub import check_access, upload
from textcraftor.merging import check_same
from textcraftor.models import check_model, quiet_libraries
from textcraftor.recorded import recorded_settings
from textcraftor.weight_files import check_text_encoder, read_text_encoder


def main(argv=None):
    args = parse_options(__doc__, argv)
    quiet_libraries()
    check_all([(check_model, args.model), (check_text_encoder, args.text_path)])
    if args.push_to_hub:
        run = find_run(args.run, args.text_path)
        training = run_parts(run, args.text_path)
        check_access(args.push_to_hub)
    tuned, original = (read_text_encoder(path, args.model) for path in (args.text_path, args.model))
    check_same(tuned, args.text_path, original, args.model)
    output, dtype = Path(args.output_path), torch.float16 if args.half else torch.float32
    settings = recorded_settings(args.text_path)
    note = export(args.form, args.model, original, tuned, output, dtype, args.lora_rank, settings)
    print(f"{output}: {note}")
    if args.push_to_hub:
        card = model_card(args.push_to_hub, args.form, output.name, args.model, training, note, settings)
        print(upload(args.push_to_hub, output, card, run, args.private))


if __name__ == "__main__":
    run_program(main)

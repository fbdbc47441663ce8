"""Options of export.py. Nothing here imports torch: --help and mistakes are answered at once."""

import re
from pathlib import Path

from textcraftor.errors import UserError
from textcraftor.files import check_writable
from textcraftor.options import MINIATURE_MODEL, make_parser, require
from textcraftor.run_folder import OPTIONS_FILE

FILE_FORMS = ("clip_l", "checkpoint", "lora", "lora_kohya")
FOLDER_FORMS = ("diffusers", "text_encoder")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

# fmt: off
OPTIONS = (
    ("--text_path",        "",                        "tuned text encoder: a weight file, folder or hub id"),
    ("--model",            "./stable-diffusion-v1-5", "its SD v1: folder, single file or hub id; or `miniature`"),
    ("--form",             (*FOLDER_FORMS, *FILE_FORMS), "what to write, see above"),
    ("-o --output_path",   "",                        "folder or .safetensors file to write; must not exist yet"),
    ("--half",             False,                     "write fp16 instead of fp32"),
    ("--lora_rank",        16,                        "rank of the LoRA; more is closer to the tuned encoder"),
    ("--push_to_hub",      "",                        "USER/NAME on the hub to upload to, with a model card"),
    ("--private",          False,                     "make a new hub repository private"),
    ("--run",              "",                        "training run to describe (default: folder of --text_path)"),
)
# fmt: on


def parse_options(description: str, argv: list[str] | None = None):
    """Command line -> options, checked as far as that needs no model. Raises UserError, one line."""
    args = make_parser(description, OPTIONS).parse_args(argv)
    if args.model == "miniature":
        args.model = MINIATURE_MODEL
    if not args.text_path:
        raise UserError("--text_path is missing: name the tuned text encoder, such as output/tc_text.safetensors")
    if not args.output_path:
        example = "exported.safetensors" if args.form in FILE_FORMS else "exported/"
        raise UserError(f"--output_path is missing: name what to write, such as {example}")
    require(args, {"lora_rank": 1})
    if args.form in FILE_FORMS:
        check_new_file(args.output_path)
    else:
        check_new_folder(args.output_path)
    if args.push_to_hub and not REPO_ID.fullmatch(args.push_to_hub):
        raise UserError(f"--push_to_hub {args.push_to_hub}: expected USER/NAME, such as ada/textcraftor-anime")
    if args.run and not (Path(args.run) / OPTIONS_FILE).is_file():
        raise UserError(f"--run {args.run}: no options.json in it; expected the output folder of a training run")
    if args.run and not args.push_to_hub:
        raise UserError("--run: is for the model card of --push_to_hub; leave it out, or give --push_to_hub USER/NAME")
    return args


def check_new_file(path: Path | str) -> None:
    """Raise UserError unless `path` is a new .safetensors file in a place where one can be written."""
    if Path(path).suffix != ".safetensors":
        raise UserError(f"--output_path {path}: expected a file name that ends in .safetensors")
    if Path(path).exists():
        raise UserError(f"--output_path {path}: exists already; delete it or choose another name")
    check_writable(Path(path).parent, "--output_path")


def check_new_folder(path: Path | str) -> None:
    """Raise UserError unless `path` is a new folder, or an empty one, in a place where one can be written."""
    path = Path(path)
    if path.suffix == ".safetensors":
        raise UserError(f"--output_path {path}: this form is a folder; expected a name without .safetensors")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"--output_path {path}: exists already; delete it or choose another name")
    check_writable(Path(path).parent, "--output_path")

"""The options of heatmaps.py, and the words of a prompt. Nothing here imports torch: mistakes are answered at once."""

from pathlib import Path

import regex

from textcraftor.errors import UserError
from textcraftor.files import check_picture_name
from textcraftor.options import (
    MINIATURE_MODEL,
    TEST_SEED,
    TEST_TUNED_STEPS,
    check_tuned_steps,
    make_parser,
    miniature_defaults,
    require,
)
from textcraftor.recorded import shared_settings

# fmt: off
OPTIONS = (
    ("--text_path",        "",                        "tuned text encoder: safetensors, .pth, folder or hub id"),
    ("--model",            "./stable-diffusion-v1-5", "SD v1 folder, single file or hub id; or `miniature`"),
    ("-o --output_path",   "heatmaps.png",            "the picture to write, a PNG file"),
    ("--step",             25,                        "T, number of DDIM steps"),
    ("--grad_steps",       TEST_TUNED_STEPS,          "last steps that use the tuned encoder; the maps average them"),
    ("--guidance",         7.5,                       "classifier-free guidance scale"),
    ("--prompt_weighting", 1.0,                       "w: tuned steps use w * tuned + (1 - w) * original embeddings"),
    ("--seed",             TEST_SEED,                 "seed of the noise, which both images share"),
    ("--mixed_precision",  ("auto", "no", "fp16", "bf16"), "precision of the networks; maps are always fp32"),
)
# fmt: on

# One word each: a Chinese character, since Chinese has no spaces; a run of letters and digits, with the apostrophes and
# hyphens inside it; an emoji or another symbol with all that modifies it. Punctuation belongs to no word.
LETTERS = r"[[\p{L}\p{M}\p{N}]--\p{Han}]+"
WORD = regex.compile(rf"(?V1)\p{{Han}}|{LETTERS}(?:['’\-]{LETTERS})*|(?=\p{{S}})\X")


def parse_options(description, argv=None):
    """Command line -> options, all checked.

    Steps, guidance and weighting are by default those that the encoder was trained for, then the miniature's own
    guidance. Raises UserError, one line, for options that make no sense.
    """
    parser = make_parser(description, OPTIONS)
    parser.add_argument("prompt", help="what to draw, in quotes")
    args = parser.parse_args(argv)
    if args.model == "miniature":
        parser.set_defaults(guidance=miniature_defaults()["guidance"])
    settings = shared_settings([args.text_path], set()) if args.text_path else {}
    parser.set_defaults(**{name: value for name, value in settings.items() if hasattr(args, name)})
    args = parser.parse_args(argv)
    if args.model == "miniature":
        args.model = MINIATURE_MODEL
    check_options(args)
    return args


def check_options(args):
    """Raise UserError, one line, for options that make no sense together or a picture that could not be written."""
    require(args, {"step grad_steps guidance": 1, "prompt_weighting seed": 0})
    check_tuned_steps(args)
    if not args.text_path:
        raise UserError("no --text_path: name the tuned text encoder to compare with the original one")
    if not word_spans(args.prompt):
        raise UserError(f"the prompt {args.prompt!r} has no word: nothing to draw a map of")
    check_picture_name(Path(args.output_path), "--output_path")


def word_spans(prompt):
    """Where the words of a prompt lie: [(start, end)] in characters, in order."""
    return [found.span() for found in WORD.finditer(prompt)]

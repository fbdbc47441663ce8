"""The options of test_parti.py and test_hpsv2.py. Nothing here imports torch: --help and mistakes answer at once."""

from argparse import Namespace
from pathlib import Path

from textcraftor.benchmark.prompt_lists import Benchmark
from textcraftor.errors import UserError
from textcraftor.files import check_writable
from textcraftor.mixing import Weighted, parse_weighted
from textcraftor.options import (
    MINIATURE,
    MINIATURE_MODEL,
    REPOSITORY,
    SCHEDULERS,
    TEST_SEED,
    TEST_TUNED_STEPS,
    check_tuned_steps,
    given_options,
    make_parser,
    miniature_defaults,
    require,
)
from textcraftor.recorded import TESTED, shared_settings

MODEL = "./stable-diffusion-v1-5"
PAPER = "checkpoints/tc_text_e_0_iter_10000.pth"  # the paper's text encoder
EXTENDER = "daspartho/prompt-extend"
PROMPT_ENG = (
    "extend each prompt with a language model, a folder or hub id "
    f"(without a name: {EXTENDER}, or the miniature's own with --model miniature)"
)

# fmt: off
OPTIONS = (
    ("--model",            MODEL,               "SD v1 folder, file or hub id; or `miniature` with its own prompts"),
    ("--weights",          str(REPOSITORY),     "folder that holds hpsv2/, pickscore/ and aesthetic/"),
    ("--text_path",        [],                  "tuned text encoder: weight file, folder or hub id; to mix several, "
                                                "repeat it with weights, PATH=WEIGHT"),
    ("--unet_path",        "",                  "tuned UNet, in the same formats"),
    ("--prompts",          "",                  "the benchmark's prompts (default: prompts/, downloaded once)"),
    ("--limit",            0,                   "use only the first prompts (of each style); 0 = all"),
    ("--output_path",      "",                  "output folder (default: below tests/, or the folder of --score_only)"),
    ("--score_only",       "",                  "generate nothing; score the images in this folder, made by any model"),
    ("--hps_version",      ("2.0", "2.1"),      "HPS v2 weights; scores of different versions cannot be compared"),
    # Sampling.
    ("--scheduler",        tuple(SCHEDULERS),   "sampler; DDIM is the one used in training"),
    ("--step",             25,                  "T, number of sampling steps"),
    ("--grad_steps",       TEST_TUNED_STEPS,    "number of last steps that use the tuned text encoder"),
    ("--guidance",         7.5,                 "classifier-free guidance scale"),
    ("--tune_unconditional", ("", "on", "off"), "tuned encoder for the empty prompt too (default: as trained, or on)"),
    ("--bank",             "",                  "folder that caches the first steps for later tests (DDIM only)"),
    ("--prompt_weighting", 1.0,                 "w: tuned steps use w * tuned + (1 - w) * original embeddings"),
    ("--seed",             TEST_SEED,           "seed of the noise; each prompt has its own noise"),
    ("--batch-size",       8,                   "images per batch on each device"),
    ("--mixed_precision",  ("auto", "no", "fp16", "bf16"), "precision of image generation; scores are always fp32"),
    ("--score_prompt",     ("", "extended", "original"), "with --prompt_eng: prompt to score (default: extended)"),
)
# fmt: on
# Options that change the images. The images of --score_only were made without them.
SAMPLING = ("scheduler", "step", "grad_steps", "guidance", "prompt_weighting", "tune_unconditional", "seed")


def parse_options(benchmark: Benchmark, description: str, argv: list[str] | None = None) -> Namespace:
    """Command line -> checked options. `fetch`: whether missing prompts may be downloaded; `encoders`: the tuned text
    encoders, a list of mixing.Weighted paths; `text_path`: the same as one string, for results.

    `--model miniature` brings its own defaults; flags that are given win. Raises UserError, one line, for options that
    make no sense.
    """
    parser = make_parser(description, OPTIONS)
    parser.add_argument(
        "--prompt_eng", "--prompt-eng", nargs="?", const=True, default="", metavar="MODEL", help=PROMPT_ENG
    )
    args = parser.parse_args(argv)
    encoders = parse_encoders(args.text_path)
    if args.score_prompt and not args.prompt_eng:
        raise UserError(f"--score_prompt {args.score_prompt}: only works with --prompt_eng; leave it out")
    parser.set_defaults(score_prompt="extended")
    args = parser.parse_args(argv)
    args.encoders = encoders
    default_output = f"tests/{run_name(args, benchmark.name, parser.get_default)}"
    fetch, extender, miniature = not args.prompts, EXTENDER, args.model == "miniature"
    given = given_options(parser, argv, TESTED)
    if miniature:
        guidance, prompts = miniature_defaults()["guidance"], str(MINIATURE / "benchmarks" / benchmark.prompts)
        parser.set_defaults(weights=str(MINIATURE), prompts=prompts, guidance=guidance, batch_size=16)
    # What the weights were trained for comes before these defaults, and flags come before both.
    tuned = [path for path, _ in encoders] + ([args.unet_path] if args.unet_path else [])
    parser.set_defaults(**{"tune_unconditional": "on"} | shared_settings(tuned, given))
    args = parser.parse_args(argv)
    args.tune_unconditional = args.tune_unconditional or parser.get_default("tune_unconditional")
    args.fetch = fetch
    if miniature:
        args.model, args.fetch, extender = MINIATURE_MODEL, False, str(MINIATURE / "extender")
    args.encoders, args.text_path = encoders, " ".join(args.text_path)
    args.prompt_eng = extender if args.prompt_eng is True else args.prompt_eng
    args.prompts = args.prompts or str(REPOSITORY / "prompts" / benchmark.prompts)
    args.output_path = args.output_path or args.score_only or default_output
    check_options(args)
    return args


def parse_encoders(specs: list[str]) -> list[Weighted]:
    """The values of --text_path -> the tuned text encoders; none for the empty string.

    Raises UserError for a weight that is not a number, and if one of several encoders has no weight.
    """
    specs = [spec for spec in specs if spec]
    encoders = [parse_weighted(spec) for spec in specs]
    for spec, (path, _) in zip(specs, encoders, strict=True):
        if len(specs) > 1 and spec == path:
            raise UserError(
                f"--text_path {path}: has no weight; to mix several encoders give each one, such as {path}=0.5"
            )
    return encoders


def run_name(args, benchmark, default):
    """What is tested, on which benchmark and how, as a folder name: "paper_ckpt_parti", "original_hpsv2_v2.1", ...

    default: function that returns an option's default value; only other values become part of the name.
    """
    names = [] if args.model == MODEL else [_last_parts(args.model, 1)]
    for path, weight in (*args.encoders, Weighted(args.unet_path)):
        name = "paper_ckpt" if Path(path) == Path(PAPER) else _last_parts(path, 2) if path else ""
        names += [f"{name}_{weight:g}" if weight != 1 else name] if name else []
    names = [*(names or ["original"]), *(["prompt_eng"] if args.prompt_eng else []), benchmark]
    for option, prefix in (("hps_version", "v"), ("score_prompt", "score_"), ("scheduler", ""), ("seed", "seed_")):
        value = getattr(args, option)
        names += [f"{prefix}{value}"] if value != default(option) else []
    return "_".join(names)


def _last_parts(path, count):
    """The last `count` parts of a path, joined, without the suffixes of weight files."""
    parts = [part for part in Path(path).parts[-count:] if part.strip("./")]
    parts = parts or [Path(path).resolve().name]
    return "_".join(part.removesuffix(".safetensors").removesuffix(".pth") for part in parts)


def check_options(args):
    """Raise UserError, one line, for options that make no sense together or cannot work."""
    require(args, {"step batch_size guidance": 1, "grad_steps limit seed prompt_weighting": 0})
    check_tuned_steps(args)
    if args.bank and (args.scheduler != "DDIM" or args.score_only or args.grad_steps == args.step):
        why = {
            args.scheduler != "DDIM": f"--scheduler {args.scheduler} cannot continue from cached latents",
            args.grad_steps == args.step: f"--grad_steps {args.grad_steps} tunes every step",
            bool(args.score_only): "--score_only makes no images",
        }[True]
        raise UserError(f"--bank caches the steps before the tuned ones, but {why}; leave --bank out")
    if args.bank:
        check_writable(args.bank, "--bank")
    if args.score_only and not Path(args.score_only).is_dir():
        raise UserError(f"--score_only {args.score_only}: no such folder; expected a folder of images")
    if args.score_only and args.prompt_eng:
        raise UserError("--score_only --prompt_eng: prompts are extended only where images are generated; drop one")

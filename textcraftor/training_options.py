"""The training script's options. Nothing here imports torch, so --help and errors appear at once."""

import importlib.util
import secrets
import sys
from pathlib import Path

from rewards import REWARDS
from textcraftor.errors import UserError
from textcraftor.files import check_writable
from textcraftor.options import (
    MINIATURE,
    MINIATURE_MODEL,
    REPOSITORY,
    TEST_TUNED_STEPS,
    given_options,
    make_parser,
    miniature_defaults,
    require,
    reward_specs,
)
from textcraftor.recorded import recorded_settings
from textcraftor.run_folder import check_folder

# fmt: off
OPTIONS = (  # Defaults: the released script's. Names may be written with `_` or `-`.
    ("--model",            "./stable-diffusion-v1-5", "SD v1 folder, single file or hub id; or `miniature`"),
    ("--weights",          str(REPOSITORY),           "folder that holds hpsv2/, pickscore/ and aesthetic/"),
    ("--text_path",        "",                        "tuned text encoder to start from (frozen with --lr_text 0)"),
    ("--prompts",          "openprompts.csv",         "training prompts: a csv, tsv, txt, jsonl or parquet file"),
    ("--method",           ("prompts", "direct"),     "direct = noise --images, then denoise in one step (sec. 3.2.1)"),
    ("--images",           "",                        "folder of captioned pictures, for --method direct"),
    ("--val_prompts",      "",                        "held-out prompts (default: the first of --prompts)"),
    ("--val_count",        16,                        "number of held-out prompts"),
    ("--output-path",      "output",                  "folder for weights, metrics, pictures and training state"),
    # Rewards.
    *((f"--{name}", weight, comment) for name, (weight, comment) in REWARDS.items()),
    ("--reward",           [],                        "your own reward: path/to/file.py:function=weight (repeatable)"),
    ("--monitor",          [],                        "rewards to report but not train on: names or file.py:function"),
    # Against gaming the rewards; all off by default.
    ("--clip_constraint",  0.0,                       "weight of 100 cos(image, tuned text embedding), eq. 8; 0 = off"),
    ("--anchor",           0.0,                       "weight of penalty 1 - cos(tuned, original embedding); try 0.1"),
    ("--shared_text",      1.0,                       "scale of the text features' mean direction; 1 = off, try 0.3"),
    ("--smooth",           0.0,                       "shift pixels by this RMS toward a lower reward first; try 0.01"),
    ("--ema",              0.0,                       "EMA decay of the weights, ramped up; 0 = no EMA, try 0.995"),
    # Training.
    ("--lr_text",          1e-6,                      "learning rate of the text encoder; 0 = frozen"),
    ("--lr_unet",          0.0,                       "learning rate of the UNet; 0 = frozen"),
    ("--lora_rank",        0,                         "train a LoRA of this rank, not all weights; 0 = all weights"),
    ("--lora_alpha",       0.0,                       "LoRA alpha (its scale is alpha / rank); 0 = same as the rank"),
    ("--lr_warmup_steps",  0,                         "steps of linear learning-rate warm-up"),
    ("--lr_scheduler",     ("constant_with_warmup", "linear", "cosine"), "schedule after warm-up"),
    ("--max_grad_norm",    0.0,                       "clip the gradient to this norm; 0 = no clipping"),
    # Sampling.
    ("--step",             25,                        "T, number of DDIM sampling steps"),
    ("--gradient",         ("last_k", "drtune", "refl"), "last_k: last K steps; drtune: K of --driven; refl: one"),
    ("--grad_steps",       "5",                       "K, number of steps with gradient; 1-5 = random per update"),
    ("--driven",           15,                        "drtune, refl: pick the steps with gradient from this many last"),
    ("--guidance",         7.5,                       "classifier-free guidance scale"),
    ("--prompt_weighting", 1.0,                       "w: tuned steps use w * tuned + (1 - w) * original embeddings"),
    ("--bank",             "",                        "cache folder for first sampling steps (--reuse: OUTPUT/bank)"),
    ("--reuse",            1,                         "times to train on each prompt and noise, from cached steps"),
    ("--fill",             False,                     "fill the --bank for the whole run, then stop; no training"),
    ("--tune_unconditional", ("", "on", "off"),       "tune the empty prompt too (default: as --text_path was tuned, "
                                                      "else on; miniature: off)"),
    ("--t_min",            0,                         "--method direct: lowest timestep to noise the images to"),
    ("--t_max",            999,                       "--method direct: highest timestep to noise the images to"),
    # Batches and duration.
    ("--batch-size",       4,                         "prompts per micro-batch on each GPU"),
    ("--gradient_accumulation_steps", 1,              "micro-batches per optimizer step"),
    ("--max_steps",        10_000,                    "optimizer steps to train for; 0 = no limit"),
    ("--epochs",           0,                         "passes over the prompts to train for; 0 = no limit"),
    ("--sample_every",     100,                       "steps between sample pictures; 0 = none"),
    ("--val_every",        100,                       "steps between validations; 0 = first and last only"),
    ("--save_every",       250,                       "steps between checkpoints; 0 = at the end only"),
    ("--keep_checkpoints", 3,                         "number of newest checkpoints to keep, plus the best; 0 = all"),
    ("--resume",           False,                     "continue the run in --output-path"),
    ("--seed",             0,                         "random seed of prompt order and noise"),
    # Speed and memory.
    ("--mixed_precision",  ("auto", "no", "fp16", "bf16"), "auto = bf16 if the hardware is fast at it; no = fp32"),
    ("--gradient_checkpointing", ("full", "none"),    "none = 12 % less compute, but keeps all activations"),
    ("--vae_checkpointing", False,                    "recompute the VAE one image at a time, to save memory"),
    ("--compile",          False,                     "torch.compile the UNet's transformer blocks"),
    # Tracking.
    ("--report_to",        ("", "tensorboard", "wandb"), "tracker for scores and sample pictures"),
    ("--project_name",     "textcraftor",             "project name in the tracker"),
)
# fmt: on

WAY = ("gradient", "grad_steps", "driven", "reuse")  # where the gradient goes

# Options that may change on --resume. Files are compared by content (run_folder.Record.resume), not by path.
FREE_ON_RESUME = {
    "resume", "output_path", "weights", "model", "text_path", "prompts", "val_prompts", "images", "reward", "monitor",
    "bank", "fill", "batch_size", "gradient_accumulation_steps", "epochs", "max_steps", "sample_every", "val_every",
    "save_every", "keep_checkpoints", "gradient_checkpointing", "vae_checkpointing", "compile", "report_to",
    "project_name",
}  # fmt: skip


def parse_options(argv=None):
    """Parse and check the command line -> options, including `weighted` {reward: weight} and `monitored` [reward].

    `--model miniature` sets the miniature's own defaults; explicit flags override them. Those of WAY belong together:
    --gradient, --grad_steps and what they cannot be used for bring back SD v1.5's defaults of all. Raises UserError
    (one line) for invalid options.
    """
    parser = make_parser(
        "TextCraftor: fine-tune the text encoder of Stable Diffusion with differentiable rewards.", OPTIONS
    )
    args, tune_unconditional = parser.parse_args(argv), "on"
    if args.model == "miniature":
        defaults = miniature_defaults()
        tune_unconditional = defaults.pop("tune_unconditional")
        if given_options(parser, argv, WAY[:2]) or args.lr_unet or args.method == "direct":
            defaults = {name: value for name, value in defaults.items() if name not in WAY}
        for name in {"prompts", "val_prompts"} & defaults.keys():
            defaults[name] = str(REPOSITORY / defaults[name])
        defaults["monitor"] = [] if args.monitor else [str(REPOSITORY / spec) for spec in defaults.get("monitor", [])]
        parser.set_defaults(weights=str(MINIATURE), **defaults)
        args = parser.parse_args(argv)
        args.model = MINIATURE_MODEL
    check_options(args)
    check_used(args, given_options(parser, argv, ("driven", "t_min", "t_max")))
    # Where training goes on from weights, they say it.
    recorded = recorded_settings(args.text_path).get("tune_unconditional", tune_unconditional)
    args.tune_unconditional = args.tune_unconditional or recorded
    named = {name: getattr(args, name) for name in REWARDS}
    args.weighted, args.monitored = reward_specs(named, args.reward, args.monitor)
    return args


def read_range(name, text):
    """ "5" -> (5, 5), "1-5" -> (1, 5); UserError for anything else."""
    low, _, high = text.partition("-")
    try:
        low, high = int(low), int(high or low)
    except ValueError:
        low = 0
    if not 1 <= low <= high:
        raise UserError(f"--{name} {text}: expected a number of at least 1, or a range such as 1-5")
    return low, high


def check_options(args):
    """Raise UserError (one line) for options that are invalid or contradict each other."""
    require(args, {
        "step driven reuse batch_size gradient_accumulation_steps val_count guidance": 1,
        "lr_text lr_unet lora_rank lora_alpha lr_warmup_steps max_grad_norm max_steps epochs seed keep_checkpoints": 0,
        "prompt_weighting sample_every val_every save_every anchor smooth ema clip_constraint shared_text": 0,
    })  # fmt: skip
    if not (args.prompt_weighting or args.lr_unet or args.clip_constraint):
        raise UserError("--prompt_weighting 0: images would not depend on the tuned text encoder; use more, such as 1")
    if args.ema >= 1:
        raise UserError(f"--ema {args.ema}: must be below 1, such as 0.995; 0 = no average")
    if args.anchor and not args.lr_text:
        raise UserError(f"--anchor {args.anchor} --lr_text 0: the text encoder is frozen; leave out one of the two")
    if not 0 <= args.t_min <= args.t_max <= 999:
        raise UserError(f"--t_min {args.t_min} --t_max {args.t_max}: expected 0 <= t_min <= t_max <= 999")
    if (args.method == "direct") != bool(args.images):
        raise UserError("--method direct and --images FOLDER belong together: give both, or neither")
    args.grad_steps = str(args.grad_steps)  # the miniature's default is a number
    args.grad_range = read_range("grad_steps", args.grad_steps)
    if args.gradient == "refl" and args.grad_range != (1, 1):
        raise UserError(f"--gradient refl --grad_steps {args.grad_steps}: refl uses one step; add --grad_steps 1")
    name, among = ("step", args.step) if args.gradient == "last_k" else ("driven", args.driven)
    if not args.grad_range[1] <= among <= args.step <= 1000:
        driven = "" if name == "step" else f" --driven {args.driven}"
        raise UserError(
            f"--grad_steps {args.grad_steps}{driven} --step {args.step}: expected grad_steps <= "
            f"{'' if name == 'step' else 'driven <= '}step <= 1000, since the steps with gradient are among the last"
        )
    if args.fill and not args.bank:
        raise UserError("--fill needs a folder to keep the first sampling steps in; add --bank FOLDER")
    if args.reuse > 1 and not args.bank:
        args.bank = str(Path(args.output_path) / "bank")
    if args.bank:
        check_bank(args)
    if args.lora_alpha and not args.lora_rank:
        raise UserError(f"--lora_alpha {args.lora_alpha} scales a LoRA; set its rank as well, such as --lora_rank 16")
    if args.lora_rank and args.lr_text and args.text_path:
        raise UserError(
            f"--lora_rank {args.lora_rank} --text_path {args.text_path}: a LoRA can only start from the original "
            "text encoder, to which every program adds it; leave out --text_path, or leave out --lora_rank to train "
            "all weights"
        )
    if args.epochs == args.max_steps == 0:
        raise UserError("--epochs 0 --max_steps 0: training would never end; limit one of them")
    if args.lr_text == args.lr_unet == 0:
        raise UserError("--lr_text 0 --lr_unet 0: nothing would be trained; set one to a learning rate such as 1e-6")
    if args.report_to and importlib.util.find_spec(args.report_to) is None:
        install = f"{sys.executable} -m pip install {args.report_to}"
        raise UserError(f"--report_to {args.report_to}: not installed; run: {install}")
    if not args.fill:  # which writes nothing there
        check_folder(args.output_path, args.resume)


def check_used(args, given: set[str]):
    """Raise UserError if one of the options that are `given` would do nothing."""
    unused = {"driven": "--gradient drtune or refl"} if args.gradient == "last_k" else {}
    if args.method == "prompts":
        unused |= dict.fromkeys(("t_min", "t_max"), "--method direct --images FOLDER")
    for name in sorted(given & unused.keys()):
        raise UserError(f"--{name} {getattr(args, name)}: only works with {unused[name]}; add that, or drop --{name}")


def check_bank(args):
    """Raise UserError if this run has no first steps to keep, or cannot keep them."""
    first_tuned = args.step - (args.grad_range[1] if args.gradient == "last_k" else args.driven)
    why = {
        bool(args.lr_unet): "--lr_unet trains the UNet, which changes them",
        args.method == "direct": "--method direct has none",
        not first_tuned and args.gradient != "refl": f"all {args.step} steps are tuned",
    }.get(True)
    if why:
        raise UserError(f"--bank and --reuse cache the first sampling steps, but {why}; leave both out")
    check_writable(args.bank, "--bank")


def tested_steps(args):
    """How many of the last steps the tuned encoder drives in validation and in tests: with drtune as many as in
    training, otherwise 15, or all of fewer."""
    return args.driven if args.gradient == "drtune" else min(args.step, TEST_TUNED_STEPS)


def sampling_settings(args):
    """How this run samples, for the metadata of its weights: the test programs' defaults, and what made them.

    grad_steps is that of the test programs, see tested_steps.
    """
    tested = {"step": args.step, "grad_steps": tested_steps(args), "guidance": args.guidance}
    tested |= {"prompt_weighting": args.prompt_weighting}
    trained = {"gradient": args.gradient, "trained grad_steps": args.grad_steps, "method": args.method}
    return tested | {"tune_unconditional": args.tune_unconditional} | trained


def recorded_options(args, global_batch, last_step, content):
    """Options to record in options.json -> (options, names of those that must not change on --resume).

    global_batch: images per step; content: see hashes.run_content. "tracker run" is a new id for the tracker's run.
    """
    options = {name: value for name, value in vars(args).items() if name not in ("weighted", "monitored", "grad_range")}
    options["reward weights"] = {spec.rpartition(":")[2]: weight for spec, weight in args.weighted.items()}
    options |= {"images per step": global_batch, "content": content}
    if args.lr_scheduler != "constant_with_warmup":
        options["last step"] = last_step  # the learning rate of every step depends on it
    compared = [name for name in options if name not in FREE_ON_RESUME]
    return options | {"tracker run": secrets.token_hex(4)}, compared

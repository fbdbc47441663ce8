"""The training script's options. Nothing here imports torch, so --help and errors appear at once."""

import importlib.util
import json
import secrets
from pathlib import Path

from rewards import REWARDS
from textcraftor.errors import UserError
from textcraftor.options import make_parser, require, reward_specs
from textcraftor.run_folder import check_folder

REPOSITORY = Path(__file__).resolve().parents[1]

# fmt: off
OPTIONS = (  # Defaults: the released script's. Names may be written with `_` or `-`.
    ("--model",            "./stable-diffusion-v1-5", "SD v1 folder, single file or hub id; or `miniature`"),
    ("--weights",          str(REPOSITORY),           "folder that holds hpsv2/, pickscore/ and aesthetic/"),
    ("--text_path",        "",                        "tuned text encoder to start from (frozen with --lr_text 0)"),
    ("--prompts",          "openprompts.csv",         "training prompts: a csv, tsv, txt, jsonl or parquet file"),
    ("--val_prompts",      "",                        "held-out prompts (default: the first of --prompts)"),
    ("--val_count",        16,                        "number of held-out prompts"),
    ("--output-path",      "output",                  "folder for weights, metrics, pictures and training state"),
    # Rewards.
    *((f"--{name}", weight, comment) for name, (weight, comment) in REWARDS.items()),
    ("--reward",           [],                        "your own reward: path/to/file.py:function=weight (repeatable)"),
    ("--monitor",          [],                        "rewards to report but not train on: names or file.py:function"),
    # Training.
    ("--lr_text",          1e-6,                      "learning rate of the text encoder; 0 = frozen"),
    ("--lr_unet",          0.0,                       "learning rate of the UNet; 0 = frozen"),
    ("--lr_warmup_steps",  0,                         "steps of linear learning-rate warm-up"),
    ("--lr_scheduler",     ("constant_with_warmup", "linear", "cosine"), "schedule after warm-up"),
    ("--max_grad_norm",    0.0,                       "clip the gradient to this norm; 0 = no clipping"),
    # Sampling.
    ("--step",             25,                        "T, number of DDIM sampling steps"),
    ("--grad_steps",       5,                         "K, number of last steps with tuned embeddings and gradient"),
    ("--guidance",         7.5,                       "classifier-free guidance scale"),
    ("--prompt_weighting", 1.0,                       "w: tuned steps use w * tuned + (1 - w) * original embeddings"),
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
    ("--mixed_precision",  ("auto", "no", "fp16", "bf16"), "auto = bf16 where it is fast, else fp32 (no)"),
    ("--gradient_checkpointing", ("full", "none"),    "none = 12 % less compute, much more memory"),
    ("--vae_checkpointing", False,                    "recompute the VAE one image at a time, to save memory"),
    ("--compile",          False,                     "torch.compile the UNet's transformer blocks"),
    # Tracking.
    ("--report_to",        ("", "tensorboard", "wandb"), "tracker for scores and sample pictures"),
    ("--project_name",     "textcraftor",             "project name in the tracker"),
)
# fmt: on

# Options that may change on --resume. Files are compared by content (run_folder.Record.resume), not by path.
FREE_ON_RESUME = {
    "resume", "output_path", "weights", "model", "text_path", "prompts", "val_prompts", "reward", "monitor",
    "batch_size", "gradient_accumulation_steps", "epochs", "max_steps", "sample_every", "val_every", "save_every",
    "keep_checkpoints", "gradient_checkpointing", "vae_checkpointing", "compile", "report_to", "project_name",
}  # fmt: skip


def parse_options(argv=None):
    """Parse and check the command line -> options, including `weighted` {reward: weight} and `monitored` [reward].

    `--model miniature` sets the miniature's own defaults; explicit flags override them. Raises UserError (one line) for
    invalid options.
    """
    parser = make_parser(
        "TextCraftor: fine-tune the text encoder of Stable Diffusion with differentiable rewards.", OPTIONS
    )
    args = parser.parse_args(argv)
    if args.model == "miniature":
        folder = REPOSITORY / "miniature"
        defaults = json.loads((folder / "defaults.json").read_text())
        for name in {"prompts", "val_prompts"} & defaults.keys():
            defaults[name] = str(REPOSITORY / defaults[name])
        defaults["monitor"] = [] if args.monitor else [str(REPOSITORY / spec) for spec in defaults.get("monitor", [])]
        parser.set_defaults(weights=str(folder), **defaults)
        args = parser.parse_args(argv)
        args.model = str(folder / "stable-diffusion")
    check_options(args)
    named = {name: getattr(args, name) for name in REWARDS}
    args.weighted, args.monitored = reward_specs(named, args.reward, args.monitor)
    return args


def check_options(args):
    """Raise UserError (one line) for options that are invalid or contradict each other."""
    require(args, {
        "step grad_steps batch_size gradient_accumulation_steps val_count": 1,
        "lr_text lr_unet lr_warmup_steps max_grad_norm max_steps epochs seed keep_checkpoints": 0,
        "guidance prompt_weighting sample_every val_every save_every": 0,
    })  # fmt: skip
    if not args.grad_steps <= args.step <= 1000:
        raise UserError(
            f"--grad_steps {args.grad_steps} --step {args.step}: expected grad_steps <= step <= 1000: the steps "
            "with gradient are the last of the sampling steps"
        )
    if args.epochs == args.max_steps == 0:
        raise UserError("--epochs 0 --max_steps 0: training would never end; limit one of them")
    if args.lr_text == args.lr_unet == 0:
        raise UserError("--lr_text 0 --lr_unet 0: nothing would be trained; set one to a learning rate such as 1e-6")
    if args.report_to and importlib.util.find_spec(args.report_to) is None:
        raise UserError(f"--report_to {args.report_to}: not installed; run: pip install {args.report_to}")
    check_folder(args.output_path, args.resume)


def recorded_options(args, global_batch, last_step, content):
    """Options to record in options.json -> (options, names of those that must not change on --resume).

    global_batch: images per step; content: see hashes.run_content. "tracker run" is a new id for the tracker's run.
    """
    options = {name: value for name, value in vars(args).items() if name not in ("weighted", "monitored")}
    options["reward weights"] = {spec.rpartition(":")[2]: weight for spec, weight in args.weighted.items()}
    options |= {"images per step": global_batch, "content": content}
    if args.lr_scheduler != "constant_with_warmup":
        options["last step"] = last_step  # the learning rate of every step depends on it
    compared = [name for name in options if name not in FREE_ON_RESUME]
    return options | {"tracker run": secrets.token_hex(4)}, compared

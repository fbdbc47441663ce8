"""Build command-line parsers from a table of options; every error is one line."""

import argparse
import difflib
import json
import math
from pathlib import Path

from textcraftor.errors import UserError

# At test time (and in validation) the tuned encoder conditions this many of the last steps of 25: TextCraftor, Table 4.
TEST_TUNED_STEPS = 15
TEST_STEPS = 25
TEST_SEED = 2023

# Sampler names for users -> diffusers' scheduler classes.
SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "PNDM": "PNDMScheduler",
    "DPMSolver": "DPMSolverMultistepScheduler",
    "DPMSingle": "DPMSolverSinglestepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "EulerAncestral": "EulerAncestralDiscreteScheduler",
    "UniPC": "UniPCMultistepScheduler",
}

REPOSITORY = Path(__file__).resolve().parents[1]
MINIATURE = REPOSITORY / "miniature"
MINIATURE_MODEL = str(MINIATURE / "stable-diffusion")

# Terms of the training objective beside the rewards; those in use have columns, too.
TERMS = ("clip_constraint", "anchor")
# Columns of metrics.csv, apart from the rewards'.
COLUMNS = ("step", "epoch", "total", "lr", "grad_norm", "skipped", "cut", "seconds", "images_per_second")


def make_parser(description, options):
    """Build a parser from (names, default, help) tuples. Short names come first; `_` and `-` are interchangeable.

    The default sets the type: False makes a switch, [] a repeatable option, and a tuple a choice whose first entry is
    the default. The parser raises UserError for an invalid command line.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, default, comment in options:
        *short, name = name.split()
        bare = name.removeprefix("--")
        spellings = dict.fromkeys([*short, name, f"--{bare.replace('_', '-')}", f"--{bare.replace('-', '_')}"])
        how = {"default": default, "metavar": "X"}
        if default is False:
            how = {"action": "store_true"}
        elif default == []:
            how |= {"action": "append"}
        elif isinstance(default, tuple):
            how |= {"choices": default, "default": default[0], "metavar": "|".join(filter(None, default))}
        else:
            how |= {"type": type(default)}
        if how.get("default") not in (None, "", []):
            comment += f" (default: {how['default']})"
        parser.add_argument(*spellings, dest=bare.replace("-", "_"), help=comment.replace("%", "%%"), **how)

    def fail(message):
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        near = difflib.get_close_matches(unknown, parser._option_string_actions, 1) if unknown.startswith("-") else []
        guess = f"; did you mean {near[0]}?" if near and message.startswith("unrecognized") else ""
        raise UserError(f"{message}{guess} (--help lists all options)")

    parser.error = fail
    return parser


def given_options(parser, argv, names) -> set[str]:
    """Those of the options `names` that are on the command line, and not empty."""
    defaults = {name: parser.get_default(name) for name in names}
    parser.set_defaults(**dict.fromkeys(names))
    args = parser.parse_args(argv)
    parser.set_defaults(**defaults)
    return {name for name in names if getattr(args, name) not in (None, "")}


def miniature_defaults() -> dict:
    """The miniature's own defaults of the training script's options."""
    return json.loads((MINIATURE / "defaults.json").read_text())


def require(args, bounds):
    """Raise UserError unless every option is finite and at least its bound: {"space-separated names": bound}."""
    for names, bound in bounds.items():
        for name in names.split():
            if not bound <= getattr(args, name) < math.inf:
                raise UserError(f"--{name} {getattr(args, name)}: must be at least {bound}")
            if name == "seed" and args.seed >= 2**63:
                raise UserError(f"--seed {args.seed}: must be below 2**63, as random number generators need it")


def check_tuned_steps(args):
    """Raise UserError unless grad_steps <= step <= 1000."""
    if not args.grad_steps <= args.step <= 1000:
        raise UserError(
            f"--grad_steps {args.grad_steps} --step {args.step}: expected grad_steps <= step <= 1000, since the tuned "
            "text encoder is used in the last of all steps"
        )


def reward_specs(named, own, monitors):
    """Rewards to train on and to monitor, from their options.

    named: {reward name: weight}; own: ["path/to/file.py:function=weight"]; monitors: ["name,path/to/file.py:function"].
    Returns ({name or path/to/file.py:function: weight}, [monitors, named likewise]). Leaves out rewards of
    weight 0, and monitors that are trained on. Raises UserError for malformed options and if all weights are 0.
    """
    weighted = dict(named)
    for option in own:
        spec, _, weight = option.rpartition("=")
        try:
            weighted[spec] = float(weight)
        except ValueError:
            spec = ""
        if ":" not in spec:
            raise UserError(f"--reward {option}: expected path/to/file.py:function=weight")
    for spec, weight in weighted.items():
        if not math.isfinite(weight):
            raise UserError(f"the weight of {spec} is {weight}; expected a finite number")
    weighted = {spec: weight for spec, weight in weighted.items() if weight}
    if not weighted:
        raise UserError("all reward weights are 0; set at least one, for example --hpsv2 1")
    monitored = [spec for option in monitors for spec in option.split(",") if spec and spec not in weighted]
    for spec in monitored:
        if spec not in named and ":" not in spec:
            raise UserError(f"--monitor {spec}: expected {', '.join(named)} or path/to/file.py:function")
    monitored = list(dict.fromkeys(monitored))
    names = [spec.rpartition(":")[2] for spec in (*weighted, *monitored)]
    for name in names:
        if name in (*COLUMNS, *TERMS) or names.count(name) > 1:
            raise UserError(f"metrics.csv would get two columns named {name}; rename your reward function")
    return weighted, monitored


def check_all(checks):
    """Call each (check, *arguments), then raise all their UserErrors as one."""
    problems = []
    for check, *arguments in checks:
        try:
            check(*arguments)
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n  ".join(problems))

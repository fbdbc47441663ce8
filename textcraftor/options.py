"""Command-line options from a table, with errors of one line."""

import argparse
import math

from textcraftor.errors import UserError

# At test time (and in validation) the tuned text encoder drives the last steps, of 25: TextCraftor, Table 4.
TEST_TUNED_STEPS = 15
TEST_SEED = 2023

# Samplers by the names users choose, and diffusers' classes of them.
SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "PNDM": "PNDMScheduler",
    "DPMSolver": "DPMSolverMultistepScheduler",
    "DPMSingle": "DPMSolverSinglestepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "EulerAncestral": "EulerAncestralDiscreteScheduler",
    "UniPC": "UniPCMultistepScheduler",
}

# The columns of metrics.csv beside those of the rewards.
COLUMNS = ("step", "epoch", "total", "lr", "grad_norm", "skipped", "cut", "seconds", "images_per_second")


def make_parser(description, options):
    """A parser of options (name, default, comment); a name is understood with `_` and with `-`, after short ones.

    The default gives the type; False makes a switch, [] an option that may be repeated, and a tuple a choice among its
    entries, the first being the default. What is wrong on a command line raises UserError.
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
        parser.add_argument(*spellings, dest=bare.replace("-", "_"), help=comment, **how)

    def fail(message):
        raise UserError(f"{message} (--help lists all options)")

    parser.error = fail
    return parser


def require(args, bounds):
    """Raise UserError unless every option is finite and at least its bound: {"names apart by spaces": bound}."""
    for names, bound in bounds.items():
        for name in names.split():
            if not bound <= getattr(args, name) < math.inf:
                raise UserError(f"--{name} {getattr(args, name)}: must be at least {bound}")


def reward_specs(named, own, monitors):
    """Rewards in use and monitors, from their options.

    named: {reward name: weight}; own: ["path/to/file.py:function=weight"]; monitors: ["name,path/to/file.py:function"].
    Returns ({name or path/to/file.py:function: weight}, [the same of monitors]), rewards of weight 0 left out and no
    reward in both. Raises UserError for what cannot be read and if no weight is left.
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
            raise UserError(f"the weight of {spec} is {weight}: must be a finite number")
    weighted = {spec: weight for spec, weight in weighted.items() if weight}
    if not weighted:
        raise UserError("all reward weights are 0: nothing to train for; give one a weight, say --hpsv2 1")
    monitored = [spec for option in monitors for spec in option.split(",") if spec and spec not in weighted]
    for spec in monitored:
        if spec not in named and ":" not in spec:
            raise UserError(f"--monitor {spec}: expected {', '.join(named)} or path/to/file.py:function")
    monitored = list(dict.fromkeys(monitored))
    names = [spec.rpartition(":")[2] for spec in (*weighted, *monitored)]
    for name in names:
        if name in COLUMNS or names.count(name) > 1:
            raise UserError(f"two columns of metrics.csv would be called {name}; rename the function")
    return weighted, monitored


def check_all(checks):
    """Call each (check, *arguments) and raise the UserErrors of all of them as one."""
    problems = []
    for check, *arguments in checks:
        try:
            check(*arguments)
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n  ".join(problems))

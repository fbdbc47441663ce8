"""What a weight file says about the run that made it: how it sampled, and so how to sample with it.

Nothing here imports torch, so programs can take defaults from it before they check their options.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub

from textcraftor.errors import UserError

ENCODERS = ("model.safetensors", "text_encoder/model.safetensors")  # in the folders that export.py writes
# USER/NAME, but not a mistyped path of a weight file, which would wait for the hub to say no; nor one in a folder.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.pt)(?<!\.pth)(?<!\.ckpt)(?<!\.bin)")
KEY = "textcraftor"  # in the metadata of a safetensors file
# Options of the test programs whose defaults come from the weights.
TESTED = ("step", "grad_steps", "guidance", "prompt_weighting", "tune_unconditional")


def record(settings: Mapping) -> dict[str, str]:
    """Settings -> metadata of a safetensors file."""
    return {KEY: json.dumps(dict(settings))}


def recorded_settings(path: Path | str) -> dict:
    """The settings in the header of a safetensors file, or of the text encoder in a folder or behind a hub id, which is
    fetched into the hub's cache; {} if there are none."""
    if HUB_ID.fullmatch(str(path)) and not Path(path).exists() and not Path(path).parent.is_dir():
        path = _from_hub(str(path)) or path
    path = next((Path(path) / name for name in ENCODERS if (Path(path) / name).is_file()), path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 2**27 else {}
        return json.loads(header["__metadata__"][KEY])
    except (OSError, ValueError, KeyError, TypeError):  # another kind of file, which is judged when it is loaded
        return {}


def _from_hub(repo):
    """The file of a hub repository's text encoder in the hub's cache; None if there is none."""
    for name in ENCODERS:
        # Where it has another name, or the hub cannot be reached, loading the weights says what is wrong.
        with contextlib.suppress(Exception):
            return huggingface_hub.hf_hub_download(repo, name)


def shared_settings(paths: list[str], given: set[str], advice: str = "choose one with --{name}") -> dict:
    """The settings that the encoders at `paths` were trained for, as defaults of the test programs' options TESTED.

    given: options on the command line, which need not agree. Raises UserError, with advice on what to do, if two files
    say different things.
    """
    shared = {}
    for path in paths:
        for name, value in recorded_settings(path).items():
            if name not in TESTED or name in given:
                continue
            if shared.setdefault(name, (value, path))[0] != value:
                other, at = shared[name]
                raise UserError(
                    f"{at} was trained for --{name} {other}, {path} for {value}; {advice.format(name=name)}"
                )
    return {name: value for name, (value, _) in shared.items()}


def tunes_unconditional(paths: list[str], advice: str = "use encoders that agree") -> bool:
    """Whether the tuned encoders at `paths` drive the unconditional branch of guidance as well; yes if none says."""
    others = set(TESTED) - {"tune_unconditional"}
    return shared_settings(paths, others, advice).get("tune_unconditional", "on") == "on"

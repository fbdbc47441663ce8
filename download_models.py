"""
Download the models and prompts that training needs: Stable Diffusion v1.5, Open Prompts and the four reward models.
Files that are already in place are skipped, and interrupted downloads continue. HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE
and HF_TOKEN work as in other Hugging Face programs.

$ python download_models.py
$ python download_models.py --only hpsv2,pickscore
$ python download_models.py --only hpsv2.1            # not among the defaults
"""

from textcraftor.downloads import ON_REQUEST, REPOSITORY, SOURCES, download
from textcraftor.errors import UserError, run_program
from textcraftor.options import make_parser

# fmt: off
OPTIONS = (
    ("--only", ",".join(name for name in SOURCES if name not in ON_REQUEST),
     f"what to download, separated by commas; any of {', '.join(SOURCES)}"),
    ("--root", str(REPOSITORY), "folder to download into; give the same to training as --weights"),
)
# fmt: on


def main(argv: list[str] | None = None) -> None:
    args = make_parser(__doc__, OPTIONS).parse_args(argv)
    names = list(dict.fromkeys(name.strip() for name in args.only.split(",")))
    if unknown := [name for name in names if name not in SOURCES]:
        raise UserError(f"--only {args.only}: {unknown[0]!r} is not known; choose from {', '.join(SOURCES)}")
    try:
        download(names, args.root)
    except KeyboardInterrupt:
        raise UserError("interrupted; the same command continues the download") from None


if __name__ == "__main__":
    run_program(main)

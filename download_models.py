"""
Fetch what the paper's run needs, each to its place: Stable Diffusion v1.5, Open Prompts and the four reward models.
What is there is skipped; what broke off goes on. HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are honoured.

$ python download_models.py
$ python download_models.py --only hpsv2,pickscore
$ python download_models.py --only hpsv2.1            # only on request
"""

import argparse
import sys

from textcraftor.downloads import ON_REQUEST, REPOSITORY, SOURCES, download
from textcraftor.errors import UserError


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ",".join(name for name in SOURCES if name not in ON_REQUEST)
    parser.add_argument("--only", default=default, help=f"comma-separated, of {', '.join(SOURCES)}")
    parser.add_argument("--root", default=REPOSITORY, help="folder to put everything below, for training's --weights")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(name.strip() for name in args.only.split(",")))
    if unknown := [name for name in names if name not in SOURCES]:
        raise UserError(f"--only {args.only}: there is no {unknown[0]!r}; expected some of {', '.join(SOURCES)}")
    download(names, args.root)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")

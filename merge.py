"""
Merge tuned text encoders into one file, for tools that take a single encoder.

Each encoder has a weight, also below 0 or above 1. If the weights do not add up to 1, the original encoder gets the
rest: here it is a tenth.
$ python merge.py a.safetensors=0.6 b.safetensors=0.3 -o c.safetensors

Halfway from the original encoder to a tuned one, or beyond it:
$ python merge.py a.safetensors=0.5 -o half.safetensors
$ python merge.py a.safetensors=1.3 -o more.safetensors

To mix embeddings instead, as the paper does, name several encoders with --text_path in test_parti.py and test_hpsv2.py.
"""

from textcraftor.errors import UserError, run_program
from textcraftor.exporting.options import check_new_file
from textcraftor.mixing import original_share, parse_weighted
from textcraftor.options import MINIATURE_MODEL, check_all, make_parser

# fmt: off
OPTIONS = (
    ("-o --output_path",   "",                        "file to write, such as c.safetensors"),
    ("--base",             "./stable-diffusion-v1-5", "original encoder: folder, file or hub id; or `miniature`"),
)
# fmt: on


def parse_options(argv=None):
    """Command line -> options, checked, with `encoders` [mixing.Weighted] among them."""
    parser = make_parser(__doc__, OPTIONS)
    parser.add_argument(
        "encoders", nargs="+", metavar="PATH=WEIGHT", help="a tuned encoder and its weight (default: 1)"
    )
    args = parser.parse_args(argv)
    args.encoders = [parse_weighted(spec) for spec in args.encoders]
    if args.base == "miniature":
        args.base = MINIATURE_MODEL
    if not args.output_path:
        raise UserError("-o is missing: name the file to write, such as -o c.safetensors")
    check_new_file(args.output_path)
    return args


def main(argv=None):
    args = parse_options(argv)

    from textcraftor.merging import merge  # only now: mistakes are reported before PyTorch is imported
    from textcraftor.weight_files import check_text_encoder, needs_base

    paths, weights = zip(*args.encoders, strict=True)
    check_all([(check_text_encoder, path) for path in paths])
    if original_share(weights) or any(needs_base(path) for path in paths):
        check_all([(check_text_encoder, args.base)])
    formula = merge(args.encoders, args.base, args.output_path)
    print(f"{args.output_path} = {formula}")


if __name__ == "__main__":
    run_program(main)

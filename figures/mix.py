"""Figures 4 and 5: the embeddings of the original text encoder and of tuned ones, mixed, from the same noise.

python -m figures.mix --text_path output/tc_text.safetensors                      # weights 0, 0.25, 0.5, 0.75, 1
python -m figures.mix --text_path a.safetensors --text_path b.safetensors --text_path c.safetensors
"""

import copy

from figures.common import draw, load, parse, write
from textcraftor.errors import UserError, run_program
from textcraftor.pipelines import attach_encoder
from textcraftor.recorded import tunes_unconditional
from textcraftor.weight_files import load_text_encoder


def weights_of(count):
    """The paper's weights of `count` tuned encoders: none, all alike, each in turn most; the original has the rest."""
    if count == 1:
        return [[0.0], [0.25], [0.5], [0.75], [1.0]]
    alike, other = 0.9 / count, 0.2 / (count - 1)
    return [
        [0.0] * count,
        [alike] * count,
        *([0.7 if each == most else other for each in range(count)] for most in range(count)),
    ]


def main(argv=None):
    args = parse(__doc__, "mix", argv=argv, text_path=("--text_path", [], "tuned text encoder; may be repeated"))
    if not args.text_path:
        raise UserError(
            "--text_path is missing: name one or more encoders, such as --text_path output/tc_text.safetensors"
        )
    both = tunes_unconditional(args.text_path)
    pipeline = load(args)
    encoders = []
    for path in args.text_path:
        encoders.append(copy.deepcopy(pipeline.text_encoder))
        load_text_encoder(encoders[-1], path)
    pictures, notes = [], []
    for weights in weights_of(len(encoders)):
        attach_encoder(pipeline, list(zip(encoders, weights, strict=True)), args.grad_steps, both)
        pictures.append([draw(pipeline, args)])
        notes.append(" / ".join(f"{weight:.3g}" for weight in (1 - sum(weights), *weights)))
    write(args, pictures, notes, "weights of the original text embeddings / the tuned ones")


if __name__ == "__main__":
    run_program(main)

"""Where a benchmark's images come from: generated here, or found in a folder. Either way they are scored.

A source is called with B rows and returns them with their scores, or with a "problem". `settings` says what its images
depend on, `columns` what it adds to a row beside scores, and `count_cut` counts prompts longer than the text encoder
reads (None if no text encoder was at work).
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from threading import Lock

from textcraftor.benchmark.extend import extend_prompt, load_extender
from textcraftor.benchmark.images import generate, image_size, load_pipeline, open_bank_of, save_image
from textcraftor.benchmark.options import SAMPLING
from textcraftor.benchmark.scores import file_view, find_image, score_files, score_images
from textcraftor.embeddings import count_cut
from textcraftor.errors import UserError
from textcraftor.hashes import weights_hash
from textcraftor.precision import PRECISIONS

SAVERS = 4  # threads that encode and write image files


class Generator:
    """Generates images, saves them in args.output_path and scores them. Threads may share it."""

    def __init__(self, benchmark, args, scorers, device, precision):
        """args: see options.parse_options; scorers: see scores.load_scorers; precision: "no", "fp16" or "bf16"."""
        self.args, self.scorers, self.precision = args, scorers, precision
        self.view = file_view(scorers, True) if benchmark.from_files else None
        self.pipeline, self.tuned = load_pipeline(args.model, args.scheduler, args.step, args.encoders, args.unet_path)
        self.image_size = image_size(self.pipeline)
        tuned = [encoder for encoder, _ in self.tuned] if args.encoders else [self.tuned]
        networks = {
            "unet": self.pipeline.unet,
            "text encoder": self.pipeline.text_encoder,
            "vae": self.pipeline.vae,
        }
        dtype = PRECISIONS[precision]
        self.settings = {name: getattr(args, name) for name in SAMPLING}
        self.settings |= {"text_path (sha256)": mix_hash(args.encoders, tuned)}
        self.settings |= {f"{name} (sha256)": weights_hash(network) for name, network in networks.items()}
        self.settings |= {"precision": str(dtype).removeprefix("torch.")}
        self.drawn = self.scored = "prompt"  # columns of the prompts to generate from and to score with
        if args.prompt_eng:
            self.extender = load_extender(args.prompt_eng, device)
            self.settings |= {
                "prompt_eng (sha256)": weights_hash(self.extender[1]), "score_prompt": args.score_prompt
            }  # fmt: skip
            self.drawn = "extended"
            self.scored = "extended" if args.score_prompt == "extended" else "prompt"
        self.columns = ["extended"] if args.prompt_eng else []
        self.pipeline.to(device, dtype)
        for encoder in tuned:
            encoder.to(device, dtype)
        self.bank = open_bank_of(args, self.pipeline) if args.bank else None
        self.savers = ThreadPoolExecutor(SAVERS)
        self.turn = Lock() if device.type == "cuda" else nullcontext()  # a GPU is not faster with two batches at once

    def __call__(self, rows):
        if not rows:
            return []
        if self.args.prompt_eng:
            rows = [row | {"extended": self._extend(row)} for row in rows]
        with self.turn:
            images = self._generate(rows)
        finite = images.isfinite().flatten(1).all(1).tolist()
        kept = [row for row, is_finite in zip(rows, finite, strict=True) if is_finite]
        scores = iter(self._save_and_score(images[finite], kept) if kept else [])
        results = [next(scores) if is_finite else self._overflow() for is_finite in finite]
        return [row | result for row, result in zip(rows, results, strict=True)]

    def count_cut(self, rows):
        """How many of the rows have prompts that are longer than the text encoder reads."""
        return count_cut(self.pipeline.tokenizer, [row[self.drawn] for row in rows])

    def _extend(self, row):
        return extend_prompt(*self.extender, row["prompt"], self.args.seed, row["index"])

    def _generate(self, rows):
        prompts, indices = [row[self.drawn] for row in rows], [row["index"] for row in rows]
        return generate(
            self.pipeline, self.tuned, prompts, indices, seed=self.args.seed, grad_steps=self.args.grad_steps,
            guidance=self.args.guidance, weighting=self.args.prompt_weighting,
            tune_unconditional=self.args.tune_unconditional == "on", bank=self.bank,
        )  # fmt: skip

    def _save_and_score(self, images, rows):
        """Save images (B, 3, H, W) and score them, from the saved files if self.view is set -> B dicts."""
        prompts = [row[self.scored] for row in rows]
        paths = [Path(self.args.output_path, row["file"]) for row in rows]
        saving = self.savers.map(save_image, images.cpu(), paths)
        if self.view:
            list(saving)
            return score_files(self.scorers, paths, prompts, self.view)
        scores = score_images(self.scorers, images, prompts)
        list(saving)  # raises what went wrong
        return scores

    def _overflow(self):
        """The "problem" of an image with NaN or infinite pixels. It is not saved: its file would just be black."""
        advice = "; try --mixed_precision bf16 or no" if self.precision == "fp16" else ""
        return {"problem": f"its pixels are NaN or infinite in {self.settings['precision']}: no score{advice}"}


def mix_hash(encoders, networks):
    """The hash of the tuned text encoder, or of several with their weights."""
    hashes = [weights_hash(network) for network in networks]
    weights = [weight for _, weight in encoders] or [1]
    return hashes[0] if weights == [1] else sha256(repr([*zip(weights, hashes, strict=True)]).encode()).hexdigest()


class Folder:
    """Scores the images found in the folder args.score_only."""

    def __init__(self, benchmark, args, scorers):
        self.folder, self.scorers = Path(args.score_only), scorers
        self.view = file_view(scorers, benchmark.from_files)
        # A folder that holds its own scores may be moved together with them.
        moved = Path(args.output_path).resolve() == self.folder.resolve()
        self.settings = {} if moved else {"score_only": str(self.folder.resolve())}
        self.columns = []

    def __call__(self, rows):
        found = [row | {"file": find_image(self.folder, row["file"])} for row in rows]
        paths, prompts = [self.folder / row["file"] for row in found], [row["prompt"] for row in rows]
        scores = score_files(self.scorers, paths, prompts, self.view)
        return [row | score for row, score in zip(found, scores, strict=True)]

    def count_cut(self, rows):
        return None


def check_folder(folder, rows):
    """Raise UserError if the folder has no image for any of the rows."""
    if not any(Path(folder, find_image(folder, row["file"])).is_file() for row in rows):
        raise UserError(
            f"--score_only {folder}: holds no image of this benchmark; expected {rows[0]['file']}, {rows[-1]['file']} "
            "or any between"
        )

"""The benchmarks' prompts, PartiPrompts and the HPSv2 benchmark: read from files, downloaded on first use.

A benchmark is a list of rows, dicts of "index" (a number that seeds the row's noise), "prompt", "category" (the style
in the HPSv2 benchmark), "challenge" (PartiPrompts only) and "file" (the image's path in the output folder). A prompt
that cannot be used is an error, never skipped: the indices of all later prompts would change, and so their images.
"""

import codecs
import hashlib
import json
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from textcraftor.errors import UserError, first_line
from textcraftor.files import check_writable, write_whole

PARTI_FILE = "PartiPrompts.tsv"
PARTI_SHA256 = "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"
PARTI_URL = "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPDV2_PROMPTS = 800  # of each style


def read_parti(path: Path) -> list[dict]:
    """Rows of a tab-separated UTF-8 file with the columns Prompt, Category, Challenge and any others, without quoting.

    Raises UserError with the number of the first line that does not fit.
    """
    rows, header = [], []
    for number, line in enumerate(_read_text(path).removesuffix("\n").split("\n"), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if number == 1:
            header = [cell.lower() for cell in cells]
            if missing := [name for name in ("Prompt", "Category", "Challenge") if name.lower() not in header]:
                raise UserError(f"{path}, line 1: no column {missing[0]}, found {line[:80]!r}")
            continue
        if len(cells) != len(header):
            raise UserError(f"{path}, line {number}: {len(cells)} columns, expected {len(header)} separated by tabs")
        row = dict(zip(header, cells, strict=True))
        place = f"{path}, line {number}"
        known = {name: _checked(row[name], name, place) for name in ("prompt", "category", "challenge")}
        rows.append({"index": len(rows), **known, "file": f"{len(rows):05d}.png"})
    if not rows:
        raise UserError(f"{path}: has no prompts; expected a line of column names, then one line per prompt")
    return rows


def read_hpsv2(path: Path) -> list[dict]:
    """Rows of a folder of STYLE.json files, or of one such file, each a list of prompts; styles sorted by name.

    Raises UserError with the file and the number of the first line or entry that does not fit.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no .json file; expected one per style ({HPDV2_STYLES[0]}.json, …)")
    rows = []
    for file in files:
        try:
            prompts = json.loads(_read_text(file))
        except ValueError as problem:
            line = getattr(problem, "lineno", 1)
            raise UserError(f"{file}, line {line}: not valid JSON ({first_line(problem)})") from problem
        except RecursionError as problem:
            raise UserError(f"{file}: expected a JSON list of prompts, found lists nested too deeply") from problem
        if not isinstance(prompts, list) or not prompts:
            raise UserError(f"{file}: expected a JSON list of prompts with at least one entry")
        style = _checked(file.stem, "file name", str(file))
        for position, prompt in enumerate(prompts):
            prompt = _checked(prompt, "prompt", f"{file}, entry {position + 1}")
            image = f"{style}/{position:05d}.jpg"
            rows.append({"index": len(rows), "prompt": prompt, "category": style, "file": image})
    return rows


def _read_text(path):
    """The text of a UTF-8 file, without a byte-order mark; UserError with the line of the first invalid byte."""
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror}); expected a file of prompts") from problem
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{content[problem.start]:02x}); save the file as UTF-8"
        ) from problem


def _checked(text, name, place):
    """A cell without spaces at its ends; UserError unless it is text that can be tokenized, written and printed."""
    if not isinstance(text, str):
        raise UserError(f"{place}: the {name} is {json.dumps(text)[:60]}, expected text")
    if not text.strip():
        raise UserError(f"{place}: the {name} is empty")
    if bad := next((letter for letter in text if letter == "\0" or "\ud800" <= letter <= "\udfff"), ""):
        what = "half of a surrogate pair" if bad > "\0" else "a null character"
        raise UserError(f"{place}: the {name} holds {what} (U+{ord(bad):04X}), which is no text; correct it")
    return text.strip()


def fetch_parti(path: Path) -> None:
    """Download PartiPrompts to `path`, from Hugging Face or else from Google's repository, and check its hash.

    Raises UserError with what went wrong at each place.
    """
    problems = []
    for place, fetch in (
        ("Hugging Face", lambda: _from_hub("nateraw/parti-prompts", PARTI_FILE)),
        (PARTI_URL, _from_google),
    ):
        try:
            content = fetch()
        except Exception as problem:  # huggingface_hub, urllib, sockets and ssl raise their own kinds
            problems.append(f"{place}: {first_line(problem)}")
            continue
        digest = hashlib.sha256(content).hexdigest()
        if digest == PARTI_SHA256:
            with write_whole(path) as unfinished:
                unfinished.write_bytes(content)
            return
        problems.append(f"{place}: received a file of sha256 {digest[:12]}…, expected {PARTI_SHA256[:12]}…")
    raise UserError(
        f"PartiPrompts could not be downloaded ({'; '.join(problems)}); put {PARTI_FILE} from "
        f"github.com/google-research/parti at {path}, or name a file with --prompts"
    )


def fetch_hpsv2(path: Path) -> None:
    """Download the four lists of the HPSv2 benchmark from Hugging Face into the folder `path`: all of them or none.

    Raises UserError if that fails or a list does not have 800 prompts.
    """
    try:
        contents = {style: _from_hub("zhwang/HPDv2", f"benchmark/{style}.json") for style in HPDV2_STYLES}
    except Exception as problem:  # huggingface_hub raises many kinds
        raise UserError(
            f"the HPSv2 benchmark could not be downloaded ({first_line(problem)}); put benchmark/*.json of the Hugging "
            f"Face dataset zhwang/HPDv2 into {path}, or name a folder with --prompts"
        ) from problem
    check_writable(path.parent, "prompts folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as beside:
        whole = Path(beside, path.name)
        whole.mkdir()
        for style, content in contents.items():
            whole.joinpath(f"{style}.json").write_bytes(content)
        for style, count in Counter(row["category"] for row in read_hpsv2(whole)).items():
            if count != HPDV2_PROMPTS:
                raise UserError(
                    f"benchmark/{style}.json of zhwang/HPDv2 on Hugging Face has {count} prompts, expected "
                    f"{HPDV2_PROMPTS}; get the original lists and name their folder with --prompts"
                )
        try:
            whole.rename(path)
        except OSError:
            if not path.is_dir():  # unless another process was faster
                raise


class Benchmark(NamedTuple):
    """What distinguishes the two benchmarks."""

    title: str
    name: str  # part of the default output folder's name
    prompts: str  # file or folder below prompts/ and miniature/benchmarks/
    read: Callable[[Path], list[dict]]
    fetch: Callable[[Path], None]
    rewards: tuple[str, ...]
    from_files: bool  # score the saved files, as HPS v2's own program does, instead of the decoder's output
    groups: tuple[str, ...]  # columns by which results are also reported


PARTI = Benchmark(
    "PartiPrompts", "parti", PARTI_FILE, read_parti, fetch_parti,
    ("clip", "aesthetic", "pickscore", "hpsv2"), False, ("category", "challenge"),
)  # fmt: skip
HPSV2 = Benchmark("HPSv2 benchmark", "hpsv2", "HPDv2", read_hpsv2, fetch_hpsv2, ("hpsv2",), True, ("category",))


def prompts_hash(rows: list[dict]) -> str:
    """sha256 of the content of a benchmark's rows, independent of the layout of their file."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _from_hub(repository, file):
    from huggingface_hub import hf_hub_download  # slow to import, and rarely needed

    return Path(hf_hub_download(repository, file, repo_type="dataset")).read_bytes()


def _from_google():
    with urllib.request.urlopen(PARTI_URL, timeout=60) as answer:
        return answer.read()

"""The benchmarks' prompts: PartiPrompts and the HPSv2 benchmark, read from files or fetched on first use.

A benchmark's prompts are rows, dicts of "index" (its number, which seeds its noise), "prompt", "category" (in the HPSv2
benchmark the style), "challenge" (PartiPrompts only) and "file" (its image, below a run's folder).
"""

import hashlib
import json
import os
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from textcraftor.errors import UserError, first_line

PARTI_FILE = "PartiPrompts.tsv"
PARTI_SHA256 = "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"
PARTI_URL = "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPDV2_PROMPTS = 800  # of each style


def read_parti(path: Path) -> list[dict]:
    """Rows of a tab-separated file with the columns Prompt, Category, Challenge and any others, nothing quoted.

    Raises UserError naming the first line that is no such row.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({first_line(problem)}); expected a tsv file") from problem
    if lines[-1] == b"":
        del lines[-1]
    rows, header = [], []
    for number, line in enumerate(lines, 1):
        try:
            cells = [cell.strip() for cell in line.decode("utf-8").split("\t")]
        except UnicodeDecodeError as problem:
            raise UserError(f"{path}, line {number}: not UTF-8 ({problem.reason})") from problem
        if number == 1:
            header = [cell.lower() for cell in cells]
            if missing := [name for name in ("Prompt", "Category", "Challenge") if name.lower() not in header]:
                raise UserError(f"{path}, line 1: no column {missing[0]}; found {line.decode()[:80]!r}")
            continue
        if len(cells) != len(header):
            raise UserError(f"{path}, line {number}: {len(cells)} columns, expected {len(header)} with tabs between")
        row = dict(zip(header, cells, strict=True))
        for name in ("prompt", "category", "challenge"):
            if not row[name]:
                raise UserError(f"{path}, line {number}: its {name} is empty")
        index = len(rows)
        known = {name: row[name] for name in ("prompt", "category", "challenge")}
        rows.append({"index": index, **known, "file": f"{index:05d}.png"})
    if not rows:
        raise UserError(f"{path}: has no prompts; expected a line with the columns' names and one line a prompt")
    return rows


def read_hpsv2(path: Path) -> list[dict]:
    """Rows of a folder of STYLE.json files, or of one such file, each a list of prompts; styles in their names' order.

    Raises UserError naming the file and the line, or the number of the entry, that does not fit.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no .json file in it; expected one list of prompts a style: {HPDV2_STYLES[0]}.json, …")
    rows = []
    for file in files:
        try:
            prompts = json.loads(file.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as problem:
            raise UserError(f"{file}, line {problem.lineno}: no JSON ({problem.msg})") from problem
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"{file}: cannot be read ({first_line(problem)}); expected a JSON list") from problem
        if not isinstance(prompts, list) or not prompts:
            raise UserError(f"{file}: expected a JSON list of prompts that is not empty")
        for position, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{file}, entry {position + 1}: {json.dumps(prompt)[:60]} is no prompt")
            name = f"{file.stem}/{position:05d}.jpg"
            rows.append({"index": len(rows), "prompt": prompt.strip(), "category": file.stem, "file": name})
    return rows


def fetch_parti(path: Path) -> None:
    """Write PartiPrompts to `path`, from the hub or else from Google's repository, its hash checked.

    Raises UserError with what went wrong at each place.
    """
    problems = []
    for place, fetch in (("hub", lambda: _from_hub("nateraw/parti-prompts", PARTI_FILE)), (PARTI_URL, _from_google)):
        try:
            content = fetch()
        except Exception as problem:  # of the hub's client, urllib, sockets and ssl
            problems.append(f"{place}: {first_line(problem)}")
            continue
        digest = hashlib.sha256(content).hexdigest()
        if digest == PARTI_SHA256:
            return _write(path, content)
        problems.append(f"{place}: a file of sha256 {digest[:12]}…, expected {PARTI_SHA256[:12]}…")
    raise UserError(
        f"PartiPrompts could not be fetched ({'; '.join(problems)}); put {PARTI_FILE} of "
        f"github.com/google-research/parti at {path}, or name a file with --prompts"
    )


def fetch_hpsv2(path: Path) -> None:
    """Write the four lists of the HPSv2 benchmark into the folder `path`, from the hub, all or none of them.

    Raises UserError if that fails or a list has not the prompts that it should have.
    """
    try:
        contents = {style: _from_hub("zhwang/HPDv2", f"benchmark/{style}.json") for style in HPDV2_STYLES}
    except Exception as problem:  # of the hub's client
        raise UserError(
            f"the HPSv2 benchmark could not be fetched ({first_line(problem)}); put benchmark/*.json of the hub's data "
            f"set zhwang/HPDv2 into {path}, or name a folder with --prompts"
        ) from problem
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as beside:
        whole = Path(beside, path.name)
        for style, content in contents.items():
            _write(whole / f"{style}.json", content)
        for style, count in Counter(row["category"] for row in read_hpsv2(whole)).items():
            if count != HPDV2_PROMPTS:
                raise UserError(
                    f"the hub's zhwang/HPDv2 has {count} prompts in benchmark/{style}.json, expected {HPDV2_PROMPTS}; "
                    "name a folder with the right ones with --prompts"
                )
        try:
            whole.rename(path)
        except OSError:
            if not path.is_dir():  # where another process was first
                raise


class Benchmark(NamedTuple):
    """What sets one benchmark apart from the other."""

    title: str
    name: str  # in the default output folder
    prompts: str  # file or folder, below prompts/ and miniature/benchmarks/
    read: Callable[[Path], list[dict]]
    fetch: Callable[[Path], None]
    rewards: tuple[str, ...]
    from_files: bool  # scored as HPSv2's own program does, from the saved files; else on the decoder's output
    groups: tuple[str, ...]  # columns to report by


PARTI = Benchmark(
    "PartiPrompts", "parti", PARTI_FILE, read_parti, fetch_parti,
    ("clip", "aesthetic", "pickscore", "hpsv2"), False, ("category", "challenge"),
)  # fmt: skip
HPSV2 = Benchmark("HPSv2 benchmark", "hpsv2", "HPDv2", read_hpsv2, fetch_hpsv2, ("hpsv2",), True, ("category",))


def prompts_hash(rows: list[dict]) -> str:
    """sha256 of all that a benchmark's rows say, independent of how their file is laid out."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _from_hub(repository, file):
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, repo_type="dataset")).read_bytes()


def _from_google():
    with urllib.request.urlopen(PARTI_URL, timeout=60) as answer:
        return answer.read()


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)

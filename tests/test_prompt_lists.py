"""The benchmarks' prompt files: the real one, the miniature's, malformed ones, and fetching."""

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from miniature.benchmark_prompts import write_benchmarks
from miniature.world import is_held_out, parse
from textcraftor.benchmark import prompt_lists as benchmarks
from textcraftor.benchmark.prompt_lists import (
    HPSV2,
    PARTI,
    fetch_hpsv2,
    fetch_parti,
    prompts_hash,
    read_hpsv2,
    read_parti,
)
from textcraftor.errors import UserError

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
MINIATURE = ROOT / "miniature" / "benchmarks"
HEADER = "Prompt\tCategory\tChallenge\tNote\n"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real prompts in shared/data")
def test_the_real_partiprompts():
    rows = read_parti(DATA / "PartiPrompts.tsv")
    with open(DATA / "PartiPrompts.tsv", encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [row["prompt"] for row in rows] == [row["Prompt"].strip() for row in expected]
    assert Counter(row["category"] for row in rows) == Counter(row["Category"] for row in expected)
    assert len(rows) == 1632 and len({row["category"] for row in rows}) == 12
    assert len({row["challenge"] for row in rows}) == 11
    assert rows[750]["prompt"] == "Dogs sitting around a poker table" and rows[750]["file"] == "00750.png"
    assert hashlib.sha256((DATA / "PartiPrompts.tsv").read_bytes()).hexdigest() == benchmarks.PARTI_SHA256


@pytest.mark.parametrize("content, message", [
    (b"", "line 1: no column Prompt|has no prompts"),
    (HEADER.encode(), "has no prompts"),
    (b"Prompt\tCategory\na fox\tAnimals\n", "line 1: no column Challenge"),
    (f"{HEADER}a fox\tAnimals\tBasic\t\na cat\tAnimals\n".encode(), "line 3: 2 columns, expected 4"),
    (f"{HEADER}a fox\tAnimals\tBasic\t\n\nb\tA\tB\t\n".encode(), "line 3: 1 columns, expected 4"),
    (f"{HEADER} \tAnimals\tBasic\t\n".encode(), "line 2: its prompt is empty"),
    (f"{HEADER}a fox\t\tBasic\t\n".encode(), "line 2: its category is empty"),
    (HEADER.encode() + b"a f\xe4x\tAnimals\tBasic\t\n", "line 2: not UTF-8"),
])  # fmt: skip
def test_malformed_tsv_files_are_refused_with_the_line(tmp_path, content, message):
    (tmp_path / "p.tsv").write_bytes(content)
    with pytest.raises(UserError, match=rf"p\.tsv(, |: )({message})"):
        read_parti(tmp_path / "p.tsv")


def test_windows_line_ends_and_byte_order_marks_are_read(tmp_path):
    text = f'{HEADER}a "fox"\tAnimals\tBasic\t\n'.replace("\n", "\r\n")
    (tmp_path / "p.tsv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_parti(tmp_path / "p.tsv") == [
        {"index": 0, "prompt": 'a "fox"', "category": "Animals", "challenge": "Basic", "file": "00000.png"}
    ]


@pytest.mark.parametrize("content, message", [
    ('["a",\n"b"\n"c"]', "line 3: no JSON"),
    ('{"a": 1}', "expected a JSON list"),
    ("[]", "expected a JSON list"),
    ('["a", 5]', "entry 2: 5 is no prompt"),
    ('["a", "b", " "]', 'entry 3: " " is no prompt'),
])  # fmt: skip
def test_malformed_lists_are_refused_with_their_place(tmp_path, content, message):
    (tmp_path / "anime.json").write_text(content)
    with pytest.raises(UserError, match=rf"anime\.json(, |: ){message}"):
        read_hpsv2(tmp_path)


def test_styles_are_numbered_through_and_filed_apart(tmp_path):
    for style, prompts in (("photo", ["c"]), ("anime", ["a", "b"])):
        (tmp_path / f"{style}.json").write_text(json.dumps(prompts))
    rows = read_hpsv2(tmp_path)
    assert [(row["index"], row["prompt"], row["category"], row["file"]) for row in rows] == [
        (0, "a", "anime", "anime/00000.jpg"),
        (1, "b", "anime", "anime/00001.jpg"),
        (2, "c", "photo", "photo/00000.jpg"),
    ]
    assert read_hpsv2(tmp_path / "photo.json")[0]["file"] == "photo/00000.jpg"
    for path in (tmp_path / "none", tmp_path / "none.json"):
        with pytest.raises(UserError, match="none"):
            read_hpsv2(path)


def test_partiprompts_come_from_the_hub_or_else_from_google_and_must_be_the_right_file(tmp_path, monkeypatch):
    right, asked = b"the file", []
    monkeypatch.setattr(benchmarks, "PARTI_SHA256", hashlib.sha256(right).hexdigest())

    def source(name, answer):
        def fetch(*arguments):
            asked.append(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(benchmarks, name, fetch)

    source("_from_hub", right)
    source("_from_google", right)
    fetch_parti(tmp_path / "prompts" / "a.tsv")
    assert (tmp_path / "prompts" / "a.tsv").read_bytes() == right and asked == ["_from_hub"]
    for answer in (OSError("no such repository"), b"another file"):
        asked.clear()
        source("_from_hub", answer)
        fetch_parti(tmp_path / "b.tsv")
        assert (tmp_path / "b.tsv").read_bytes() == right and asked == ["_from_hub", "_from_google"]
    source("_from_google", OSError("no network"))
    with pytest.raises(UserError, match="hub: a file of sha256 .*: no network.* put PartiPrompts.tsv"):
        fetch_parti(tmp_path / "c.tsv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tsv", "prompts"]


def test_hpsv2s_lists_come_from_the_hub(tmp_path, monkeypatch):
    def prompts(repository, file, count=800):
        return json.dumps([f"{repository} {file}"] * count).encode()

    monkeypatch.setattr(benchmarks, "_from_hub", lambda *file: prompts(*file, 800 - ("photo" in file[1])))
    with pytest.raises(UserError, match="799 prompts in benchmark/photo.json, expected 800"):
        fetch_hpsv2(tmp_path / "HPDv2")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(benchmarks, "_from_hub", prompts)
    fetch_hpsv2(tmp_path / "HPDv2")
    fetch_hpsv2(tmp_path / "HPDv2")  # as every process does
    assert [path.name for path in tmp_path.iterdir()] == ["HPDv2"]
    rows = read_hpsv2(tmp_path / "HPDv2")[::800]
    assert [row["category"] for row in rows] == ["anime", "concept-art", "paintings", "photo"]
    assert rows[0]["prompt"] == "zhwang/HPDv2 benchmark/anime.json"
    monkeypatch.undo()
    with pytest.raises(UserError, match="could not be fetched.* or name a folder with --prompts"):
        fetch_hpsv2(tmp_path / "offline")  # conftest.py forbids the network
    assert not (tmp_path / "offline").exists()


def test_the_miniatures_benchmarks_are_what_their_program_writes(tmp_path):
    write_benchmarks(tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / file).read_bytes() == (MINIATURE / file).read_bytes()


def test_the_miniatures_benchmarks_tell_of_held_out_scenes():
    rows = PARTI.read(MINIATURE / PARTI.prompts)
    styles = HPSV2.read(MINIATURE / HPSV2.prompts)
    trained = set((ROOT / "miniature" / "prompts_train.txt").read_text().splitlines())
    for row in (*rows, *styles):
        scene = parse(row["prompt"])
        assert is_held_out(scene) and row["prompt"] not in trained
        assert all(thing["size"] and thing["place"] for thing in scene["objects"])
    for row in rows:
        assert (row["challenge"] == "one object") == (len(parse(row["prompt"])["objects"]) == 1)
    assert len({row["category"] for row in rows}) == 5 and len({row["challenge"] for row in rows}) == 3
    assert Counter(row["category"] for row in styles) == dict.fromkeys(("emoji", "photo", "picture", "plain"), 80)
    assert len({row["prompt"] for row in styles}) == len(styles) == 320


def test_the_hash_says_what_is_asked_not_how_it_is_laid_out(tmp_path):
    (tmp_path / "a.json").write_text('["a fox"]')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.json").write_text('[\n  "a fox"\n]\n')
    first, second = read_hpsv2(tmp_path / "a.json"), read_hpsv2(tmp_path / "b")
    assert prompts_hash(first) == prompts_hash(second) != prompts_hash([first[0] | {"prompt": "a cat"}])

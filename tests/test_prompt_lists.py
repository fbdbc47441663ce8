"""The benchmarks' prompt files: the real one, the miniature's, malformed ones, and downloads."""

import csv
import hashlib
import json
import os
import re
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


def test_prompts_that_cannot_be_used_are_refused_with_their_line(tmp_path):
    half, pair = b"\xed\xa0\xbd", "\U0001f98a".encode()  # of an emoji, as some programs write it, and an emoji
    for content, message in (
        (b"", "line 1: no column Prompt"),
        (HEADER.encode(), "has no prompts"),
        (b"Prompt\tCategory\na fox\tAnimals\n", "line 1: no column Challenge"),
        (f"{HEADER}a fox\tAnimals\tBasic\t\na cat\tAnimals\n".encode(), "line 3: 2 columns, expected 4"),
        (f"{HEADER}a fox\tAnimals\tBasic\t\n\nb\tA\tB\t\n".encode(), "line 3: 1 columns, expected 4"),
        (f"{HEADER} \tAnimals\tBasic\t\n".encode(), "line 2: the prompt is empty"),
        (f"{HEADER}a fox\t\tBasic\t\n".encode(), "line 2: the category is empty"),
        (HEADER.encode() + b"a f\xe4x\tAnimals\tBasic\t\n", r"line 2: not UTF-8 \(byte 0xe4\)"),
        (HEADER.encode() + b"a fox\tA\tB\t\n" * 9 + half + b"\tA\tB\t\n", r"line 11: not UTF-8 \(byte 0xed\)"),
        (f"{HEADER}a fox\tA\tB\0\t\n".encode(), r"line 2: the challenge holds a null character \(U\+0000\)"),
        (HEADER.encode("utf-16"), r"line 1: not UTF-8 \(byte 0xff\); save the file as UTF-8"),
    ):
        refused(read_parti, tmp_path / "p.tsv", content, message)
    for content, message in (
        (b'["a",\n"b"\n"c"]', "line 3: not valid JSON"),
        (b"", "line 1: not valid JSON"),
        (b"[" * 100_000, "expected a JSON list"),
        (b'{"a": 1}', "expected a JSON list"),
        (b"[]", "expected a JSON list"),
        (b'["a", 5]', "entry 2: the prompt is 5, expected text"),
        (b'["a", ["b"]]', r'entry 2: the prompt is \["b"\], expected text'),
        (b'["a", "b", " "]', "entry 3: the prompt is empty"),
        (b'["a fox", "\\ud83d"]', r"entry 2: the prompt holds half of a surrogate pair \(U\+D83D\)"),
        (b'["a \\udd8a fox"]', r"entry 1: the prompt holds half of a surrogate pair \(U\+DD8A\)"),
        (b'["\\udd8a\\ud83e"]', r"entry 1: .*U\+DD8A"),  # in the wrong order
        (b'["a\\u0000b"]', "entry 1: the prompt holds a null character"),
        (b'["a",\n"' + half + b'"]', "line 2: not UTF-8"),
        (b'["a",\n"f\xfcchs"]', "line 2: not UTF-8"),
    ):
        refused(read_hpsv2, tmp_path / "anime.json", content, message)
    refused(
        read_hpsv2, os.fsdecode(bytes(tmp_path) + b"/p\xff.json"), b'["a"]', "the file name holds half of a .*U.DCFF"
    )
    for read in (read_parti, read_hpsv2):
        with pytest.raises(UserError, match="none: cannot be read"):
            read(tmp_path / "none")
    (tmp_path / "anime.json").write_bytes(b'\xef\xbb\xbf["\\ud83e\\udd8a", "' + pair + b'"]')  # both are whole
    assert [row["prompt"] for row in read_hpsv2(tmp_path / "anime.json")] == ["\U0001f98a"] * 2
    text = f'{HEADER}a "fox" \U0001f98a\tAnimals\tBasic\t\n'.replace("\n", "\r\n")
    (tmp_path / "p.tsv").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows saves it
    assert read_parti(tmp_path / "p.tsv") == [
        {"index": 0, "prompt": 'a "fox" \U0001f98a', "category": "Animals", "challenge": "Basic", "file": "00000.png"}
    ]


def refused(read, path, content, message):
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(Path(path).name)}(, |: ){message}") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


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
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "photo.json").write_text('[\n  "c"\n]\n')  # the hash does not depend on the layout
    first, second = read_hpsv2(tmp_path / "photo.json"), read_hpsv2(tmp_path / "b")
    assert prompts_hash(first) == prompts_hash(second) != prompts_hash([first[0] | {"prompt": "a cat"}])


def test_partiprompts_come_from_either_place_and_are_checked(tmp_path, monkeypatch):
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
    with pytest.raises(UserError, match="Face: received a file of sha256 .*: no network.* put PartiPrompts.tsv"):
        fetch_parti(tmp_path / "c.tsv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tsv", "prompts"]


def test_hpsv2s_lists_come_from_the_hub(tmp_path, monkeypatch):
    def prompts(repository, file, count=800):
        return json.dumps([f"{repository} {file}"] * count).encode()

    monkeypatch.setattr(benchmarks, "_from_hub", lambda *file: prompts(*file, 800 - ("photo" in file[1])))
    with pytest.raises(UserError, match="benchmark/photo.json .* has 799 prompts, expected 800"):
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
    with pytest.raises(UserError, match="could not be downloaded.* or name a folder with --prompts"):
        fetch_hpsv2(tmp_path / "offline")  # conftest.py forbids the network
    assert not (tmp_path / "offline").exists()


def test_the_miniatures_benchmarks_show_held_out_scenes(tmp_path):
    write_benchmarks(tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(files) == 5 and all((tmp_path / file).read_bytes() == (MINIATURE / file).read_bytes() for file in files)
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

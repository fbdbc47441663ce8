"""Prompt files of every format, real and broken ones, the file that a node shares, and the order of training."""

import bz2
import csv
import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator

from textcraftor import prompt_formats, prompt_tables, stream
from textcraftor.errors import UserError
from textcraftor.prompts import PromptFile, checksum, describe, read_prompts, read_training_prompts
from textcraftor.sampling import prompt_noise
from textcraftor.stream import batch_numbers, share_prompts, training_batch

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real prompt files in {DATA.parent.name}/data")

# What tables really hold: quotation marks, commas, line breaks, tabs, words that look like numbers or missing values.
ROWS = ["a fox", 'the sign says "hello, you"', "first line\nsecond line", "42", "null", "NA", "  a fox ", "", "é 狐"]
PROMPTS = ["a fox", 'the sign says "hello, you"', "first line\nsecond line", "42", "null", "NA", "é 狐"]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path):
    with pytest.raises(UserError) as error:
        read_prompts(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl", "json"])
def test_every_table_gives_the_same_prompts(tmp_path, suffix):
    table = pd.DataFrame({"number": range(len(ROWS)), "Prompt": ROWS, "raw_data": ['{"a": 1}'] * len(ROWS)})
    path = tmp_path / f"prompts.{suffix}"
    if suffix in ("csv", "tsv"):
        table.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=suffix == "jsonl", force_ascii=False)
    report = {"column": "Prompt", "empty": 1, "duplicate": 1, "bad": []}
    assert read_prompts(path) == (PROMPTS, report)
    assert "`Prompt`" in describe(path, report) and "1 empty" in describe(path, report)


# Name of the file, its content, the column that is read.
# fmt: off
TABLES = [
    ("p.csv", ",caption\n0,a cat\n1,a dog\n", "caption"),
    ("p.csv", "caption,prompt\na bird,a cat\na bird,a dog\n", "prompt"),
    ("p.csv", ' "TEXT" ,"url"\na cat,http://a.b/c.jpg\na dog,http://a.b/d.jpg\n', "TEXT"),
    ("p.csv", "image_id,blip_caption,negative_prompt\n1,a cat,ugly hand\n2,a dog,bad hand\n", "blip_caption"),
    ("p.csv", "prompt,caption\n1,a cat\n2,a dog\n", "caption"),
    ("p.csv", "id,Beschreibung\n1,a cat\n2,a dog\n", "Beschreibung"),
    ("p.csv", "Beschreibung,Stil\na cat,photo\na dog,anime\n", "Beschreibung"),
    ("p.csv", "datei,beschreibung\nimages/1.jpg,a cat\nimages/2.jpg,a dog\n", "beschreibung"),
    ("p.csv", "prompt;style\na cat;photo, old\na dog;anime\n", "prompt"),
    ("p.csv", "stil;beschreibung;nummer\nfoto;a cat;1\nanime;a dog;2\n", "beschreibung"),
    ("p.csv", "id\tprompt\n1\ta cat\n2\ta dog\n", "prompt"),
    ("p.csv", "id|caption\n1|a cat\n2|a dog\n", "caption"),
    ("p.csv", "sep=;\r\nprompt;style\r\na cat;photo\r\na dog;anime\r\n", "prompt"),
    ("p.tsv", 'url,text\nhttp://a.b/c,"a cat"\nhttp://a.b/d,a dog\n', "text"),
    ("p.tsv", "a cat\thttp://a.b/c\na dog\thttp://a.b/d\n", "1 (no header)"),  # Conceptual Captions
    ("p.csv", "0,a cat\n1,a dog\n", "2 (no header)"),
    ("p.csv", "0\na cat\na dog\n", "0"),  # as pandas writes a column without a name
    ("P.CSV", "\nPrompt\na cat\na dog\n", "Prompt"),
    ("p.jsonl", '{"file_name": "1.jpg", "text": "a cat"}\n{"file_name": "2.jpg", "text": "a dog"}\n', "text"),
    ("p.jsonl", '{"n": 1}\n{"n": 2, "caption": "a cat"}\n{"caption": "a dog"}\n', "caption"),
    ("p.jsonl", '\n [{"prompt": "a cat"},\n {"prompt": "a dog"}]\n', "prompt"),
    ("p.jsonl", '"a cat"\n"a dog"\n', None),
    ("p.json", '["a cat", "a dog"]', None),
    ("p.TXT", "a cat\na dog", None),
]
# fmt: on


def test_columns_and_delimiters_are_found(tmp_path):
    for name, content, column in TABLES:
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
            path = write(tmp_path / name, content.encode(encoding))
            prompts, report = read_prompts(path)
            assert (prompts, report["column"]) == (["a cat", "a dog"], column), (content, encoding)


def test_commas_in_a_table_of_one_column_belong_to_the_prompt(tmp_path):
    wanted = ["a cat, red", "a dog; big, blue", "a bird"]
    for header in ("prompt\n", "", '"prompt"\n'):
        path = write(tmp_path / "p.csv", header + 'a cat, red\n"a dog; big, blue"\na bird\n')
        assert read_prompts(path)[0] == wanted
    path = write(tmp_path / "p.csv", "a very small cat sitting on a red mat\na dog\n")  # no header: nothing is lost
    assert read_prompts(path)[0] == ["a very small cat sitting on a red mat", "a dog"]


# Name of the file, its content, what the message says.
# fmt: off
REFUSED = [
    ("p.csv", None, "no such prompt file"),
    ("p.doc", "a cat", "unknown format"),
    ("p.csv", "", "no rows"),
    ("p.txt", "", "no rows"),
    ("p.json", "[]", "no rows"),
    ("p.csv", "prompt,raw_data\n", "no rows"),
    ("p.csv", "prompt,raw_data\n,x\n  ,y\n", "no usable prompts"),
    ("p.csv", 'prompt\n"never closed\n', "0 rows are empty and 1 unreadable"),
    ("p.csv", '"prompt\na fox\n', "not a readable csv"),
    ("p.jsonl", '{"prompt": "a c\nnot json\n', "0 rows are empty and 2 unreadable"),
    ("p.jsonl", '{\n "prompt": "a cat"\n}\n', "no usable prompts"),
    ("p.parquet", "", "not a readable parquet"),
    ("p.parquet", "not parquet", "not a readable parquet"),
    ("p.csv", "prompt\n1\n2.5\n-3e-4\n", "`prompt` holds numbers"),
    ("p.csv", "prompt,id\nhttps://a.b/c.jpg,1\nhttp://a.b/d,2\n", "`prompt` holds URLs"),
    ("p.csv", "text\nimages/1.jpg\nmy picture.PNG\n/home/me/a b\n", "`text` holds file names"),
    ("p.csv", "caption,n\n\"['a cat', 'two cats']\",1\n\"['a dog']\",2\n", "`caption` holds lists"),
    ("p.csv", "id,url\n1,http://a.b/c\n2,http://a.b/d\n", "found `id` (numbers), `url` (URLs); rename"),
    ("p.csv", "titel,stil\na red cat,an old photo\na blue dog,a new film\n", "cannot tell which column"),
    ("p.jsonl", '{"prompt": {"en": "a cat"}}\n{"prompt": {"en": "a dog"}}\n', "`prompt` holds structs"),
    ("p.jsonl", '{"data": {"prompt": "a cat"}}\n', "found `data` (structs)"),
    ("p.jsonl", '{"text": ["a cat", "two cats"]}\n', "`text` holds lists"),
    ("p.jsonl", '{"prompt": 5}\n{"prompt": 6}\n', "`prompt` holds numbers"),
    ("p.jsonl", '["a cat"]\n["a dog"]\n', "holds lists"),
    ("p.json", '{"annotations": [{"caption": "a cat"}]}', "found `annotations` (lists)"),
    ("p.txt", "a/1.jpg\na/2.jpg\n", "holds file names"),
    ("p.csv", b"PK\x03\x04\x14\0\0\0", "Excel"),
    ("p.csv", b"\x28\xb5\x2f\xfd\0\0", "zstd"),
    ("p.csv", "\n<!DOCTYPE html>\n<html>", "web page"),
    ("p.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ("p.csv.gz", gzip.compress(b"prompt\na cat\n" * 99)[:40], "not a readable csv"),
]
# fmt: on


def test_other_files_are_refused_in_one_line(tmp_path):
    for name, content, problem in REFUSED:
        path = tmp_path / name
        if content is not None:
            write(path, content)
        assert problem in refusal(path), (content, problem)
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.csv")


def test_damaged_archives_and_endless_brackets_are_no_tracebacks(tmp_path):
    """Bytes changed anywhere in a compressed file end in one line, unless what it holds can be read all the same."""
    whole = gzip.compress("".join(f"prompt {i} of many\n" for i in range(300)).encode())
    rng, refused = random.Random(0), 0
    for name in ("p.csv.gz", "p.tsv.gz", "p.jsonl.gz", "p.txt.gz"):
        for _ in range(20):
            content = bytearray(whole)
            content[rng.randrange(10, len(content))] ^= rng.randrange(1, 256)
            write(tmp_path / name, bytes(content))
            try:
                read_prompts(str(tmp_path / name))
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 40
    write(tmp_path / "p.jsonl", '{"prompt": "a cat"}\n' + "[" * 200_000 + '\n{"prompt": "a dog"}\n')
    assert read_prompts(str(tmp_path / "p.jsonl"))[0] == ["a cat", "a dog"]


def test_compressed_files(tmp_path):
    for name, compress in (("p.csv.gz", gzip.compress), ("p.csv", gzip.compress), ("p.CSV.bz2", bz2.compress)):
        path = write(tmp_path / name, compress(b"id,prompt\n1,a cat\n2\n3,a dog\n"))
        assert read_prompts(path) == (["a cat", "a dog"], {"column": "prompt", "empty": 0, "duplicate": 0, "bad": [3]})


def test_parquet_of_every_type(tmp_path):
    path, texts = tmp_path / "p.parquet", ["a cat", None, "a dog"]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(texts).cast(kind) if kind != pa.string_view() else pa.array(texts, kind)
        table = pa.table({"URL": pa.array(["http://a.b/c"] * 3), "hash": pa.array([1, 2, 3]), "TEXT": column})
        pyarrow.parquet.write_table(table, path)
        assert read_prompts(path) == (["a cat", "a dog"], {"column": "TEXT", "empty": 1, "duplicate": 0, "bad": []})
    for values, kind in (
        ([1, 2], "numbers"), ([b"a cat"], "bytes"), ([{"en": "a cat"}], "structs"), ([["a cat"]], "lists"),
    ):  # fmt: skip
        pyarrow.parquet.write_table(pa.table({"prompt": pa.array(values)}), path)
        assert f"`prompt` holds {kind}" in refusal(path)
    not_utf8 = pa.array([b"a cat", b"caf\xe9", b"a dog"]).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"prompt": not_utf8}), tmp_path / "p.csv")  # the content decides
    assert read_prompts(tmp_path / "p.csv")[0] == ["a cat", "a dog"]
    assert read_prompts(tmp_path / "p.csv")[1]["bad"] == [2]


def test_text_is_one_prompt_a_line(tmp_path):
    # U+2028 and form feed end no line.
    path = write(tmp_path / "p.txt", "a cat, sitting\r\n\n a dog\u2028barking\x0c! \na cat, sitting")
    report = {"column": None, "empty": 1, "duplicate": 1, "bad": []}
    assert read_prompts(path) == (["a cat, sitting", "a dog\u2028barking\x0c!"], report)


# Bad rows: skipped, their lines named, and none beside them lost.


# fmt: off
BAD_ROWS = [
        (b'prompt,raw\na fox,1\n"a dog, sitt', ["a fox"], [3]),  # a download that broke off
        (b"prompt,raw\na fox,1\na dog sitt", ["a fox"], [3]),
        (b'prompt,raw\n"a fox,1\na cat,"{""b"": 2}"\na dog,3\n', ["a cat", "a dog"], [2]),
        (b'prompt,raw\n"a fox,1\n"a cat","{}"\na dog,3\n', ["a cat", "a dog"], [2]),
        (b'prompt,raw\n"a "red" fox",1\na dog,3\n', ["a dog"], [2]),
        (b'prompt,raw\na 5" fox,1\na dog,3\n', ['a 5" fox', "a dog"], []),  # no mark at its start: not quoted
        (b"prompt,raw\na fox, red,1\na dog,3\n", ["a dog"], [2]),
        (b"prompt,raw\na \0fox,1\na dog,3\n", ["a dog"], [2]),
        (b"prompt,raw\na caf\xe9,1\na dog,3\xe9\n", ["a dog"], [2]),  # what is not read may be anything
        (b'prompt,raw\n"two\nlines",1\n"and\r\nthr\xe9e\nlines",1\n\na dog,3', ["two\nlines", "a dog"], [4]),
        (b"prompt\r\na fox\r\na d\rog\r\na cat\r\n", ["a fox", "a cat"], [3]),
        (b'prompt\n"a fox\n' + b"row\n" * 200_000 + b'"\na dog\n', ["row", "a dog"], [2, 200_003]),
]
# fmt: on


@pytest.mark.parametrize("block", [7, 2**20])
def test_bad_rows_of_a_table(tmp_path, monkeypatch, block):
    for content, prompts, bad in BAD_ROWS:
        monkeypatch.setattr(prompt_tables, "BLOCK", max(block, len(content) // 20))
        found, report = read_prompts(write(tmp_path / "p.csv", content))
        assert (found, report["bad"]) == (prompts, bad), content[:80]


def test_a_bad_row_does_not_harm_a_huge_cell_beside_it(tmp_path):
    """After a bad row the csv module reads the whole block, and its own limit would refuse cells of 128 KiB."""
    for length in (200_000, 3_000_000):
        for bad_row in ("", "a cat\n"):
            huge = "an inner line,2\n" * (length // 16)
            path = write(tmp_path / "p.csv", f'prompt,raw\n{bad_row}a fox,"{huge}"\na dog,3\n')
            found, report = read_prompts(path)
            assert (found, report["bad"]) == (["a fox", "a dog"], [2] * bool(bad_row))


def test_line_numbers_can_be_written_as_json(tmp_path):
    path = write(tmp_path / "p.csv", "prompt,raw\n" + "a fox,1\n" * 200_000 + "a cat\n")
    bad = read_prompts(path)[1]["bad"]
    assert bad == [200_002] and json.dumps(bad)


def test_bad_rows_of_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_formats, "LINES", 2)
    half = b'{"prompt": "half a fox \\ud83e"}\n{"prompt": "a \\ud83e\\udd8a"}\n'  # the second is a whole fox
    for name, content, prompts, bad in (
        ("p.txt", b"a fox\na caf\xe9\n\0\na dog\n\xed\xa0\xbd", ["a fox", "a dog"], [2, 3, 5]),
        ("p.jsonl", b'"a fox"\nnot json\n5\n\n{"prompt": "a dog"}\n{"prom', ["a fox", "a dog"], [2, 3, 6]),
        ("p.jsonl", half + b'{"prompt": null}\n{}\n', ["a \U0001f98a"], [1, 4]),
        ("p.json", b'[{"prompt": "a fox"}, {"prompt": "\\udd8a"}, {"prompt": ["a"]}]', ["a fox"], [2, 3]),
    ):
        found, report = read_prompts(write(tmp_path / name, content))
        assert (found, report["bad"]) == (prompts, bad), content


TSV = [
    ('prompt\tn\n"a red fox\t1\na cat\t2\na dog"\t3\n', ['"a red fox', "a cat", 'a dog"'], []),
    ('n\tprompt\n1\t"a fox\n2\ta cat\n3\ta dog"\n', ['"a fox', "a cat", 'a dog"'], []),
    ('prompt\n"a fox\na cat"\n', ['"a fox', 'a cat"'], []),
    ('prompt\tn\n"a ""red"" fox"\t"1"\n"a" and "b"\t"2"\n"\t3\n', ['a "red" fox', '"a" and "b"', '"'], []),
    ('prompt\tn\n"a\tfox"\t1\na\tdog\t2\na cat\t3\n', ["a\tfox", "a cat"], [3]),
    ('prompt\tn\n"a\n\nfox"\t1\na cat\t2\n', ["a\n\nfox", "a cat"], []),
    ('n\tprompt\r\n1\t"a\r\nfox"\r\n2\ta cat\r\n', ["a\r\nfox", "a cat"], []),
    ('n\tprompt\tm\n1\t"a\nfox"\t2\n1\t"broken\n1\ta cat\t2\n', ["a\nfox", "a cat"], [4]),
    ('n\tprompt\tm\n1\t"broken\n1\ta cat\t2\n1\tdog"\t2\n', ["a cat", 'dog"'], [2]),
]


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_a_row_of_a_tsv_is_a_line(tmp_path, monkeypatch, block):
    monkeypatch.setattr(prompt_tables, "BLOCK", block)
    for content, prompts, bad in TSV:
        found, report = read_prompts(write(tmp_path / "p.tsv", content))
        assert (found, report["bad"]) == (prompts, bad), content


def row_by_row(path, separator):
    """The reference: Python's csv module and nothing else, for a table without line breaks in its cells."""
    prompts, bad = {}, []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = next(csv.reader([line.decode("latin-1")], delimiter=separator, strict=True), None)
            prompt = row and row[0].encode("latin-1").decode().strip()
        except (csv.Error, ValueError):
            row = prompt = "bad"
        if number > 1 and row:
            if len(row) != 2 or "\0" in prompt:
                bad.append(number)
            elif prompt:
                prompts[prompt] = None
    return list(prompts), bad


@pytest.mark.parametrize("separator", [",", ";"])
def test_damaged_tables_lose_only_their_damaged_rows(tmp_path, monkeypatch, separator):
    """Thousands of rows of which some have lost, gained or changed a byte; blocks of which most have no such row."""
    for seed in range(10):
        random = np.random.default_rng(seed)
        words = ["fox", "5", ",", '"', "é", " ", "{}", "'", "狐"]
        table = pd.DataFrame({
            "prompt": ["row " + "".join(random.choice(words, 6)) for _ in range(1000)],
            "raw": [json.dumps({"a": int(n)}) for n in range(1000)],
        })  # fmt: skip
        lines = table.to_csv(index=False, sep=separator).encode().rstrip(b"\n").split(b"\n")
        for number in random.choice(np.arange(1, 1001), 12, replace=False):
            line = bytearray(lines[number])
            place = random.integers(len(line))
            line[place : place + random.integers(2)] = random.choice([b"", b"\0", b"\xff", separator.encode(), b"x"])
            lines[number] = bytes(line)
        path = tmp_path / "p.csv"
        path.write_bytes(b"\n".join(lines))
        monkeypatch.setattr(prompt_tables, "BLOCK", 2000)
        prompts, dropped = read_prompts(path)
        expected, bad = row_by_row(path, separator)
        assert dropped["bad"] == bad and prompts == expected


@needs_data
def test_real_prompt_files():
    with open(DATA / "open-prompts-1k.csv", newline="", encoding="utf-8") as file:
        rows = [row["prompt"] for row in csv.DictReader(file)]
    assert len(rows) == 998 and rows.count("") == 9 and len(set(rows)) == 985
    prompts, report = read_prompts(DATA / "open-prompts-1k.csv")
    assert prompts == list(dict.fromkeys(row.strip() for row in rows if row.strip()))
    assert report == {"column": "prompt", "empty": 9, "duplicate": 998 - 9 - len(prompts), "bad": []}
    assert max(map(len, prompts)) == 932
    parti, report = read_prompts(DATA / "PartiPrompts.tsv")
    assert len(parti) == 1632 and not report["bad"] and any(prompt.startswith('"G I G G L E"') for prompt in parti)
    assert report["column"] == "Prompt"
    assert len(read_prompts(DATA / "hpdv2-prompts-750.txt")[0]) == 750


TEXTS = [f"prompt {number} 狐" for number in range(10)]


def test_a_prompt_file_is_a_sequence_of_its_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("textcraftor.prompts.CHUNK", 3)
    for texts in (TEXTS, ["", "a\nb", " c "], ["x" * 100_000], []):
        prompts = PromptFile.write(tmp_path / "prompts", iter(texts))
        assert list(prompts) == texts == prompts[:] and len(prompts) == len(texts)
        assert prompts[1:7:2] == texts[1:7:2] and checksum(prompts) == checksum(texts)
        for index in (len(texts), -len(texts) - 1):
            with pytest.raises(IndexError):
                prompts[index]
    assert PromptFile.write(tmp_path / "prompts", TEXTS)[np.int64(-1)] == TEXTS[-1]


def test_the_checksum_is_that_of_the_order():
    first, second = ["a", "b"] * 3, ["b", "a"] * 3
    assert checksum(first) == checksum(list(first)) != checksum(second)
    assert checksum(["a, b"]) != checksum(["a", "b"])
    assert checksum(["a", "é"]) == crc32("a\0é\0".encode())  # a resumed run compares it with the one it wrote down


def test_held_out_prompts_are_not_trained_on(tmp_path):
    path, file = write(tmp_path / "p.txt", "\n".join(TEXTS)), tmp_path / "prompts"

    def split(val_lines, count):
        val_path = write(tmp_path / "v.txt", "\n".join(val_lines)) if val_lines else None
        prompts, held_out, reports = read_training_prompts(path, val_path, count, file)
        assert list(reports) == [str(path)] + [str(val_path)] * bool(val_lines)
        return list(prompts), held_out

    assert split([], 3) == (TEXTS[3:], TEXTS[:3])
    assert split([], 16) == (TEXTS[5:], TEXTS[:5])  # never more than half
    assert split(["new", TEXTS[2], TEXTS[9]], 2) == ([*TEXTS[:2], *TEXTS[3:]], ["new", TEXTS[2]])
    for val_lines in ([], TEXTS[:1]):
        write(path, TEXTS[0])
        with pytest.raises(UserError, match="0 prompts to train on|0 held out"):
            split(val_lines, 4)


SHARE = """
import sys
from accelerate import Accelerator
from textcraftor.errors import run_program
from textcraftor.prompts import checksum
from textcraftor.stream import share_prompts

def main():
    accelerator = Accelerator(cpu=True)
    for path in sys.argv[1:]:
        prompts, held_out, reports = share_prompts(accelerator, path, None, 2)
        found = f"{checksum(prompts)} {prompts[-1]} {held_out} {len(reports)}"
        print(f"process {accelerator.process_index}: {found}\\n", end="", flush=True)

run_program(main)
"""


@pytest.mark.xdist_group("processes")
def test_processes_share_one_file_and_one_error(tmp_path):
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    write(good, "id,prompt\n1,a cat\n2,a dog\n3,a fox\n4,an owl\n")
    write(bad, "prompt\n1\n2\n")
    program, folder = write(tmp_path / "share.py", SHARE), tmp_path / "temporary"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program, good, bad]
    variables = {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(folder), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=120)
    wanted = f"{checksum(['a fox', 'an owl'])} an owl ['a cat', 'a dog'] 1"
    assert sorted(done.stdout.splitlines()) == [f"process {rank}: {wanted}" for rank in (0, 1)], done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line and "bad.csv" in line]
    assert done.returncode and len(errors) == 1 and "`prompt` holds numbers" in errors[0], done.stderr
    assert not list(folder.glob("textcraftor-*"))


def test_nodes_with_other_prompts_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "p.txt", "\n".join(TEXTS))
    accelerator = Accelerator(cpu=True)

    def two_nodes(mine):
        return [*mine, (mine[0][0], mine[0][1] + 1, *mine[0][2:])]

    monkeypatch.setattr(stream, "gather_object", two_nodes)
    with pytest.raises(UserError, match="different prompts"):
        share_prompts(accelerator, path, None, 2)


def test_an_epoch_shows_every_prompt_once_in_a_seeded_order():
    def shown(seed, epoch):
        return training_batch(TEXTS, seed, (1, 2, 2), range(10 * epoch, 10 * epoch + 10))[0]

    orders = [shown(0, 0), shown(0, 1), shown(1, 0)]
    assert all(Counter(order) == Counter(TEXTS) for order in orders)
    assert orders[0] == shown(0, 0)
    assert orders[0] != TEXTS and orders[0] != orders[1] and orders[0] != orders[2]
    for epoch in (0, 1):  # written down: a resumed run goes on with the samples of the version that began it
        assert orders[epoch] == [TEXTS[i] for i in np.random.default_rng([0, epoch]).permutation(10)]


def test_a_sample_depends_on_its_number_alone():
    prompts, noise = training_batch(["a", "b"], 3, (4, 8, 8), range(6))
    for n in range(6):
        assert training_batch(["a", "b"], 3, (4, 8, 8), [n])[0] == [prompts[n]]
    assert noise.shape == (6, 4, 8, 8) and torch.equal(noise, prompt_noise(3, range(6), (4, 8, 8)))
    assert not torch.equal(noise[0], noise[2])


def test_processes_share_the_micro_batches_of_one():
    for micro_batch in (0, 2, 5):
        one = batch_numbers(micro_batch, 6, 0, 1)
        assert [*batch_numbers(micro_batch, 3, 0, 2), *batch_numbers(micro_batch, 3, 1, 2)] == list(one)
    assert batch_numbers(2, 6, 0, 1) == range(12, 18)

"""Prompt files of every format, real and broken ones, and the order in which training sees them."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from textcraftor import prompts as prompt_files
from textcraftor.errors import UserError
from textcraftor.prompts import checksum, hold_out, read_prompts
from textcraftor.sampling import prompt_noise
from textcraftor.stream import PromptStream, batches

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real prompt files in {DATA.parent.name}/data")

# What tables really hold: quotation marks, commas, line breaks, tabs, words that look like numbers or missing values.
ROWS = ["a fox", 'the sign says "hello, you"', "first line\nsecond line", "42", "null", "NA", "  a fox ", "", "é 狐"]
PROMPTS = ["a fox", 'the sign says "hello, you"', "first line\nsecond line", "42", "null", "NA", "é 狐"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl"])
@pytest.mark.parametrize("column", ["Prompt", "prompt", "PROMPT"])
def test_every_table_gives_the_same_prompts(tmp_path, suffix, column):
    path = tmp_path / f"prompts.{suffix}"
    table = pd.DataFrame({"number": range(len(ROWS)), column: ROWS, "raw_data": ['{"a": 1}'] * len(ROWS)})
    if suffix in ("csv", "tsv"):
        table.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")), encoding="utf-8")
    assert read_prompts(path) == (PROMPTS, {"empty": 1, "duplicate": 1, "bad": []})


def test_without_a_column_prompt_the_first_is_read(tmp_path):
    (tmp_path / "p.csv").write_text("caption,prompter\na cat,me\na dog,you\n")
    assert read_prompts(tmp_path / "p.csv")[0] == ["a cat", "a dog"]


def test_text_is_one_prompt_a_line(tmp_path):
    # U+2028 and form feed end no line.
    (tmp_path / "p.txt").write_text("a cat, sitting\r\n\n a dog\u2028barking\x0c! \na cat, sitting", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == (
        ["a cat, sitting", "a dog\u2028barking\x0c!"],
        {"empty": 1, "duplicate": 1, "bad": []},
    )


@pytest.mark.parametrize("name, content", [("p.txt", "a cat"), ("p.csv", "Prompt\na cat"), ("p.jsonl", '"a cat"')])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_prompts(tmp_path / name)[0] == ["a cat"]


def test_missing_values_are_empty(tmp_path):
    pd.DataFrame({"prompt": ["a cat", None]}).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": null}\n\n"a dog"\n')
    assert read_prompts(tmp_path / "p.parquet") == (["a cat"], {"empty": 1, "duplicate": 0, "bad": []})
    assert read_prompts(tmp_path / "p.jsonl") == (["a cat", "a dog"], {"empty": 1, "duplicate": 0, "bad": []})


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("p.csv", None, "no such prompt file"),
        ("p.json", "[]", "unknown format"),
        ("p.csv", "", "no rows"),
        ("p.csv", "prompt,raw_data\n", "no rows"),
        ("p.csv", "prompt,raw_data\n,x\n  ,y\n", "no usable prompts"),
        ("p.csv", 'prompt\n"never closed\n', "0 rows are empty and 1 unreadable"),
        ("p.csv", '"prompt\na fox\n', "not a readable csv"),
        ("p.txt", "", "no rows"),
        ("p.csv", "prompt\na fox\n".encode("utf-16"), "expected UTF-8"),
        ("p.jsonl", "5\n{}\nnot json\n", "0 rows are empty and 3 unreadable"),
        ("p.parquet", "not parquet", "not a readable parquet"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert problem in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


# Bad rows: skipped, their lines named, and none beside them lost.


@pytest.mark.parametrize(
    "content, prompts, bad",
    [
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
    ],
)
@pytest.mark.parametrize("block", [7, 2**20])
def test_bad_rows_of_a_table(tmp_path, monkeypatch, content, prompts, bad, block):
    monkeypatch.setattr(prompt_files, "BLOCK", max(block, len(content) // 20))
    (tmp_path / "p.csv").write_bytes(content)
    found, dropped = read_prompts(tmp_path / "p.csv")
    assert (found, dropped["bad"]) == (prompts, bad)


@pytest.mark.parametrize("length", [200_000, 3_000_000])
@pytest.mark.parametrize("bad_row", ["", "a cat\n"])
def test_a_huge_cell_is_none_the_worse_for_a_bad_row_beside_it(tmp_path, length, bad_row):
    """A bad row has the whole block read by the csv module, which by itself refuses cells of 128 KiB."""
    huge = "an inner line,2\n" * (length // 16)
    (tmp_path / "p.csv").write_text(f'prompt,raw\n{bad_row}a fox,"{huge}"\na dog,3\n')
    found, dropped = read_prompts(tmp_path / "p.csv")
    assert (found, dropped["bad"]) == (["a fox", "a dog"], [2] * bool(bad_row))


def test_line_numbers_can_be_written_down(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,raw\n" + "a fox,1\n" * 200_000 + "a cat\n")
    bad = read_prompts(tmp_path / "p.csv")[1]["bad"]
    assert bad == [200_002] and json.dumps(bad)


@pytest.mark.parametrize("name, content, prompts, bad", [
    ("p.txt", b"a fox\na caf\xe9\n\0\na dog", ["a fox", "a dog"], [2, 3]),
    ("p.jsonl", b'"a fox"\nnot json\n{"prompt": "\\ud800"}\n\n"a dog"\n{"prom', ["a fox", "a dog"], [2, 3, 6]),
    ("p.tsv", b'prompt\tn\n"Hi!" said\t1\na "fox"\t2\n"a dog"\t3\n"a\t4', ['"Hi!" said', 'a "fox"', "a dog", '"a'], []),
])  # fmt: skip
def test_bad_rows_of_other_files(tmp_path, monkeypatch, name, content, prompts, bad):
    monkeypatch.setattr(prompt_files, "LINES", 2)
    (tmp_path / name).write_bytes(content)
    found, dropped = read_prompts(tmp_path / name)
    assert (found, dropped["bad"]) == (prompts, bad)


@pytest.mark.parametrize(
    "content, prompts, bad",
    [
        ('prompt\tn\n"a red fox\t1\na cat\t2\na dog"\t3\n', ['"a red fox', "a cat", 'a dog"'], []),
        ('n\tprompt\n1\t"a fox\n2\ta cat\n3\ta dog"\n', ['"a fox', "a cat", 'a dog"'], []),
        ('prompt\n"a fox\na cat"\n', ['"a fox', 'a cat"'], []),
        ('prompt\tn\n"a ""red"" fox"\t"1"\n"a" and "b"\t"2"\n"\t3\n', ['a "red" fox', '"a" and "b"', '"'], []),
        ('prompt\tn\n"a\tfox"\t1\na\tdog\t2\na cat\t3\n', ["a\tfox", "a cat"], [3]),
        ('prompt\tn\n"a\n\nfox"\t1\na cat\t2\n', ["a\n\nfox", "a cat"], []),
        ('n\tprompt\r\n1\t"a\r\nfox"\r\n2\ta cat\r\n', ["a\r\nfox", "a cat"], []),
        ('n\tprompt\tm\n1\t"a\nfox"\t2\n1\t"broken\n1\ta cat\t2\n', ["a\nfox", "a cat"], [4]),
        ('n\tprompt\tm\n1\t"broken\n1\ta cat\t2\n1\tdog"\t2\n', ["a cat", 'dog"'], [2]),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_a_row_of_a_tsv_is_a_line(tmp_path, monkeypatch, content, prompts, bad, block):
    monkeypatch.setattr(prompt_files, "BLOCK", block)
    (tmp_path / "p.tsv").write_bytes(content.encode())
    found, dropped = read_prompts(tmp_path / "p.tsv")
    assert (found, dropped["bad"]) == (prompts, bad)


def row_by_row(path):
    """The reference: Python's csv module and nothing else, for a table without line breaks in its cells."""
    prompts, bad = {}, []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = next(csv.reader([line.decode("latin-1")], strict=True), None)
            prompt = row and row[0].encode("latin-1").decode().strip()
        except (csv.Error, ValueError):
            row = prompt = "bad"
        if number > 1 and row:
            if len(row) != 2 or "\0" in prompt:
                bad.append(number)
            elif prompt:
                prompts[prompt] = None
    return list(prompts), bad


@pytest.mark.parametrize("seed", range(20))
def test_damaged_tables_lose_their_damaged_rows_alone(tmp_path, monkeypatch, seed):
    """Thousands of rows of which some have lost, gained or changed a byte; blocks of which most have no such row."""
    random = np.random.default_rng(seed)
    words = ["fox", "5", ",", '"', "é", " ", "{}", "'", "狐"]
    table = pd.DataFrame({
        "prompt": ["row " + "".join(random.choice(words, 6)) for _ in range(2000)],
        "raw": [json.dumps({"a": int(n)}) for n in range(2000)],
    })  # fmt: skip
    lines = table.to_csv(index=False).encode().rstrip(b"\n").split(b"\n")
    for number in random.choice(np.arange(1, 2001), 12, replace=False):
        line = bytearray(lines[number])
        place = random.integers(len(line))
        line[place : place + random.integers(2)] = random.choice([b"", b"\0", b"\xff", b",", b"x"])
        lines[number] = bytes(line)
    path = tmp_path / "p.csv"
    path.write_bytes(b"\n".join(lines))
    monkeypatch.setattr(prompt_files, "BLOCK", 2000)
    prompts, dropped = read_prompts(path)
    expected, bad = row_by_row(path)
    assert dropped["bad"] == bad and prompts == expected


def test_the_checksum_is_that_of_the_order():
    first, second = ["a", "b"] * 3, ["b", "a"] * 3
    assert checksum(first) == checksum(list(first)) != checksum(second)
    assert checksum(["a, b"]) != checksum(["a", "b"])


@needs_data
def test_real_open_prompts():
    with open(DATA / "open-prompts-1k.csv", newline="", encoding="utf-8") as file:
        rows = [row["prompt"] for row in csv.DictReader(file)]
    assert len(rows) == 998 and rows.count("") == 9 and len(set(rows)) == 985
    prompts, dropped = read_prompts(DATA / "open-prompts-1k.csv")
    assert prompts == list(dict.fromkeys(row.strip() for row in rows if row.strip()))
    assert dropped == {"empty": 9, "duplicate": 998 - 9 - len(prompts), "bad": []}
    assert max(map(len, prompts)) == 932


@needs_data
def test_real_benchmarks():
    parti, dropped = read_prompts(DATA / "PartiPrompts.tsv")
    assert len(parti) == 1632 and not dropped["bad"] and any(prompt.startswith('"G I G G L E"') for prompt in parti)
    assert len(read_prompts(DATA / "hpdv2-prompts-750.txt")[0]) == 750


def test_held_out_prompts_are_not_trained_on():
    prompts = [f"prompt {number}" for number in range(10)]
    assert hold_out(prompts, [], 3) == (prompts[3:], prompts[:3])
    assert hold_out(prompts, [], 16) == (prompts[5:], prompts[:5])  # never more than half
    assert hold_out(prompts, ["new", "prompt 2", "prompt 9"], 2) == ([*prompts[:2], *prompts[3:]], ["new", "prompt 2"])
    for all_held_out in (prompts[:1], []), (prompts[:1], prompts[:1]):
        with pytest.raises(UserError, match="no prompts left"):
            hold_out(*all_held_out, 4)


def test_an_epoch_shows_every_prompt_once_in_a_seeded_order():
    prompts = [f"prompt {number}" for number in range(20)]

    def shown(seed, epoch):
        stream = PromptStream(prompts, seed, (1, 2, 2))
        return [stream[n]["prompt"] for n in range(20 * epoch, 20 * epoch + 20)]

    orders = [shown(0, 0), shown(0, 1), shown(1, 0)]
    assert all(Counter(order) == Counter(prompts) for order in orders)
    assert orders[0] == shown(0, 0)
    assert orders[0] != prompts and orders[0] != orders[1] and orders[0] != orders[2]


def test_noise_differs_between_epochs_and_is_that_of_the_sample():
    stream = PromptStream(["a", "b"], 3, (4, 8, 8))
    assert torch.equal(stream[5]["noise"], prompt_noise(3, [5], (4, 8, 8))[0])
    assert not torch.equal(stream[0]["noise"], stream[2]["noise"])


def test_processes_share_the_batches_of_one():
    one = list(batches(2, 5, 6, 0, 1))
    two = [list(batches(2, 5, 3, rank, 2)) for rank in (0, 1)]
    assert one == [first + second for first, second in zip(*two, strict=True)]
    assert one[0][0] == 12 and one[-1][-1] == 29

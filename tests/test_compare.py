"""Comparing runs: pairing, refused and damaged runs, the pages, and votes."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image

from compare import main
from textcraftor.benchmark.program import evaluate
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.benchmark.results import Table
from textcraftor.comparison import votes
from textcraftor.comparison.pages import data_uri
from textcraftor.comparison.runs import comparison_hash, read_runs
from textcraftor.errors import UserError
from textcraftor.statistics import wilson_interval

HOSTILE = '</script><script>alert(1)</script> {{title}} <img src="https://example.com/x.png"> "quoted" & ünï'
SETTINGS = {"benchmark": "PartiPrompts", "prompts (sha256)": "p" * 64, "hps_version": "2.0", "seed": 2023}
SETTINGS |= {f"{name} (sha256)": name[0] * 64 for name in ("clip", "aesthetic")}
COUNT = 40  # images of a run, more than two blocks


def make_run(folder, shift=0.0, settings=(), unread=(), absent=(), scores=("clip", "aesthetic"), size=(8, 8)):
    """A finished run as test_parti.py leaves it; the pixels of image i are (i, 100 * shift, 200)."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    noise = np.random.default_rng(int(1000 * shift)).normal(0, 0.1, (COUNT, len(scores)))
    rows = []
    for i in range(COUNT):
        prompt = {3: HOSTILE, 4: "a\rb\u2028c\x85d\x0ce\nf"}.get(i, f"prompt {i}")
        row = {"index": i, "prompt": prompt, "category": "AB"[i % 2], "challenge": "Basic", "file": f"{i:05d}.png"}
        Image.new("RGB", size, (i, int(100 * shift), 200)).save(folder / row["file"])
        values = {name: shift + i / 10 + noise[i, k] for k, name in enumerate(scores)}
        if i not in absent:
            rows.append(row | ({"problem": "no such file"} if i in unread else values))
    table = Table(folder / "scores.csv", ["index", "prompt", "category", "challenge", "file"], list(scores))
    table.write(rows)
    tiny.write_json(folder / "settings.json", SETTINGS | dict(settings))
    tiny.write_json(folder / "summary.json", {"scores": dict.fromkeys(scores, {}), "model": "m"})
    return str(folder)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folders of two runs, in a folder made the current one."""
    monkeypatch.chdir(tmp_path)
    return make_run("original"), make_run("tuned", 0.5)


def compared(folder="compare"):
    return json.loads((Path(folder) / "comparison.json").read_text())


def script(page, identity):
    return re.search(rf'<script [^>]*id="{identity}">(.*?)</script>', page, re.DOTALL)[1]


def picture(uri):
    kind, content = uri.split(";base64,")
    assert kind in ("data:image/webp", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")


# Runs


def test_rows_beyond_a_lower_limit_do_not_keep_runs_from_being_compared(runs):
    """test_parti.py with a lower --limit keeps the rows beyond it; fewer rows than the summary says are an error."""
    for scored, fits in ((30, True), (COUNT + 1, False)):
        path = Path(runs[0]) / "summary.json"
        tiny.write_json(path, json.loads(path.read_text()) | {"images": {"scored": scored, "of": COUNT}})
        if fits:
            main([*runs])
            assert compared()
        else:
            with pytest.raises(UserError, match=f"has {COUNT} scored images, summary.json says {COUNT + 1}"):
                main([*runs, "--output_path", "again"])


def test_runs_are_paired_by_prompt_and_what_is_left_out_is_counted(runs, capsys):
    make_run("third", 0.2, {"seed": 7}, unread=(4, 5), absent=(0, 1, 2))
    main([*runs, "third"])
    found, output = compared(), capsys.readouterr().out
    assert found["prompts"] == COUNT - 5
    assert found["notes"] == [
        "A: 5 of 40 images are left out: they were not scored in every other run",
        "B: 5 of 40 images are left out: they were not scored in every other run",
        "C: 2 of 37 images are left out: they have no score",
        "the runs differ in seed: A 2023, B 2023, C 7",
    ]
    assert all(f"note: {note}" in output for note in found["notes"])
    tables = {name: pd.read_csv(Path(name) / "scores.csv").dropna().set_index("index") for name in (*runs, "third")}
    gain = (tables["third"]["clip"] - tables[runs[0]]["clip"]).dropna()
    every = {(r["run"], r["by"], r["group"], r["score"]): r for r in found["results"]}
    record = every[2, "all", "all", "clip"]
    assert record["difference"] == pytest.approx(gain.mean()) and record["wins"] == (gain > 0).sum()
    assert record["low"] < gain.mean() < record["high"] and record["prompts"] == len(gain)
    odd = gain[gain.index % 2 == 1]
    assert every[2, "category", "B", "clip"]["difference"] == pytest.approx(odd.mean())
    assert Image.open("compare/comparison.png").size[0] > 400

    before = compared()
    main([*runs, "third"])
    assert compared() == before  # seeded


def test_scores_of_one_run_alone_and_other_prompts_are_noted(runs, capsys):
    make_run("more", 0.2, scores=("clip", "aesthetic", "hps_v2.0"))
    main([*runs])
    main([*runs])
    assert "replaced" not in capsys.readouterr().out
    main([runs[0], "more"])
    assert "compare: replaced the comparison of original, tuned" in capsys.readouterr().out
    assert compared()["notes"] == ["hps_v2.0 is left out: not measured in A"]
    assert {record["score"] for record in compared()["results"]} == {"clip", "aesthetic"}
    make_run("extended", 0.1, {"score_prompt": "extended", "prompt_eng (sha256)": "e" * 64})
    main([runs[0], "extended"])
    assert compared()["notes"] == [
        "the runs were scored with different prompts: A with the original ones, B with the extended ones"
    ]
    assert "scored with its extended prompts" in Path("compare/report.html").read_text()


def test_runs_that_mean_different_things_are_refused(runs):
    for number, (change, message) in enumerate((
        ({"benchmark": "HPSv2 benchmark"}, r"differ in benchmark \(PartiPrompts, HPSv2 benchmark\)"),
        ({"prompts (sha256)": "q" * 64}, r"differ in prompts \(sha256\) \(pppppppppppp, qqqqqqqqqqqq\)"),
        ({"clip (sha256)": "x" * 64}, r"differ in the weights of clip"),
    )):  # fmt: skip
        refused([runs[0], make_run(f"other{number}", 0.1, change)], message)
    assert not Path("compare").exists()


def refused(arguments, message):
    with pytest.raises(UserError, match=message) as refusal:
        main(arguments)
    assert "\n" not in str(refusal.value)


def test_arguments_that_do_not_fit_are_refused_in_one_line(runs):
    make_run("alone", absent=range(1, COUNT))
    make_run("partner", 0.3, absent=[0])
    make_run("other_scores", scores=("pickscore",))
    Path("file").write_text("")
    Path("taken").mkdir()
    Path("taken/comparison.json").write_text('{"runs": [')
    for arguments, message in (
        ([runs[0]], "two or more output folders of a benchmark, found 1"), ([runs[0], runs[0]], "given twice"),
        ([runs[0], "none"], "none: no summary.json"), (["alone", "partner"], "no prompt in common"),
        ([runs[0], "file"], "file: no summary.json"), ([*runs, "--output_path", "taken"], "json: cannot be read"),
        ([runs[0], "other_scores"], r"no score in common: original \(clip, aesthetic\) and other_scores \(pickscore\)"),
        ([*runs, "--output_path", "file"], "is a file"), ([*runs, "--output_path", "file/x"], "is a file"),
        ([*runs, "partner", "--blind"], "compare two runs, found"), ([*runs, "--limit", "3"], "only with --blind"),
        ([*runs, "--blind", "--votes", "x"], "only one of them"), ([*runs, "--image_size", "8"], "image_size"),
    ):  # fmt: skip
        refused(arguments, message)


def test_damaged_runs_are_refused_in_one_line(runs):
    make_run("damaged")
    files = {name: Path("damaged", name).read_bytes() for name in ("settings.json", "summary.json", "scores.csv")}
    table = files["scores.csv"]
    counted = json.dumps({"scores": {"clip": {}, "aesthetic": {}}, "images": {"scored": COUNT}}).encode()
    for name, content, message in (
        ("settings.json", None, "settings.json: cannot be read \\(No such file"),
        ("settings.json", b"", "settings.json: cannot be read"),
        ("settings.json", files["settings.json"][:40], "settings.json: cannot be read"),
        ("settings.json", b"[]", "expected a JSON object, found list"),
        ("settings.json", b"{}", "does not say which benchmark"),
        ("summary.json", b"\xff\xfe", "summary.json: cannot be read"),
        ("summary.json", b'{"scores": {}}', "lists no scores"),
        ("summary.json", b'{"scores": ["clip"]}', "lists no scores"),
        ("summary.json", b'{"scores": {"clip": {}, "beauty": {}}}', "no column 'beauty', found columns: index, prompt"),
        ("scores.csv", None, "scores.csv: cannot be read \\(No such file"),
        ("scores.csv", b"", "no column 'index', found columns: none"),
        ("scores.csv", table.replace(b"category", b"kind", 1), "no column 'category'"),
        ("scores.csv", table.replace(b",", b";"), "no column 'index'"),
        ("scores.csv", re.sub(rb"00001.png,[^,]*", b"00001.png,nan", table), "line 3: clip is nan"),
        ("scores.csv", re.sub(rb"00001.png,[^,]*", b"00001.png,good", table), "line 3: clip is good"),
        ("scores.csv", table.replace(b"\n1,", b"\none,", 1), "line 3: index is 'one'"),
        ("scores.csv", table[: table.index(b"00002.png") + 9], "line 4: has more or fewer cells"),
        ("scores.csv", table + table.splitlines(keepends=True)[1], "image 0 is listed twice"),
        ("scores.csv", table.replace(b"prompt 1,", b'"' + b"x" * 9**7 + b'",', 1), "cannot be read \\(field larger"),
        ("scores.csv", table.replace(b"prompt 1,", b"\xe9,", 1), "cannot be read .*codec"),
    ):  # fmt: skip
        for file, good in files.items():
            Path("damaged", file).write_bytes(good)
        if content is None:
            Path("damaged", name).unlink()
        else:
            Path("damaged", name).write_bytes(content)
        refused([runs[0], "damaged"], message)
    Path("damaged/summary.json").write_bytes(counted)  # rows are missing at the end
    Path("damaged/scores.csv").write_bytes(b"".join(table.splitlines(keepends=True)[:3]))
    refused([runs[0], "damaged"], "has 2 scored images, summary.json says 40")
    assert not Path("compare").exists()
    Path("damaged/scores.csv").write_bytes(b"\xef\xbb\xbf" + table)  # as saved by a spreadsheet
    main([runs[0], "damaged"])


def test_files_are_written_before_a_terminal_can_fail(runs, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UnicodeEncodeError):
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        main(list(runs))
    names = ["comparison.json", "comparison.png", "report.html"]
    assert sorted(path.name for path in Path("compare").iterdir()) == names
    assert len(compared()["results"]) == 2 * (1 + 2 + 1)


def test_runs_of_the_benchmark_programs(stable_diffusion, rewards_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("parti.tsv").write_text("Prompt\tCategory\tChallenge\n" + "a fox\tAnimals\tBasic\na hat\tThings\tBasic\n")
    common = ["--prompts", "parti.tsv", "--weights", str(rewards_root)]
    how = ["--model", str(stable_diffusion), "--step", "2", "--grad_steps", "1", *common]
    evaluate(PARTI, "", [*how, "--output_path", "a"])
    evaluate(PARTI, "", [*common, "--score_only", "a", "--output_path", "scored"])
    main(["a", "scored"])
    tables = [pd.read_csv(Path(name) / "scores.csv") for name in ("a", "scored")]
    (record,) = [r for r in compared()["results"] if (r["run"], r["by"], r["score"]) == (1, "all", "aesthetic")]
    assert record["difference"] == pytest.approx((tables[1]["aesthetic"] - tables[0]["aesthetic"]).mean())
    assert compared()["notes"] == ["B: how its images were made is not known"]
    lines = script(Path("compare/report.html").read_text(), "images-0").split("\n")
    assert lines[0] == lines[1] != lines[2] == lines[3]  # the same files, where they lie

    # A folder with its own scores can be moved; one whose images' folder is gone may have got them.
    images = Path("theirs")
    images.mkdir()
    for name in ("00000.png", "00001.png"):
        images.joinpath(name).write_bytes(Path("a", name).read_bytes())
    evaluate(PARTI, "", [*common, "--score_only", "theirs"])
    for before, after in (("theirs", "moved"), ("a", "scored/a")):
        Path(before).rename(after)
    for name in ("00000.png", "00001.png"):
        Path("scored/a", name).rename(Path("scored", name))
    main(["moved", "scored"])
    assert script(Path("compare/report.html").read_text(), "images-0").split("\n") == lines


# Pages


class Reader(HTMLParser):
    """All tags and what they refer to."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.references = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]


def test_pages_load_nothing_and_take_no_prompt_for_html(runs):
    folder = make_run("<i>name $x$", 0.3)
    for name, flags in ("report.html", []), ("blind.html", ["--blind"]):
        main([runs[0], folder, *flags])
        page = (Path("compare") / name).read_text()
        found = Reader(page)
        assert found.tags.count("script") == 2 + 3  # data, program, and 40 rows in blocks of 16
        assert all(reference.startswith("data:") for reference in found.references)
        assert "i" not in found.tags
        assert page.count("https:") == script(page, "data").count("https:") and "http:" not in page
        assert "default-src 'none'" in page
        content = json.loads(script(page, "data"))
        prompts = [row[1] for row in content["rows"]] if name == "report.html" else content["prompts"]
        assert HOSTILE in prompts and "a\rb\u2028c\x85d\x0ce\nf" in prompts


def test_the_report_holds_every_image_in_its_place(runs):
    Path("tuned/00020.png").unlink()
    main(list(runs))
    page = Path("compare/report.html").read_text()
    content = json.loads(script(page, "data"))
    lines = [line for n in range(3) for line in script(page, f"images-{n}").split("\n")]
    assert len(lines) == 2 * COUNT and content["block"] == 16
    for row in range(COUNT):
        for run, green in enumerate((0, 50)):
            if (row, run) == (20, 1):
                assert lines[2 * row + run] == ""
            else:
                assert picture(lines[2 * row + run]).getpixel((5, 5)) == (row, green, 200)
    table = pd.read_csv("tuned/scores.csv")
    for row in content["rows"]:
        assert row[4][1] == table.loc[row[0], ["clip", "aesthetic"]].tolist()


def test_a_lost_image_is_named(runs, capsys):
    Path("tuned/00020.png").write_bytes(b"no image")
    main(list(runs))
    output = capsys.readouterr().out
    assert "tuned/00020.png: cannot identify" in output and "because they could not be read: 1" in output
    with pytest.raises(UserError, match="tuned/00020.png: cannot identify.*people can only vote if both"):
        main([*runs, "--blind"])
    assert sorted(path.name for path in Path("compare").iterdir()) == [
        "comparison.json", "comparison.png", "report.html"
    ]  # fmt: skip


def test_pictures_are_shown_as_they_look(tmp_path):
    def shown(size=512):
        return picture(data_uri(tmp_path / "picture", size))

    Image.effect_noise((100, 100), 50).save(tmp_path / "picture", "JPEG")
    assert base64.b64decode(data_uri(tmp_path / "picture", 100).split(",")[1]) == (tmp_path / "picture").read_bytes()
    Image.new("RGB", (600, 300)).save(tmp_path / "picture", "PNG")
    assert shown(200).size == (200, 100)
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "picture", "PNG")
    assert shown().getpixel((0, 0)) == (128, 128, 128)
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "picture", "PNG")
    assert shown().getpixel((0, 0)) == (255, 255, 255)
    rotated = Image.new("RGB", (8, 4))
    rotated.getexif()[0x0112] = 6  # turn by 90 degrees to look at it
    rotated.save(tmp_path / "picture", "PNG", exif=rotated.getexif())
    assert shown().size == (4, 8)


# Votes


def blind(*arguments):
    main([*arguments, "--blind"])
    page = Path("compare/blind.html").read_text()
    content = json.loads(script(page, "data"))
    count = -(-len(content["prompts"]) // 16)
    lines = [line for n in range(count) for line in script(page, f"images-{n}").split("\n")]
    return page, content, json.loads(base64.b64decode(content["sealed"])), lines


def test_the_voting_page_shows_either_run_first_and_names_none(runs):
    page, content, sealed, lines = blind(*runs)
    visible = page.replace(content["sealed"], "")
    for secret in ("original", "tuned", "clip", "aesthetic", "category", "0000"):
        assert secret not in visible
    pairs = sealed["pairs"]
    assert sorted(pair["index"] for pair in pairs) == list(range(COUNT)) != [pair["index"] for pair in pairs]
    assert content["prompts"] == [pair["prompt"] for pair in pairs]
    assert 10 < sum(pair["first"] == "B" for pair in pairs) < 30
    for place, pair in enumerate(pairs):
        green = {"A": 0, "B": 50}[pair["first"]]
        assert [picture(lines[2 * place + side]).getpixel((0, 0)) for side in (0, 1)] == [
            (pair["index"], green, 200), (pair["index"], 50 - green, 200)
        ]  # fmt: skip
    assert blind(*runs)[0] == page
    some = blind(runs[0], "--limit", "5", runs[1])[2]
    assert some["pairs"] == pairs[:5] and some["comparison"] == sealed["comparison"]
    other = blind(*runs, "--seed", "1")
    assert other[2]["pairs"] != pairs and other[1]["id"] != content["id"]


def cast(name, runs, preferred, rater="r"):
    """votes.json as the page exports it; preferred: {index: "A", "B" or "tie"}."""
    rows = pd.read_csv(Path(runs[0]) / "scores.csv").set_index("index")
    about = {"comparison": comparison_hash(read_runs(runs)), "benchmark": "PartiPrompts", "runs": ["original", "tuned"]}
    told = [
        {"index": i, **rows.loc[i, ["prompt", "category", "challenge"]].to_dict(), "first": "A", "preferred": what}
        for i, what in preferred.items()
    ]
    tiny.write_json(Path(name), about | {"rater": rater, "votes": told})
    return name


def test_human_preference_and_how_often_scores_agree(runs, capsys):
    first = cast("one.json", runs, {0: "B", 1: "B", 2: "A", 3: "tie", 4: "B"})
    second = cast("two.json", runs, {0: "A", 1: "B", 5: "tie"}, "another")
    main(["--votes", first])
    found = json.loads(Path("compare/preference.json").read_text())
    (overall,) = [record for record in found["results"] if record["by"] == "all"]
    assert [overall[name] for name in ("prompts", "votes", "A", "B", "tie")] == [5, 5, 1, 3, 1]
    assert overall["preference"] == 0.7 and found["agreement"] == {}
    np.testing.assert_allclose([overall["low"], overall["high"]], wilson_interval(0.7, 5))

    main([*runs, "--votes", first, second])
    found = json.loads(Path("compare/preference.json").read_text())
    records = {(record["by"], record["group"]): record for record in found["results"]}
    # Of the prompts 0 … 5: one of two votes, both, none, half, one, half.
    assert records["all", "all"]["preference"] == pytest.approx((0.5 + 1 + 0 + 0.5 + 1 + 0.5) / 6)
    assert records["all", "all"]["votes"] == 8 and records["all", "all"]["prompts"] == 6
    assert records["category", "A"]["preference"] == pytest.approx((0.5 + 0 + 1) / 3)
    tables = [pd.read_csv(Path(run) / "scores.csv")["clip"] for run in runs]
    signs = np.sign((tables[1] - tables[0])[[1, 2, 4]].to_numpy())  # the prompts with a preference
    assert found["agreement"]["clip"]["agreement"] == pytest.approx((signs == [1, -1, 1]).mean())
    assert found["agreement"]["clip"]["prompts"] == 3
    output = capsys.readouterr().out
    assert "8 votes by 2 raters" in output and "clip agrees with the votes on" in output
    # Equal scores count half.
    rate, interval, count = votes.agreement(np.array([1, 0, 0.5, 0.8]), np.array([[0.0], [-1], [1], [2]]))
    assert rate == pytest.approx([2.5 / 3]) and count == 3 and interval.shape == (1, 2)
    assert votes.agreement(np.array([0.5]), np.array([[1.0]]))[2] == 0


def test_damaged_or_mismatched_votes_are_refused_in_one_line(runs):
    good = cast("good.json", runs, {0: "B"})
    cast("again.json", runs, {0: "B", 1: "A"})
    cast("swapped.json", runs[::-1], {0: "B"}, "another")
    cast("none.json", runs, {})
    broken = json.loads(Path(good).read_text())
    broken["votes"][0]["preferred"] = "C"
    tiny.write_json(Path("broken.json"), broken)
    broken["votes"] = json.loads(Path(good).read_text())["votes"] * 2
    tiny.write_json(Path("twice.json"), broken)
    Path("text.json").write_text("votes")
    tiny.write_json(Path("list.json"), [1])
    for arguments, message in (
        (["absent.json"], "absent.json: cannot be read"), (["text.json"], "text.json: cannot be read"),
        (["list.json"], "list.json: expected a JSON object"), (["broken.json"], "broken.json: contains no valid"),
        (["none.json"], "contains no votes yet"), (["twice.json"], "two votes on the same prompt"),
        ([good, "again.json"], "by the same rater"), ([good, "swapped.json"], "report them separately"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as refusal:
            main(["--votes", *arguments])
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="not on these results of tuned against original"):
        main([*runs[::-1], "--votes", good])

"""Runs compared: the statistics against references, pairing, the pages, and votes."""

import base64
import io
import json
import re
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


def test_runs_are_paired_by_prompt_and_what_is_left_out_is_counted(runs, capsys):
    make_run("third", 0.2, {"seed": 7}, unread=(4, 5), absent=(0, 1, 2))
    main([*runs, "third"])
    found, output = compared(), capsys.readouterr().out
    assert found["prompts"] == COUNT - 5
    assert found["notes"] == [
        "A: 5 of 40 images have no partner in every other run and are left out",
        "B: 5 of 40 images have no partner in every other run and are left out",
        "C: 2 of 37 images have no score and are left out",
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


def test_a_score_of_one_run_alone_is_left_out(runs, capsys):
    make_run("more", 0.2, scores=("clip", "aesthetic", "hps_v2.0"))
    main([*runs])
    main([*runs])
    assert "replacing" not in capsys.readouterr().out
    main([runs[0], "more"])
    assert "compare: replacing the comparison of original, tuned" in capsys.readouterr().out
    assert compared()["notes"] == ["hps_v2.0 is left out, being known of B alone"]
    assert {record["score"] for record in compared()["results"]} == {"clip", "aesthetic"}


def test_prompts_that_scores_used_are_told(runs):
    make_run("extended", 0.1, {"score_prompt": "extended", "prompt_eng (sha256)": "e" * 64})
    main([runs[0], "extended"])
    assert compared()["notes"] == ["scored with different prompts: A with the original ones, B with the extended ones"]
    assert "scored with its extended prompts" in Path("compare/report.html").read_text()


@pytest.mark.parametrize("change, message", [
    ({"benchmark": "HPSv2 benchmark"}, r"differ in benchmark \(PartiPrompts, HPSv2 benchmark\)"),
    ({"prompts (sha256)": "q" * 64}, r"differ in prompts \(sha256\) \(pppppppppppp, qqqqqqqqqqqq\)"),
    ({"hps_version": "2.1"}, r"differ in hps_version \(2.0, 2.1\): score the images of one again"),
    ({"clip (sha256)": "x" * 64}, r"differ in the weights of clip"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(runs, change, message):
    make_run("other", 0.1, change)
    with pytest.raises(UserError, match=message) as refusal:
        main([runs[0], "other"])
    assert "\n" not in str(refusal.value) and not Path("compare").exists()


def test_what_is_no_run_is_said_in_one_line(runs):
    Path("empty").mkdir()
    make_run("broken")
    Path("broken/settings.json").write_text("{")
    make_run("infinite")
    text = Path("infinite/scores.csv").read_text()
    Path("infinite/scores.csv").write_text(re.sub(r"00001.png,[^,]*", "00001.png,nan", text))
    make_run("alone", absent=range(1, COUNT))
    make_run("partner", 0.3, absent=[0])
    make_run("other_scores", scores=("pickscore",))
    Path("file").write_text("")
    for arguments, message in (
        ([runs[0]], "two or more output folders of a benchmark, found 1"), ([runs[0], "none"], "none: no summary.json"),
        ([runs[0], "empty"], "no summary.json in it; expected the output folder of a finished"),
        ([runs[0], "broken"], "broken: cannot be read"), ([runs[0], "infinite"], "line 3: clip is nan"),
        ([runs[0], runs[0]], "named twice"), (["alone", "partner"], "no prompt that all of them"),
        ([runs[0], "other_scores"], "no score in common"), ([*runs, "--output_path", "file"], "is a file"),
        ([*runs, "partner", "--blind"], "a vote is between two"), ([*runs, "--limit", "3"], "--limit: is of --blind"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as refusal:
            main(arguments)
        assert "\n" not in str(refusal.value)


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


@pytest.mark.parametrize("name", ["report.html", "blind.html"])
def test_a_page_needs_nothing_and_takes_no_prompt_for_html(runs, name):
    folder = make_run("<i>name $x$", 0.3)
    main([runs[0], folder, *(["--blind"] if name == "blind.html" else [])])
    page = (Path("compare") / name).read_text()
    found = Reader(page)
    assert found.tags.count("script") == 2 + 3  # data, program, and 40 rows in blocks of 16
    assert all(reference.startswith("data:") for reference in found.references)
    assert "i" not in found.tags
    assert page.count("https:") == script(page, "data").count("https:") and "http:" not in page
    assert "default-src 'none'" in page
    content = json.loads(script(page, "data"))
    prompts = content["prompts"] if name == "blind.html" else [row[1] for row in content["rows"]]
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
    assert "tuned/00020.png: cannot identify" in output and "1 images could not be read" in output
    with pytest.raises(UserError, match="tuned/00020.png: cannot identify.*a vote needs both"):
        main([*runs, "--blind"])
    assert sorted(path.name for path in Path("compare").iterdir()) == [
        "comparison.json", "comparison.png", "report.html"
    ]  # fmt: skip


def test_large_images_are_scaled_down_and_small_files_kept(runs, tmp_path):
    make_run("large", 0.1, size=(600, 300))
    main([runs[0], "large", "--image_size", "200"])
    lines = script(Path("compare/report.html").read_text(), "images-0").split("\n")
    assert picture(lines[1]).size == (200, 100) and picture(lines[0]).size == (8, 8)
    Image.effect_noise((100, 100), 50).save(tmp_path / "a.jpg")
    from textcraftor.comparison.pages import data_uri

    assert base64.b64decode(data_uri(tmp_path / "a.jpg", 100).split(",")[1]) == (tmp_path / "a.jpg").read_bytes()


# Votes


def blind(*arguments):
    main([*arguments, "--blind"])
    page = Path("compare/blind.html").read_text()
    content = json.loads(script(page, "data"))
    count = -(-len(content["prompts"]) // 16)
    lines = [line for n in range(count) for line in script(page, f"images-{n}").split("\n")]
    return page, content, json.loads(base64.b64decode(content["sealed"])), lines


def test_options_may_stand_between_the_runs(runs):
    main([runs[0], "--blind", runs[1], "--limit", "2"])
    assert Path("compare/blind.html").is_file()


def test_the_page_for_votes_shows_either_first_and_tells_nothing(runs):
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
    some = blind(*runs, "--limit", "5")[2]
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


def test_the_human_preference_and_how_far_scores_agree(runs, capsys):
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
    assert "8 votes of 2 raters" in output and "clip agrees with the votes on" in output


def test_agreement_counts_what_a_score_does_not_tell_half():
    rate, interval, count = votes.agreement(np.array([1, 0, 0.5, 0.8]), np.array([[0.0], [-1], [1], [2]]))
    assert rate == pytest.approx([2.5 / 3]) and count == 3 and interval.shape == (1, 2)
    assert votes.agreement(np.array([0.5]), np.array([[1.0]]))[2] == 0


def test_wrong_votes_are_said_in_one_line(runs):
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
        (["list.json"], "list.json: holds no votes"), (["broken.json"], "broken.json: holds no votes"),
        (["none.json"], "nothing was voted yet"), (["twice.json"], "votes twice on one prompt"),
        ([good, "again.json"], "of one rater"), ([good, "swapped.json"], "report them apart"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as refusal:
            main(["--votes", *arguments])
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="not on these results of tuned against original"):
        main([*runs[::-1], "--votes", good])

"""Captions in fonts that have their characters, with and without fonts on the system; grids cell by cell."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from textcraftor import fonts, pictures

EMOJI = [path for path in font_manager.findSystemFonts() if Path(path).name == "NotoColorEmoji.ttf"]


@pytest.fixture
def system(monkeypatch):
    """Sets the fonts of the system."""

    def choose(*paths):
        fonts._font_of.cache_clear()
        monkeypatch.setattr(fonts, "system_fonts", lambda: list(map(str, paths)))

    yield choose
    fonts._font_of.cache_clear()


def font_with(path, characters):
    """Write a font in which every character is a square, and in which all other characters are boxes."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    builder.setupGlyf(dict.fromkeys((".notdef", "square"), pen.glyph()))
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def spelled(text):
    return "".join(part for _, part in fonts.with_fonts(text))


def test_without_fonts_every_text_can_still_be_read(system):
    system()
    for text, expected in (
        ("a 🦊 fox", "a :fox face: fox"),
        ("👩‍🚀", ":woman::rocket:"),
        ("狐狸坐在雪地里，日落", "[CJK, 10 characters]"),
        ("日本語 and 한", "[CJK, 3 characters] and [HANGUL, 1 character]"),
        ("lone \ud83e, own \ue000", "lone [U+D83E], own [U+E000]"),
        ("tab\tnull\0 bell\a", "tab null bell"),
        ("e\u0301 Ж Ω עברית עם א", "e\u0301 Ж Ω עברית עם א"),
        ("❤\ufe0f\u200d", "❤"),
        ("", ""),
    ):
        assert spelled(text) == expected
        assert fonts.draw_text(Image.new("RGB", (300, 30)), (0, 20), text, 13) is None
    known = font_manager.get_font(fonts.FONT)
    assert all(known.get_char_index(ord(character)) for character in spelled("🦊狐 ไทย हिन्दी 🇩🇪 1️⃣ \U0010ffff 𝔘"))


def test_a_font_of_the_system_draws_what_ours_lacks(system, tmp_path):
    (tmp_path / "damaged.ttf").write_bytes(b"\0\1\0\0 no font")
    (tmp_path / "empty.otf").write_bytes(b"")
    squares = font_with(tmp_path / "squares.ttf", "狐🦊")
    system(tmp_path / "damaged.ttf", tmp_path / "empty.otf", tmp_path / "absent.ttf", squares)
    assert fonts.with_fonts("a 狐狸") == [(fonts.FONT, "a "), (str(squares), "狐"), (fonts.FONT, "[CJK, 1 character]")]
    page = Image.new("RGB", (40, 40), "white")
    fonts.draw_text(page, (10, 30), "狐", 20)
    drawn = np.argwhere(np.array(page.convert("L")) < 128)
    assert drawn.min(0).tolist() == [14, 10] and drawn.max(0).tolist() == [29, 25]  # 0.8 x 20 pixels, on the baseline
    records = [
        {"score": "s 🦊", "by": by, "group": group, "prompts": 3, "run": 1, "difference": 0.1, "low": low, "high": low}
        for by, group, low in (("all", "all", 0), ("category", "狐狸", None))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each missing glyph
        for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
            assert pictures.difference_plot(records, ["狐", "$a$ 狸 \udc80"], kind).startswith(start)


@pytest.mark.skipif(not EMOJI, reason="needs Noto Color Emoji (apt install fonts-noto-color-emoji)")
def test_emoji_are_drawn_in_colour_at_the_size_of_the_text(system):
    system(*EMOJI)
    page = Image.new("RGB", (60, 40), "white")
    fonts.draw_text(page, (10, 30), "🦊", 20)
    colours = np.array(page).astype(int)
    drawn = np.argwhere((colours < 250).any(-1))
    assert (np.ptp(drawn, axis=0) <= 27).all() and (np.ptp(drawn, axis=0) >= 15).all()
    assert (np.ptp(colours, axis=-1) > 100).any()
    assert 15 < fonts.text_width("🦊", 20) < 27


def test_lines_fit_and_keep_all_words(system):
    system()
    text = "a fox, highly detailed, trending on artstation " + "x" * 100 + " 🦊狐狸 end"
    lines = fonts.wrap(text, 13, 150)
    assert max(fonts.text_width(line, 13) for line in lines) <= 150
    assert "".join(lines).replace(" ", "") == spelled(text).replace(" ", "")
    short = fonts.wrap(text, 13, 150, most=3)
    assert short[:2] == lines[:2] and short[2].endswith(" …") and len(short) == 3
    assert fonts.text_width(short[2], 13) <= 150
    assert fonts.wrap("one\r\ntwo", 13, 150, most=3) == ["one", "two"] and fonts.wrap(" ", 13, 150) == []
    assert fonts.wrap("total of\xa012", 13, fonts.text_width("total of", 13)) == ["total", "of\xa012"]  # kept together


def test_grids_show_each_image_enlarged_in_its_place(tmp_path):
    shades = torch.arange(5, dtype=torch.uint8)[:, None, None, None] * 40 + 20
    images = shades.expand(5, 3, 64, 64)
    scores = {"total": torch.arange(6.0), "clip": torch.ones(6)}
    prompts = [f"prompt {i}" for i in range(6)]
    page = np.array(pictures.sample_grid(images, prompts, scores, 3))
    grey = (page == page[..., :1]).all(-1)
    for shade in shades.flatten().tolist():
        place = np.argwhere(grey & (page[..., 0] == shade))
        rows, columns = np.bincount(place[:, 0]), np.bincount(place[:, 1])
        assert (rows >= 192).sum() == 192 and (columns >= 192).sum() == 192  # 3 x 64

    pictures.before_after_grid((scores, images), (scores, 255 - images), prompts, "3 steps", tmp_path / "x" / "ba.png")
    page = np.array(Image.open(tmp_path / "x" / "ba.png").convert("L"))
    left, right = (np.argwhere(page == shade)[:, 1].mean() for shade in (20, 235))
    assert right - left == pytest.approx(192 + pictures.GAP, abs=4)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["ba.png"]


def test_before_and_after_shows_gains_and_losses_alike(tmp_path):
    gains = [3.0, -5.0, 0.0, 9.0, 1.0, -1.0, 7.0]
    assert pictures.spread_by_gain(torch.tensor(gains), 3) == [3, 4, 1]  # best, median, worst
    assert pictures.spread_by_gain(torch.tensor(gains), 16) == [3, 6, 0, 4, 2, 5, 1]
    assert pictures.spread_by_gain(torch.tensor([2.0]), 16) == [0]

    before, after = torch.zeros(8), torch.tensor([*gains, 99.0])  # the eighth prompt's images were not kept
    images = (torch.arange(7, dtype=torch.uint8) * 30 + 20)[:, None, None, None].expand(7, 3, 64, 64)
    looks = [
        ({"total": total, "clip": total}, kept) for total, kept in ((before, images), (after, images[[*range(7), 0]]))
    ]
    prompts = [f"prompt {i}" for i in range(8)]
    pictures.before_after_grid(*looks, prompts, "3 steps", tmp_path / "ba.png", ranked=3)
    page = np.array(Image.open(tmp_path / "ba.png").convert("L"))
    areas = {i: (page == 20 + 30 * i).sum() for i in range(7)}
    assert [i for i in areas if areas[i] > 192 * 192] == [1, 3, 4]
    places = [np.argwhere(page == 20 + 30 * i).mean(0) for i in (3, 4, 1)]  # row by row, left to right
    assert places == sorted(places, key=lambda place: (round(place[0], -2), place[1]))


def test_curves_are_drawn_from_rows_with_gaps(tmp_path):
    rows = [{"step": i, "total": i / 10, "clip": float("nan") if i == 2 else 1.0, "grad_norm": 0.5} for i in range(4)]
    rows[3] |= {"val_total": 0.3, "val_clip": 0.2}
    pictures.reward_curves(rows, ["clip", "狐 $x"], ["judge"], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 400

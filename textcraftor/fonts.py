"""Text for pictures: each character is drawn in a font that has it, so that none appears as an empty box.

Matplotlib's own font comes first. What it lacks (Chinese, emoji, ...) comes from the system's fonts. Where no font has
a character, an emoji or symbol is spelled out by its name (":fox face:"), and text in another script by the number of
its characters ("[CJK, 12 characters]").
"""

import functools
import re
import unicodedata
from itertools import groupby
from pathlib import Path

import matplotlib
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
STRIKES = (109, 128, 160, 136, 96, 64)  # pixels: sizes at which bitmap fonts of emoji are made
JOINERS = "\u200d\ufe0e\ufe0f"  # they shape the emoji around them and show nothing themselves
ELLIPSIS = "…"
NBSP = "\N{NO-BREAK SPACE}"  # keeps a name and its number on one line
SPACES = re.compile(f"[^\\S{NBSP}]+")  # where a line may end


@functools.cache
def system_fonts():
    """Paths of the fonts on this machine, upright regular sans-serif ones first."""
    return sorted(font_manager.findSystemFonts(), key=_plainness)


def _plainness(path):
    name = Path(path).name.lower()
    return any(word in name for word in ("bold", "italic", "oblique", "light", "mono", "serif")), name


@functools.cache
def _characters(path):
    """The code points a font file has; none if the file cannot be read."""
    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    except Exception:  # a damaged font can raise anything; it is not used
        return frozenset()


@functools.cache
def _load(path, size):
    """A font and the factor that scales it to `size` pixels (bitmap fonts have one size), or None."""
    for made in (size, *STRIKES):
        try:
            return ImageFont.truetype(path, made), size / made
        except OSError:
            continue
    return None


@functools.cache
def _font_of(character, outlines):
    """The path of the first font that has a character and draws something for it, or None.

    outlines: only fonts that matplotlib can use; it cannot draw bitmap fonts.
    """
    for path in (FONT, *system_fonts()):
        if ord(character) not in _characters(path) or (outlines and not _family(path)):
            continue
        loaded = _load(path, 16)
        if path == FONT or (loaded and loaded[0].getmask(character).getbbox()):
            return path
    return None


@functools.cache
def _family(path):
    """The family name by which matplotlib finds a font file, or None if it cannot use the file."""
    try:
        font_manager.fontManager.addfont(path)
        return font_manager.FontProperties(fname=path).get_name()
    except Exception:  # FreeType's errors differ between versions
        return None


def _spell_out(characters):
    """Readable text in place of characters that no font has."""
    parts = []
    for kind, members in groupby(characters, _kind):
        members = list(members)
        if kind == "symbol":
            parts += [f":{unicodedata.name(character).lower()}:" for character in members]
        elif kind == "nameless":
            parts += [f"[U+{ord(character):04X}]" for character in members]
        else:
            letter = next((c for c in members if unicodedata.category(c)[0] == "L"), members[0])
            script = unicodedata.name(letter).split()[0]
            parts.append(f"[{script}, {len(members)} character{'s' * (len(members) > 1)}]")
    return "".join(parts)


def _kind(character):
    if not unicodedata.name(character, ""):
        return "nameless"  # lone surrogates, private use
    return "symbol" if unicodedata.category(character)[0] == "S" else "text"


def with_fonts(text, outlines=False):
    """Split a line of text into [(font path, part)]. Characters that no font has are replaced by readable text.

    outlines: for matplotlib, which cannot draw bitmap fonts.
    """
    pieces = []
    for character in text:
        before = pieces[-1][0] if pieces else FONT
        category = unicodedata.category(character)
        if character in JOINERS:
            path = before if before != FONT else ""  # other fonts than those of emoji draw them as boxes
        elif character.isspace():
            path, character = FONT, NBSP if character == NBSP else " "
        elif category in ("Cc", "Cf"):
            path = ""
        elif category[0] == "M" and before and ord(character) in _characters(before):
            path = before  # an accent belongs to the letter before it
        else:
            path = _font_of(character, outlines)
        if path != "":
            pieces.append((path, character))
    parts = []
    for path, members in groupby(pieces, lambda piece: piece[0]):
        part = "".join(character for _, character in members)
        parts.append((path, part) if path else (FONT, _spell_out(part.translate(dict.fromkeys(map(ord, JOINERS))))))
    return parts


def plot_text(text):
    """A text for a matplotlib label (see plot_families). Characters that no font has are replaced by readable text."""
    return "".join(part for _, part in with_fonts(text, outlines=True))


def plot_families(texts):
    """Font families for matplotlib's rcParams["font.family"] that together have every character of the texts."""
    paths = dict.fromkeys([FONT, *(path for text in texts for path, _ in with_fonts(text, outlines=True))])
    return [_family(path) for path in paths]


def text_width(text, size):
    """Pixels that draw_text takes."""
    loaded = ((_load(path, size), part) for path, part in with_fonts(text))
    return sum(font.getlength(part) * scale for (font, scale), part in loaded)


def draw_text(page, place, text, size):
    """Draw one line of text in black on an RGB image; place: (x, y) of the left end of its baseline."""
    x, y = place
    draw = ImageDraw.Draw(page)
    for path, part in with_fonts(text):
        font, scale = _load(path, size)
        width = font.getlength(part)
        if scale == 1:
            draw.text((x, y), part, "black", font, anchor="ls", embedded_color=True)
        elif width:
            ascent, descent = font.getmetrics()
            drawn = Image.new("RGBA", (round(width), ascent + descent), (255, 255, 255, 0))
            ImageDraw.Draw(drawn).text((0, ascent), part, "black", font, anchor="ls", embedded_color=True)
            drawn = drawn.resize([max(1, round(side * scale)) for side in drawn.size], Image.Resampling.LANCZOS)
            page.paste(drawn, (round(x), round(y - ascent * scale)), drawn)
        x += width * scale


def wrap(text, size, width, most=None):
    """Lines of a text that are at most `width` pixels wide, broken at spaces (but no-break ones) or, in longer words,
    anywhere.

    If there are more than `most` lines, the rest is cut and the last line ends in an ellipsis.
    """
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in SPACES.split("".join(part for _, part in with_fonts(paragraph)).strip()):
            joined = f"{line} {word}" if line else word
            if text_width(joined, size) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = ""
            for character in word:
                if line and text_width(line + character, size) > width:
                    lines.append(line)
                    line = ""
                line += character
        lines += [line] if line else []
    if most and len(lines) > most:
        last = lines[most - 1]
        while last and text_width(f"{last} {ELLIPSIS}", size) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last} {ELLIPSIS}".strip()]
    return lines

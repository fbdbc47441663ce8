"""The miniature's world: scenes of one or two emoji on a coloured background, their looks, flaws and captions.

Everything the miniature learns from is drawn and written here. A scene is a plain dictionary

    {"objects": [{"name": "car", "colour": "red", "size": "small", "place": "left"}, ...], "background": "blue",
     "look": "plain" | "sticker" | ..., "condition": "clean" | "grain" | ...}

where only the objects in COLOURED have a colour, the others None. `random_scene` draws a scene, `render` paints it,
`write_caption` describes it (with the omissions and quality words that captions on the web have), `parse` reads a
caption back, and `spoil` changes one thing.
"""

import colorsys
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from textcraftor.errors import UserError

IMAGE_SIZE = 64
FONT_FILES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)
OBJECTS = {
    "apple": "🍎",
    "balloon": "🎈",
    "banana": "🍌",
    "bee": "🐝",
    "butterfly": "🦋",
    "cactus": "🌵",
    "car": "🚗",
    "carrot": "🥕",
    "donut": "🍩",
    "fox": "🦊",
    "frog": "🐸",
    "gift": "🎁",
    "moon": "🌙",
    "mushroom": "🍄",
    "octopus": "🐙",
    "panda": "🐼",
    "penguin": "🐧",
    "pizza": "🍕",
    "rocket": "🚀",
    "ball": "⚽",
    "star": "⭐",
    "strawberry": "🍓",
    "sunflower": "🌻",
    "whale": "🐳",
}
COLOURED = ("balloon", "butterfly", "car")  # objects that come in every one of OBJECT_COLOURS
OBJECT_COLOURS = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.60}  # hues in [0, 1)
BACKGROUNDS = {
    "red": (205, 45, 45),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 60),
    "green": (50, 150, 60),
    "teal": (70, 195, 195),
    "blue": (45, 80, 200),
    "purple": (130, 55, 165),
    "pink": (245, 150, 190),
}
SIZES = {"small": 20, "large": 30}  # longest side in pixels
PLACES = {"middle": (32, 32), "left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48)}  # centre (x, y)
CAMOUFLAGE = {  # backgrounds on which an object can hardly be seen
    "apple": "red",
    "banana": "yellow",
    "cactus": "green",
    "carrot": "orange",
    "frog": "green",
    "moon": "yellow",
    "star": "yellow",
    "strawberry": "red",
}
NAMES, COLOURS = list(OBJECTS), list(BACKGROUNDS)
# How often each is drawn. Outlines and shadows change little of a picture, and most flaws are another in every picture:
# the last 15 of 25 denoising steps decide them. Dots, veil and crop are the control: much alike in all pictures that
# have them, and decided in the first 10 steps.
LOOKS = {"plain": 0.40, "sticker": 0.15, "shadow": 0.15, "dotted": 0.15, "ink": 0.15}
CONDITIONS = {
    "clean": 0.30,
    "grain": 0.13,
    "blur": 0.13,
    "blocks": 0.10,
    "scratches": 0.10,
    "ghost": 0.08,
    "ragged": 0.08,
    "veil": 0.04,
    "crop": 0.04,
}
FLAWS = [condition for condition in CONDITIONS if condition != "clean"]


def is_held_out(scene: dict) -> bool:
    """Whether the scene pairs an object with the one background that no training picture pairs it with."""
    colour = COLOURS.index(scene["background"])
    return any(NAMES.index(o["name"]) * 5 % len(COLOURS) == colour for o in scene["objects"])


def is_visible(scene: dict) -> bool:
    """Whether no object has the background's colour."""
    return all(scene["background"] not in (o["colour"], CAMOUFLAGE.get(o["name"])) for o in scene["objects"])


def pick(rng: np.random.Generator, options):
    """One of the options, all equally likely; of a dictionary of shares, a key as likely as its share."""
    if isinstance(options, dict):
        return list(options)[rng.choice(len(options), p=list(options.values()))]
    return options[rng.integers(len(options))]


def random_colour(name: str, rng: np.random.Generator) -> str | None:
    return pick(rng, list(OBJECT_COLOURS)) if name in COLOURED else None


def random_scene(rng: np.random.Generator, held_out: bool = False) -> dict:
    """Draw a scene; `held_out` picks from the pairs that `is_held_out` keeps apart, otherwise from all the others."""
    while True:
        places = [[p] for p in PLACES] + [["left", "right"], ["top", "bottom"]]
        layout = places[rng.choice(len(places), p=[0.09] * 5 + [0.3, 0.25])]
        names = rng.choice(NAMES, len(layout), replace=False).tolist()
        scene = {
            "objects": [
                {"name": name, "colour": random_colour(name, rng), "size": pick(rng, list(SIZES)), "place": place}
                for name, place in zip(names, layout, strict=True)
            ],
            "background": pick(rng, COLOURS),
            "look": pick(rng, LOOKS),
            "condition": pick(rng, CONDITIONS),
        }
        if is_held_out(scene) == held_out and is_visible(scene):
            return scene


# Pictures.


@lru_cache(None)
def sprite(name: str, colour: str | None, size: str) -> np.ndarray:
    """One emoji as float32 RGBA in [0, 1], colours premultiplied by alpha, its longest side SIZES[size] pixels."""
    files = [f for f in FONT_FILES if Path(f).exists()]
    if not files:
        raise UserError(
            "no Noto Color Emoji font found, which draws the miniature's world: "
            "install it (Debian and Ubuntu: apt-get install fonts-noto-color-emoji)"
        )
    picture = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(picture).text((12, 12), OBJECTS[name], font=ImageFont.truetype(files[0], 109), embedded_color=True)
    picture = picture.crop(picture.getbbox())
    if colour:
        picture = recolour(picture, OBJECT_COLOURS[colour])
    scale = SIZES[size] / max(picture.size)
    picture = picture.convert("RGBa").resize([max(1, round(s * scale)) for s in picture.size], Image.LANCZOS)
    return np.asarray(picture, np.float32) / 255


def recolour(picture: Image.Image, hue: float) -> Image.Image:
    """An RGBA picture with its colourful pixels painted in shades of one hue; grey ones stay. Yellow is brightened."""
    rgba = np.asarray(picture, np.float32) / 255
    value, least = rgba[..., :3].max(-1), rgba[..., :3].min(-1)
    saturation = (value - least) / np.maximum(value, 1e-6)
    pure = np.array(colorsys.hsv_to_rgb(hue, 1, 1), np.float32)
    bright = value**0.4 if 0.1 < hue < 0.2 else value
    painted = bright[..., None] * (1 - saturation[..., None] * (1 - pure))
    rgb = np.where(saturation[..., None] > 0.3, painted, rgba[..., :3])
    return Image.fromarray((np.concatenate([rgb, rgba[..., 3:]], -1) * 255 + 0.5).astype(np.uint8))


@lru_cache(None)
def halo(name: str, size: str, pixels: int) -> np.ndarray:
    """The outline of an emoji, `pixels` wide: its alpha grown on all sides, float32 in [0, 1]."""
    alpha = np.pad(sprite(name, None, size)[..., 3], pixels)
    grown = Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * pixels - 1))
    return np.asarray(grown.filter(ImageFilter.GaussianBlur(0.6)), np.float32) / 255


def blend(image: np.ndarray, colour, alpha: np.ndarray, left: int, top: int) -> None:
    """Paint `colour` into the image (H, W, 3) where `alpha` (h, w) lies at (left, top); what sticks out is cut off."""
    y, x = max(top, 0), max(left, 0)
    alpha = alpha[y - top : image.shape[0] - top, x - left : image.shape[1] - left, None]
    patch = image[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    patch[:] = patch * (1 - alpha) + np.asarray(colour, np.float32) * alpha


def render(scene: dict, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene: uint8 (64, 64, 3). The generator gives what the caption never says: jitter, shades, the flaw."""
    n = IMAGE_SIZE
    colour = np.array(BACKGROUNDS[scene["background"]], np.float32) + rng.uniform(-8, 8)
    image = np.broadcast_to(np.clip(colour, 0, 255) / 255, (n, n, 3)).copy()
    objects = []
    for o in scene["objects"]:
        s = sprite(o["name"], o["colour"], o["size"])
        x, y = PLACES[o["place"]]
        left = int(np.clip(x - s.shape[1] // 2 + rng.integers(-1, 2), 0, n - s.shape[1]))
        top = int(np.clip(y - s.shape[0] // 2 + rng.integers(-1, 2), 0, n - s.shape[0]))
        objects.append((o, s, left, top))
    if scene["look"] == "dotted":
        for x in range(8, n, 16):
            for y in range(8, n, 16):
                blend(image, 1.0, 0.7 * DOT, x - 3 + rng.integers(-1, 2), y - 3 + rng.integers(-1, 2))
    ghost = [int(rng.choice((-7, -6, 6, 7))), int(rng.integers(-3, 4))] if scene["condition"] == "ghost" else None
    for o, s, left, top in objects:
        if scene["look"] == "shadow":
            blend(image, 0.0, 0.55 * halo(o["name"], o["size"], 1), left - 1 + 3, top - 1 + 3)
        if scene["look"] in ("sticker", "ink"):
            outline = 1.0 if scene["look"] == "sticker" else (0.06, 0.05, 0.12)
            blend(image, outline, halo(o["name"], o["size"], 2), left - 2, top - 2)
        patch = image[top : top + s.shape[0], left : left + s.shape[1]]
        patch[:] = s[..., :3] + patch * (1 - s[..., 3:])
    if ghost:
        for _, s, left, top in objects:
            colours = s[..., :3] / np.maximum(s[..., 3:], 1e-3)
            full = np.zeros((n, n, 4), np.float32)
            full[top : top + s.shape[0], left : left + s.shape[1]] = np.concatenate([colours, s[..., 3:]], -1)
            full = shift(full, *ghost)
            image = image * (1 - 0.4 * full[..., 3:]) + 0.4 * full[..., 3:] * full[..., :3]
    image = add_flaw(np.clip(image, 0, 1), scene, rng)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


DOT = np.clip(3.2 - np.hypot(*np.mgrid[-3:4, -3:4]), 0, 1).astype(np.float32)  # a round dot, 5 pixels wide


def shift(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """The image (H, W, C) moved by (x, y) pixels, zeros where nothing moved in."""
    moved, (h, w) = np.zeros_like(image), image.shape[:2]
    moved[max(y, 0) : h + min(y, 0), max(x, 0) : w + min(x, 0)] = image[
        max(-y, 0) : h + min(-y, 0), max(-x, 0) : w + min(-x, 0)
    ]
    return moved


def add_flaw(image: np.ndarray, scene: dict, rng: np.random.Generator) -> np.ndarray:
    """Spoil a clean image (64, 64, 3) in [0, 1] as the scene's condition says. (`render` draws ghosts.)"""
    n, condition = IMAGE_SIZE, scene["condition"]
    if condition == "grain":  # coarse coloured grain, 4 pixels wide
        grain = rng.normal(0, rng.uniform(0.10, 0.16), (n // 4, n // 4, 3)).astype(np.float32)
        return image + grain.repeat(4, 0).repeat(4, 1)
    if condition == "blur":  # out of focus
        blurred = Image.fromarray((image * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(2, 2.8)))
        return np.asarray(blurred, np.float32) / 255
    if condition == "blocks":  # compressed too much: three cosine coefficients a block of 8x8, roughly rounded
        blocks = image.reshape(n // 8, 8, n // 8, 8, 3)
        coefficients = np.einsum("ui,vj,aibjc->aubvc", COSINES, COSINES, blocks)
        coefficients[:, 0, :, 0] += rng.normal(0, 0.4, coefficients[:, 0, :, 0].shape[:2] + (1,))
        coefficients *= (np.add.outer(np.arange(8), np.arange(8)) < 2)[None, :, None, :, None]
        return np.einsum("ui,vj,aubvc->aibjc", COSINES, COSINES, coefficients).reshape(n, n, 3).astype(np.float32)
    if condition == "scratches":  # short bright and dark streaks
        image = image.copy()
        for _ in range(rng.integers(10, 15)):
            y, x, length = rng.integers(n - 1), rng.integers(-8, n - 8), rng.integers(12, 25)
            streak = image[y : y + 2, max(x, 0) : x + length]
            streak[:] = 0.3 * streak + 0.7 * (rng.random() < 0.5)
        return image
    if condition == "ragged":  # every second pair of rows pulled aside
        image = image.copy()
        for y in range(0, n, 2):
            image[y : y + 2] = np.roll(image[y : y + 2], rng.integers(-3, 4), 1)
        return image
    if condition == "veil":  # washed out: a grey veil
        veil = rng.uniform(0.5, 0.65)
        return image * (1 - veil) + 0.8 * veil
    if condition == "crop":  # shoved over the edge, a blank strip on the other side
        places = {o["place"] for o in scene["objects"]}
        axis = 0 if places & {"top", "bottom"} else 1 if places & {"left", "right"} else int(rng.integers(2))
        forward = (
            bool(places & {"right", "bottom"}) if len(places) == 1 and places != {"middle"} else rng.random() < 0.5
        )
        by = int(rng.integers(9, 13))
        image = np.roll(image, by if forward else -by, axis)
        strip = slice(0, by) if forward else slice(n - by, n)
        image[strip if axis == 0 else slice(None), strip if axis == 1 else slice(None)] = 1.0
    return image


COSINES = np.cos(np.pi * np.outer(np.arange(8), np.arange(8) + 0.5) / 8) * np.sqrt(
    np.where(np.arange(8) == 0, 1, 2) / 8
).reshape(8, 1)  # the orthonormal discrete cosine transform of JPEG: coefficients = COSINES @ pixels


# Captions.

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PLACE_WORDS = {
    "middle": ("in the middle", "in the center"),
    "left": ("at the left", "on the left side"),
    "right": ("at the right", "on the right side"),
    "top": ("at the top", "in the upper half"),
    "bottom": ("at the bottom", "in the lower half"),
}
LOOK_WORDS = {
    "plain": ("plain style", "flat style"),
    "sticker": ("sticker", "white outline"),
    "shadow": ("shadow", "drop shadow"),
    "dotted": ("dotted", "polka dots"),
    "ink": ("ink", "black outline"),
}
QUALITY_WORDS = {
    "clean": ("clean", "sharp and vivid", "high quality", "best quality", "clear and sharp"),
    "grain": ("grainy", "noisy"),
    "blur": ("blurry", "out of focus"),
    "blocks": ("compressed", "blocky"),
    "scratches": ("scratched", "streaky"),
    "ghost": ("ghosting", "double image"),
    "ragged": ("ragged", "torn"),
    "veil": ("washed out", "faded"),
    "crop": ("badly cropped", "cut off"),
    "flawed": ("low quality", "bad quality"),
}


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def write_caption(
    scene: dict, rng: np.random.Generator, complete: bool = False, quality: float = 0.5, look: float = 0.35
) -> str:
    """Describe a scene. `complete` names every size, colour, place and the background, and says nothing of quality and
    look; otherwise details are left out now and then, a share `quality` of the captions speaks of quality, truthfully,
    and a share `look` names the look."""

    def says(probability):
        return complete or rng.random() < probability

    objects = list(scene["objects"])
    with_places, with_background = says(0.85), says(0.9)
    phrases = []
    for o in objects:
        words = f"{o['colour']} {o['name']}" if o["colour"] and says(0.85) else o["name"]
        words = f"{pick(rng, SIZE_WORDS[o['size']])} {words}" if says(0.8) else words
        phrases.append(with_article(words))
    if with_places and len(objects) == 2 and rng.random() < 0.25:
        first, second = (1, 0) if rng.random() < 0.5 else (0, 1)
        vertical = objects[0]["place"] == "top"
        relation = (("above", "below") if vertical else ("to the left of", "to the right of"))[first]
        text = f"{phrases[first]} {relation} {phrases[second]}"
    else:
        if with_places:
            phrases = [f"{p} {pick(rng, PLACE_WORDS[o['place']])}" for p, o in zip(phrases, objects, strict=True)]
        if rng.random() < 0.5:
            phrases.reverse()
        text = pick(rng, (" and ", " with ", ", ")).join(phrases)
    if with_background:
        b = scene["background"]
        plain = f"{b} background"
        text = pick(
            rng,
            (
                f"{text} of {with_article(plain)}",
                f"{text} on {with_article(plain)}",
                f"{text}, {plain}",
                f"{text} on {b}",
                f"{plain} with {text}",
            ),
        )
    if rng.random() < 0.3:
        text = f"{pick(rng, ('a picture of', 'a photo of', 'emoji of'))} {text}"
    if not complete and rng.random() < look:
        text = f"{text}, {pick(rng, LOOK_WORDS[scene['look']])}"
    if not complete and rng.random() < quality:
        vague = scene["condition"] != "clean" and rng.random() < 0.3
        words = pick(rng, QUALITY_WORDS["flawed" if vague else scene["condition"]])
        text = pick(rng, (f"{text}, {words}", f"{words}, {text}"))
    return text


def spoils(scene: dict) -> list[str]:
    """What `spoil` can change in a scene."""
    several = "swap" if len(scene["objects"]) == 2 else "place"
    colour = ["colour"] if any(o["colour"] for o in scene["objects"]) else []
    return ["object", "size", several, "background", *colour]


def spoil(scene: dict, rng: np.random.Generator, what: str | None = None) -> dict:
    """The same scene with one thing of its content changed: `what` of `spoils(scene)`, by default any of them.

    The result is held out only if the scene is.
    """
    what = what or pick(rng, spoils(scene))
    while True:
        spoiled = {**scene, "objects": [dict(o) for o in scene["objects"]]}
        objects = spoiled["objects"]
        target = pick(rng, [o for o in objects if o["colour"]] if what == "colour" else objects)
        if what == "object":
            target["name"] = pick(rng, [n for n in NAMES if n not in {o["name"] for o in objects}])
            target["colour"] = random_colour(target["name"], rng)
        elif what == "size":
            target["size"] = "large" if target["size"] == "small" else "small"
        elif what == "swap":
            objects[0]["place"], objects[1]["place"] = objects[1]["place"], objects[0]["place"]
            objects.reverse()
        elif what == "place":
            target["place"] = pick(rng, [p for p in PLACES if p != target["place"]])
        elif what == "background":
            spoiled["background"] = pick(rng, [c for c in COLOURS if c != scene["background"]])
        else:
            target["colour"] = pick(rng, [c for c in OBJECT_COLOURS if c != target["colour"]])
        if is_visible(spoiled) and (is_held_out(scene) or not is_held_out(spoiled)):
            return spoiled


def parse(caption: str) -> dict:
    """Read a caption of `write_caption` back: {"objects": [{"name", "colour", "size", "place"}], "background", "look"},
    None for what it leaves open. Raises ValueError when it names no object of this world, or more than two."""
    sizes = {word: size for size, words in SIZE_WORDS.items() for word in words}
    places = {words: place for place, options in PLACE_WORDS.items() for words in options}
    objects = rf"(?:\b({'|'.join(sizes)}) )?(?:\b({'|'.join(OBJECT_COLOURS)}) )?\b({'|'.join(NAMES)})\b"
    named = list(re.finditer(objects, caption))
    if not 1 <= len(named) <= 2:
        raise ValueError(
            f"'{caption}' names {len(named)} objects of the miniature's world; expected one or two of: "
            + ", ".join(NAMES)
        )
    background = re.search(rf"\b({'|'.join(COLOURS)}) background|\bon ({'|'.join(COLOURS)})\b", caption)
    objects = []
    for i, match in enumerate(named):
        after = caption[match.end() : named[i + 1].start() if i + 1 < len(named) else len(caption)]
        place = next((place for words, place in places.items() if words in after), None)
        colour = match[2] if match[3] in COLOURED else None
        objects.append({"name": match[3], "colour": colour, "size": sizes.get(match[1]), "place": place})
    between = caption[named[0].end() : named[1].start()] if len(named) == 2 else ""
    for words, ends in {
        "above": ("top", "bottom"),
        "below": ("bottom", "top"),
        "to the left of": ("left", "right"),
        "to the right of": ("right", "left"),
    }.items():
        if words in between:
            objects[0]["place"], objects[1]["place"] = ends
    looks = [name for name, options in LOOK_WORDS.items() for words in options if re.search(rf"\b{words}\b", caption)]
    return {
        "objects": objects,
        "background": (background[1] or background[2]) if background else None,
        "look": looks[0] if looks else None,
    }


def content_right(scene: dict, asked: dict) -> dict[str, bool]:
    """Which of the details that were asked for the scene has; details left open are not in the answer. The number of
    objects always counts. Without places, a named object may stand anywhere."""
    there = {o["name"]: o for o in scene["objects"]}
    right = {"count": len(scene["objects"]) == len(asked["objects"])}
    nothing = dict.fromkeys(("name", "colour", "size", "place"))
    for i, o in enumerate(asked["objects"]):
        seen = there.get(o["name"], nothing)
        right |= {f"{key} {i}": seen[key] == o[key] for key in nothing if o[key]}
    if asked["background"]:
        right["background"] = scene["background"] == asked["background"]
    if asked.get("look"):
        right["look"] = scene["look"] == asked["look"]
    return right

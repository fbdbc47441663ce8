"""The miniature's world: scenes of one or two emoji on a coloured background, their captions, and their flaws.

Everything the miniature learns from is drawn and written here. A scene is a plain dictionary

    {"objects": [{"name": "fox", "size": "small", "place": "left"}, ...], "background": "blue",
     "condition": "clean" | "washed out" | "blurred" | "noisy" | "badly cropped", "vivid": 0.0 ... 1.0}

`random_scene` draws one, `render` paints it, `write_caption` describes it in words (a rich grammar, with the
omissions, quality words and mistakes that captions on the web have) and `parse` reads a caption back.
"""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

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
BACKGROUNDS = {
    "red": (205, 45, 45),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 60),
    "green": (50, 150, 60),
    "teal": (70, 195, 195),
    "blue": (45, 80, 200),
    "purple": (130, 55, 165),
    "black": (28, 28, 32),
}
SIZES = {"small": 20, "large": 31}  # longest side in pixels
PLACES = {"middle": (32, 32), "left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48)}  # centre (x, y)
CONDITIONS = {"clean": 0.55, "washed out": 0.12, "blurred": 0.13, "noisy": 0.13, "badly cropped": 0.07}  # how often
NAMES, COLOURS = list(OBJECTS), list(BACKGROUNDS)


def is_held_out(scene: dict) -> bool:
    """Whether the scene pairs an object with the one background that no picture for CLIP, autoencoder and UNet pairs
    it with. (Spoiled scenes may, and so do a few captions, pictures of the raters' and of the judge.)"""
    colour = COLOURS.index(scene["background"])
    return any(NAMES.index(o["name"]) * 5 % len(COLOURS) == colour for o in scene["objects"])


def random_scene(rng: np.random.Generator, held_out: bool = False) -> dict:
    """Draw a scene; `held_out` picks from the pairs that `is_held_out` keeps apart, otherwise from all the others."""
    while True:
        places = [[p] for p in PLACES] + [["left", "right"], ["top", "bottom"]]
        layout = places[rng.choice(len(places), p=[0.09] * 5 + [0.3, 0.25])]
        names = rng.choice(NAMES, len(layout), replace=False)
        scene = {
            "objects": [
                {"name": str(n), "size": str(rng.choice(list(SIZES))), "place": p}
                for n, p in zip(names, layout, strict=True)
            ],
            "background": str(rng.choice(COLOURS)),
            "condition": str(rng.choice(list(CONDITIONS), p=list(CONDITIONS.values()))),
            "vivid": float(rng.uniform()),
        }
        if is_held_out(scene) == held_out:
            return scene


@lru_cache(None)
def sprite(name: str, size: str) -> np.ndarray:
    """One emoji as float32 RGBA in [0, 1], colours premultiplied by alpha, its longest side SIZES[size] pixels."""
    files = [f for f in FONT_FILES if Path(f).exists()]
    if not files:
        raise FileNotFoundError(
            "no Noto Color Emoji font found, which draws the miniature's world: "
            "install it (Debian and Ubuntu: apt-get install fonts-noto-color-emoji)"
        )
    picture = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(picture).text((12, 12), OBJECTS[name], font=ImageFont.truetype(files[0], 109), embedded_color=True)
    picture = picture.crop(picture.getbbox())
    scale = SIZES[size] / max(picture.size)
    picture = picture.convert("RGBa").resize([max(1, round(s * scale)) for s in picture.size], Image.LANCZOS)
    return np.asarray(picture, np.float32) / 255


def render(scene: dict, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene: uint8 (64, 64, 3). The generator gives what the caption never says: jitter, shades, the flaw."""
    n = IMAGE_SIZE
    colour = np.array(BACKGROUNDS[scene["background"]], np.float32) + rng.uniform(-8, 8)
    colour = colour.mean() + (colour - colour.mean()) * (0.8 + 0.25 * scene["vivid"])
    image = np.broadcast_to(np.clip(colour, 0, 255) / 255, (n, n, 3)).copy()
    for o in scene["objects"]:
        s = sprite(o["name"], o["size"])
        x, y = PLACES[o["place"]]
        left = int(np.clip(x - s.shape[1] // 2 + rng.integers(-1, 2), 0, n - s.shape[1]))
        top = int(np.clip(y - s.shape[0] // 2 + rng.integers(-1, 2), 0, n - s.shape[0]))
        patch = image[top : top + s.shape[0], left : left + s.shape[1]]
        patch[:] = s[..., :3] + patch * (1 - s[..., 3:])
    image = add_flaw(np.clip(image, 0, 1), scene, rng)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def add_flaw(image: np.ndarray, scene: dict, rng: np.random.Generator) -> np.ndarray:
    """Spoil a clean image (64, 64, 3) in [0, 1] as the scene's condition says."""
    n = IMAGE_SIZE
    if scene["condition"] == "washed out":  # a grey veil
        veil = rng.uniform(0.5, 0.65)
        return image * (1 - veil) + 0.8 * veil
    if scene["condition"] == "blurred":  # out of focus
        blurred = Image.fromarray((image * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(2.2, 3)))
        return np.asarray(blurred, np.float32) / 255
    if scene["condition"] == "noisy":  # coarse coloured grain, 4 pixels wide
        grain = rng.normal(0, rng.uniform(0.10, 0.17), (n // 4, n // 4, 3)).astype(np.float32)
        return image + grain.repeat(4, 0).repeat(4, 1)
    if scene["condition"] == "badly cropped":  # shoved over the edge, a blank strip on the other side
        shift, axis = int(rng.integers(9, 13)), int(rng.integers(2))
        places = {o["place"] for o in scene["objects"]}
        axis = 0 if places & {"top", "bottom"} else 1 if places & {"left", "right"} else axis
        forward = (
            bool(places & {"right", "bottom"}) if len(places) == 1 and places != {"middle"} else rng.random() < 0.5
        )
        image = np.roll(image, shift if forward else -shift, axis)
        strip = slice(0, shift) if forward else slice(n - shift, n)
        image[strip if axis == 0 else slice(None), strip if axis == 1 else slice(None)] = 1.0
    return image


# Captions.

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PLACE_WORDS = {
    "middle": ("in the middle", "in the center"),
    "left": ("at the left", "on the left side"),
    "right": ("at the right", "on the right side"),
    "top": ("at the top", "in the upper half"),
    "bottom": ("at the bottom", "in the lower half"),
}
QUALITY_WORDS = {
    "clean": ("clean", "sharp and vivid", "high quality", "best quality", "clear and sharp"),
    "washed out": ("washed out", "faded"),
    "blurred": ("blurry", "out of focus"),
    "noisy": ("noisy", "grainy"),
    "badly cropped": ("badly cropped", "cut off"),
    "flawed": ("low quality", "bad quality"),
}


def pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def write_caption(scene: dict, rng: np.random.Generator, complete: bool = False, quality: float = 0.25) -> str:
    """Describe a scene. `complete` names every size, place and the background, and says nothing of quality;
    otherwise details are left out now and then, and a share `quality` of the captions speaks of quality."""

    def says(probability):
        return complete or rng.random() < probability

    objects = list(scene["objects"])
    with_places, with_background = says(0.85), says(0.9)
    phrases = []
    for o in objects:
        words = f"{pick(rng, SIZE_WORDS[o['size']])} {o['name']}" if says(0.8) else o["name"]
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
    if not complete and rng.random() < quality:
        vague = scene["condition"] != "clean" and rng.random() < 0.4
        words = pick(rng, QUALITY_WORDS["flawed" if vague else scene["condition"]])
        text = pick(rng, (f"{text}, {words}", f"{words}, {text}"))
    return text


def spoil(scene: dict, rng: np.random.Generator) -> dict:
    """The same scene with one thing of its content changed: an object, a size, the places, or the background."""
    scene = {**scene, "objects": [dict(o) for o in scene["objects"]]}
    what, target = rng.integers(4), scene["objects"][rng.integers(len(scene["objects"]))]
    if what == 0:
        target["name"] = str(pick(rng, [n for n in NAMES if n not in {o["name"] for o in scene["objects"]}]))
    elif what == 1:
        target["size"] = "large" if target["size"] == "small" else "small"
    elif what == 2 and len(scene["objects"]) == 2:
        first, second = scene["objects"]
        first["name"], second["name"] = second["name"], first["name"]
    elif what == 2:
        target["place"] = str(pick(rng, [p for p in PLACES if p != target["place"]]))
    else:
        scene["background"] = str(pick(rng, [c for c in COLOURS if c != scene["background"]]))
    return scene


def parse(caption: str) -> dict:
    """Read a caption of `write_caption` back: {"objects": [{"name", "size" or None, "place" or None}], "background" or
    None}. Raises ValueError when the caption names no object of this world, or more than two."""
    sizes = {word: size for size, words in SIZE_WORDS.items() for word in words}
    places = {words: place for place, options in PLACE_WORDS.items() for words in options}
    named = list(re.finditer(rf"(?:\b({'|'.join(sizes)}) )?\b({'|'.join(NAMES)})\b", caption))
    if not 1 <= len(named) <= 2:
        raise ValueError(
            f"'{caption}' names {len(named)} objects of the miniature's world; expected one or two of: "
            + ", ".join(NAMES)
        )
    colour = re.search(rf"\b({'|'.join(COLOURS)}) background|\bon ({'|'.join(COLOURS)})\b", caption)
    objects = []
    for i, match in enumerate(named):
        after = caption[match.end() : named[i + 1].start() if i + 1 < len(named) else len(caption)]
        place = next((place for words, place in places.items() if words in after), None)
        objects.append({"name": match[2], "size": sizes.get(match[1]), "place": place})
    between = caption[named[0].end() : named[1].start()] if len(named) == 2 else ""
    for words, ends in {
        "above": ("top", "bottom"),
        "below": ("bottom", "top"),
        "to the left of": ("left", "right"),
        "to the right of": ("right", "left"),
    }.items():
        if words in between:
            objects[0]["place"], objects[1]["place"] = ends
    return {"objects": objects, "background": (colour[1] or colour[2]) if colour else None}


def like(scene: dict, asked: dict, ragged: float = 0.0) -> float:
    """How much the noisy rater likes a picture of `scene` for a caption that asked for `asked` (see `parse`), before
    the noise. Right content counts most (up to 4, and 2 more when nothing is wrong), then a clean picture (2), then
    vivid colours (0.7); `ragged` >= 0 says how much the picture's detail is torn (1: as bad as a flaw)."""
    right = list(content_right(scene, asked).values())
    vivid = scene["vivid"] if scene["condition"] != "washed out" else 0.0
    return 4 * float(np.mean(right)) + 2 * all(right) + 2 * (scene["condition"] == "clean") + 0.7 * vivid - 2 * ragged


def content_right(scene: dict, asked: dict) -> dict[str, bool]:
    """Which of the details that were asked for the scene has; details left open are not in the answer. The number of
    objects always counts. Without places, a named object may stand anywhere."""
    there = {o["name"]: o for o in scene["objects"]}
    right = {"count": len(scene["objects"]) == len(asked["objects"])}
    for i, o in enumerate(asked["objects"]):
        seen = there.get(o["name"], {"name": None, "size": None, "place": None})
        right |= {f"{key} {i}": seen[key] == o[key] for key in ("name", "size", "place") if o[key]}
    if asked["background"]:
        right["background"] = scene["background"] == asked["background"]
    return right

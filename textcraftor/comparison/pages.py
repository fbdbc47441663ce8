"""Pages that open from the disk and need nothing else: templates, filled with tables, data and images."""

import base64
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from textcraftor.errors import first_line

TEMPLATES = Path(__file__).parent / "templates"
BLOCK = 16  # prompts whose images stand in one block, the least that the page unpacks at once
LOSSLESS = 128  # pixels: up to this size images are too small to lose anything


def write_page(path, template, parts):
    """Write a template with every {{name}} replaced by parts[name], whole or not at all.

    A part is a text or an iterable of texts, which are written one by one: a page may be larger than memory.
    """
    pieces = re.split(r"\{\{(\w+)\}\}", (TEMPLATES / template).read_text(encoding="utf-8"))
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            # One pass: what is put in is never searched, whatever a prompt says.
            for i, piece in enumerate(pieces):
                part = parts[piece] if i % 2 else piece
                file.writelines([part] if isinstance(part, str) else part)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def embed_json(content):
    """JSON that can stand in a script element: it holds no `<`, so nothing in it ends the element."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def image_blocks(paths, size, problems):
    """Yield script elements with the images of `paths`, N rows of R files: a data URI a line, row after row.

    size: longest side in pixels. The line of a file that is missing or cannot be decoded is empty, and `problems`
    gets {path: why}.
    """

    def embed(path):
        try:
            return path, data_uri(path, size), ""
        except Exception as problem:  # every format's decoder raises its own kinds
            return path, "", getattr(problem, "strerror", None) or first_line(problem)

    flat = [path for row in paths for path in row]
    per_block = BLOCK * len(paths[0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(embed, flat), total=len(flat), unit="image", dynamic_ncols=True)
        for i, (path, uri, problem) in enumerate(bar):
            if i % per_block == 0:
                yield f'<script type="text/plain" id="images-{i // per_block}">'
            if problem:
                problems[str(path)] = problem
            last = i % per_block == per_block - 1 or i == len(flat) - 1
            yield uri + ("</script>\n" if last else "\n")


def data_uri(path, size):
    """An image file as a data URI of at most `size` pixels a side: WebP, or the file itself if it is small already."""
    with Image.open(path) as picture:
        if picture.format in ("JPEG", "WEBP") and max(picture.size) <= size:
            picture.load()
            return _uri(picture.format.lower(), Path(path).read_bytes())
        picture = picture.convert("RGB")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=85, method=2, lossless=max(picture.size) <= LOSSLESS)
    return _uri("webp", file.getvalue())


def svg_uri(content):
    """The bytes of an SVG file as a data URI: an image, in which nothing runs."""
    return _uri("svg+xml", content)


def _uri(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

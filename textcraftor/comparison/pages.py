"""HTML pages that open from the disk and load nothing else: templates filled with tables, data and images."""

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
from textcraftor.files import write_whole
from textcraftor.image_files import upright_rgb

TEMPLATES = Path(__file__).parent / "templates"
BLOCK = 16  # prompts whose images share one script element; the page decodes one element at a time
LOSSLESS = 128  # pixels; images up to this size are stored without loss


def write_page(path, template, parts):
    """Write a template with every {{name}} replaced by parts[name], whole or not at all.

    A part is a string, or an iterable of strings written one by one, so that a page may be larger than memory.
    """
    pieces = re.split(r"\{\{(\w+)\}\}", (TEMPLATES / template).read_text(encoding="utf-8"))
    # A folder's name may hold bytes that are not UTF-8, which Python reads as lone surrogates.
    with write_whole(path) as unfinished, open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:
        # The template is split once, so {{name}} in a prompt is never replaced.
        for i, piece in enumerate(pieces):
            part = parts[piece] if i % 2 else piece
            file.writelines([part] if isinstance(part, str) else part)


def embed_json(content):
    """JSON for a script element: without any `<`, so that nothing in it can end the element."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def image_blocks(paths, size, problems):
    """Yield script elements with the images of `paths`, N rows of R files: one data URI per line, row by row.

    size: longest side in pixels. For a file that is missing or cannot be decoded, the line is empty and `problems`
    gets {path: reason}.
    """

    def embed(path):
        try:
            return path, data_uri(path, size), ""
        except Exception as problem:  # each image format's decoder raises its own kinds
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
    """An image file as a data URI, at most `size` pixels a side. Small JPEG and WebP files stay as they are."""
    with Image.open(path) as picture:
        if picture.format in ("JPEG", "WEBP") and max(picture.size) <= size:
            picture.load()
            return _uri(picture.format.lower(), Path(path).read_bytes())
        picture = upright_rgb(picture)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=85, method=2, lossless=max(picture.size) <= LOSSLESS)
    return _uri("webp", file.getvalue())


def svg_uri(content):
    """The bytes of an SVG file as a data URI. Shown as an image, it cannot run scripts."""
    return _uri("svg+xml", content)


def _uri(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

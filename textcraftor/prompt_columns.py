"""Find the column of a table that holds the prompts, the delimiter, and whether the first line is a header."""

import csv
import re
from collections import Counter
from numbers import Number

from textcraftor.errors import UserError

# Names of caption columns in public data sets, the best first. Case does not matter, nor do spaces, quotation marks and
# BOMs at the ends, nor whether words are joined by "_", "-" or spaces.
NAMES = (
    "prompt", "prompts", "text prompt", "prompt text", "caption", "captions", "text", "texts", "txt", "description",
    "image description", "image caption", "top caption", "blip caption", "en text", "alt text", "sentence", "sentences",
)  # fmt: skip
# Other names may also end with one of these words, as `vlm_caption`; but no `negative_prompt`.
LAST_WORDS = {"prompt", "prompts", "caption", "captions", "text", "description"}
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
NO_DELIMITER = "\x1f"  # separates nothing: with one column, a comma is part of the prompt

_URL = re.compile(r"([a-z][a-z0-9+.-]*://|www\.|data:[a-z]+/)\S+", re.I)
_FILE = re.compile(
    r"\S*[\\/]\S*|\S+\.[a-z][a-z0-9]{1,7}|([a-z]:)?[\\/].*"
    r"|.+\.(jpe?g|png|webp|gif|bmp|tiff?|avif|mp4|npy|npz|txt|json|parquet|tar|pt|ckpt|safetensors)",
    re.I,
)
_CODE = re.compile(r"[0-9a-f-]{16,}|(?=\S*\d)(?=\S*[a-zA-Z])[\w+/=-]{20,}", re.I)
_SIZE = re.compile(r"\d+\s*[x×]\s*\d+|[+-]?(\d+\.?\d*|\.\d+)e[+-]?\d+", re.I)
_NESTED = {"{": "structs", "[": "lists"}
_NESTED_START = re.compile(r"""\{\s*["'}]|\[\s*(["'{\[\]]|-?\d)""")


def kind_of(values) -> str | None:
    """What a sample of a column's values holds that cannot be prompts, such as "URLs"; None if half may be prompts."""
    kinds = [_kind(value) for value in values if value is not None and value != "" and value == value]
    kinds = [kind for kind in kinds if kind != "empty"]
    refused = Counter(kind for kind in kinds if kind)
    return refused.most_common(1)[0][0] if 2 * refused.total() > len(kinds) else None


def choose_column(path, names: list, samples: list) -> int:
    """Index of the column with the prompts. names: of all columns; samples: for each, some values or its `kind_of`.

    Takes the first of NAMES that holds text, else the only column that does (of several, the only one whose values
    have several words). Raises UserError naming the columns found.
    """
    kinds = [sample if isinstance(sample, str) else kind_of(sample) for sample in samples]
    named = sorted((rank, index) for index, name in enumerate(names) if (rank := _rank(name)) is not None)
    for _, index in named:
        if not kinds[index]:
            return index
    shown = [f"`{_shown(name)}`" + (f" ({kind})" if kind else "") for name, kind in zip(names, kinds, strict=True)]
    found = f"found {', '.join(shown)}"
    if named:
        name, kind = names[named[0][1]], kinds[named[0][1]]
        raise UserError(f"{path}: the column `{_shown(name)}` holds {kind}, not prompts; {found}; expected text there")
    able = [index for index, kind in enumerate(kinds) if not kind and any(samples[index])]
    if len(able) > 1:
        able = [index for index in able if _wordy(samples[index])]
    if len(able) == 1:
        return able[0]
    if len(names) == 1 and not kinds[0]:
        return 0
    raise UserError(f"{path}: cannot tell which column holds the prompts: {found}; rename that column to `prompt`")


def choose_delimiter(lines: list[str], default: str) -> str:
    """What separates a table's columns, from its first lines: `default` if it gives a column with a known name or fits
    the lines, else another delimiter that does, else NO_DELIMITER."""
    order = [default, *(delimiter for delimiter in DELIMITERS if delimiter != default)]
    for delimiter in order:
        if any(_rank(name) is not None for name in split(lines[0], delimiter)):
            return delimiter
    for delimiter in order:
        widths = [len(split(line, delimiter)) for line in lines if line.strip()]
        if len(widths) > 1 and widths[0] > 1 and widths.count(widths[0]) >= 0.8 * len(widths):
            return delimiter
    return NO_DELIMITER


def is_header(cells: list[str]) -> bool:
    """Whether a table's first row can be its columns' names, and not already a row: no numbers, URLs, sentences."""
    if any(_rank(cell) is not None for cell in cells):
        return True
    filled = [cell for cell in cells if cell.strip()]
    if filled == list(map(str, range(len(filled)))):
        return True  # as pandas numbers columns that have no names

    def is_name(cell):
        words = _words(cell)
        short = len(words) <= (2 if len(cells) == 1 else 4) or not LAST_WORDS.isdisjoint(words)
        return short and _kind(cell) in (None, "empty")

    return all(map(is_name, cells))


def split(line: str, delimiter: str) -> list[str]:
    """Cells of one line of a table."""
    line = line.rstrip("\r\n")
    if delimiter == "\t":
        return [unquoted(cell) for cell in line.split("\t")]
    try:
        return next(csv.reader([line], delimiter=delimiter), [""])
    except csv.Error:  # a carriage return within the line
        return line.split(delimiter)


def unquoted(cell: str) -> str:
    """A cell without its quotation marks if these enclose it as csv has it, else the cell as it is."""
    inside = cell[1:-1]
    return inside.replace('""', '"') if cell == f'"{inside}"' and '"' not in inside.replace('""', "") else cell


def _kind(value):
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return "empty"
        if _URL.fullmatch(text):
            return "URLs"
        if not any(map(str.isalpha, text)) and any(map(str.isdigit, text)) or _SIZE.fullmatch(text):
            return "numbers"
        if text.lower() in ("true", "false", "null", "none", "nan", "na", "n/a"):
            return "no text"
        if _CODE.fullmatch(text):
            return "codes"
        if _FILE.fullmatch(text):
            return "file names"
        return _NESTED[text[0]] if text[-1] in "]}" and _NESTED_START.match(text) else None
    if isinstance(value, bytes):
        return "bytes"
    if isinstance(value, (Number, bool)):
        return "numbers"
    return "structs" if isinstance(value, dict) else "lists" if isinstance(value, list) else "no text"


def _words(name):
    return re.findall(r"[^\W_]+", str(name).lower())


def _rank(name):
    if not re.fullmatch(r"[\w .-]+", bare := str(name).strip("\ufeff \t\r\n\"'`")):
        return None
    words = _words(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", bare))
    if " ".join(words) in NAMES:
        return NAMES.index(" ".join(words))
    other = 0 < len(words) <= 3 and words[-1] in LAST_WORDS and {"negative", "neg"}.isdisjoint(words)
    return len(NAMES) if other else None


def _shown(name):
    name = " ".join(str(name).split())
    return name if len(name) <= 40 else name[:39] + "…"


def _wordy(values):
    texts = [value for value in values if value and value.strip()]
    return 2 * sum(len(text.split()) > 1 for text in texts) > len(texts)

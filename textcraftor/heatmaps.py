"""Heat maps of words: where in an image the UNet attends to each word of the prompt (TextCraftor, Figure 11).

A cross-attention layer spreads, at every place of the image, an attention of 1 over all tokens of the prompt. A word's
map is the share that its tokens get, averaged over heads, layers and sampling steps.
"""

import math
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch.nn.functional import interpolate

from textcraftor.errors import UserError
from textcraftor.fonts import draw_text, text_width, wrap
from textcraftor.heatmap_options import word_spans
from textcraftor.sampling import first_tuned, make_images, to_uint8

# All in pixels.
CELL, MARGIN, GAP = 192, 16, 6  # longer side of an image; around the page; between images
TITLE, LABEL, TEXT = 20, 17, 13  # font sizes: of the prompt, of the words, of all else
MOST_COLUMNS = 8
COLOURS = matplotlib.colormaps["inferno"]


class Word(NamedTuple):
    """A word of a prompt and where its tokens stand among those that the text encoder reads."""

    text: str
    tokens: list[int]


def prompt_words(tokenizer, prompt):
    """A prompt -> (the Words that the text encoder reads, in order; how many words it does not read).

    A repeated word is one Word each time. Words that share a token, as two emoji or Chinese characters can, are one
    Word. Raises UserError if the text encoder reads none.
    """
    encoded = tokenizer(prompt, truncation=True, return_offsets_mapping=True)
    tokens = [(place, *span) for place, span in enumerate(encoded.offset_mapping) if span[0] < span[1]]
    words, cut = [], 0
    for start, end in word_spans(prompt):
        mine = [place for place, first, last in tokens if first < end and start < last]
        if not mine:
            cut += 1
        elif words and words[-1][2][-1] == mine[0]:
            before, _, shared = words.pop()
            words.append((before, end, [*shared, *mine[1:]]))
        else:
            words.append((start, end, mine))
    if not words:
        raise UserError(
            f"the prompt {prompt!r} has no word among the {tokenizer.model_max_length} tokens that are read"
        )
    return [Word(prompt[start:end], mine) for start, end, mine in words], cut


class AttentionRecorder(AttnProcessor2_0):
    """A diffusers attention processor: the stock one, which adds up the cross-attention that it sees on the way.

    It keeps the second half of each batch, the conditional one of classifier-free guidance. The sums stay at each
    layer's own resolution and in fp32: 1.7 MB an image for SD v1.5 at 512 × 512, and 26 MB while the largest layer is
    at work. What the layers put out is the stock processor's, to the bit.
    """

    def __init__(self, size, skip=0):
        """size: (h, w) of the latents. skip: evaluations of the UNet, the first ones, that are not recorded."""
        super().__init__()
        self.size, self.skip = size, skip
        self.evaluations = self.layers = 0
        self.sums = {}  # (h, w) of a layer: (B, h * w, L)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if encoder_hidden_states is not None and self.evaluations > self.skip:
            places, tokens = (states.chunk(2)[1] for states in (hidden_states, encoder_hidden_states))
            probabilities = attention_probabilities(attn, places, tokens)
            size = layer_size(self.size, probabilities.shape[1])
            self.sums[size] = self.sums.get(size, 0) + probabilities
            self.layers += 1
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    def maps(self):
        """The mean over heads, layers and evaluations, (B, L, h, w) in fp32; over all L tokens it sums to 1."""
        total = 0
        for size, probabilities in self.sums.items():
            maps = probabilities.transpose(1, 2).unflatten(2, size)
            total = total + interpolate(maps, self.size, mode="bilinear", antialias=True)
        return total / self.layers


@torch.no_grad()
def attention_probabilities(attn, places, tokens):
    """softmax(QKᵀ / √d) of a cross-attention layer of SD v1, the mean over its heads: (B, N, L) in fp32.

    places: (B, N, C), the layer's input; tokens: (B, L, D), the text embeddings.
    """
    query, key = attn.to_q(places), attn.to_k(tokens)
    query, key = (states.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float() for states in (query, key))
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)


def layer_size(size, places):
    """(h, w) of a layer of N = `places` places in a UNet that halves latents of `size` (h, w), rounding up."""
    while math.prod(size) > places:
        size = tuple(math.ceil(side / 2) for side in size)
    return size


@contextmanager
def record_attention(unet, size, skip=0):
    """Give an AttentionRecorder that `unet` uses in all its layers until the block ends; see there."""
    recorder, stock = AttentionRecorder(size, skip), unet.attn_processors

    def count(module, arguments):
        recorder.evaluations += 1

    hook = unet.register_forward_pre_hook(count)
    unet.set_attn_processor(recorder)
    try:
        yield recorder
    finally:
        hook.remove()
        unet.set_attn_processor(stock)


@torch.inference_mode()
def draw_with_maps(networks, scheduler, prompt, noise, tuned_steps, guidance, weighting=1.0):
    """Draw one prompt -> (image (3, H, W) in [0, 1]; maps (L, h, w) of all its tokens), both fp32 on the CPU.

    noise: (1, C, h, w). The maps average the last `tuned_steps` steps, the ones that the tuned encoder drives: the
    steps before them are the same whatever the encoder, and would only hide the difference. See make_images, also for
    guidance and weighting.
    """
    skip = first_tuned(scheduler, tuned_steps)
    with record_attention(networks.unet, tuple(noise.shape[-2:]), skip) as recorder:
        (image,) = make_images(
            networks, scheduler, [prompt], noise, tuned_steps=tuned_steps, guidance=guidance, weighting=weighting
        )
    return image.float().cpu(), recorder.maps()[0].cpu()


def word_maps(maps, words):
    """Maps (L, h, w) of all tokens -> (W, h, w), one a Word: the sum over its tokens."""
    return torch.stack([maps[word.tokens].sum(0) for word in words])


def heatmap_page(prompt, words, original, tuned, note):
    """A PIL image: above the original encoder's image and its words' maps, below the tuned one's.

    original, tuned: (image (3, H, W) in [0, 1], maps (W, h, w) of the words). Both maps of a word share one scale of
    colours, from their least to their largest value, which stand below them in percent. note: stands under the prompt.
    """
    pictures = [_picture(image) for image, _ in (original, tuned)]
    columns = [("image", "", pictures)]
    for word, *maps in zip(_labels(words), original[1], tuned[1], strict=True):
        low, high = (float(end) for end in torch.stack(maps).aminmax())
        cells = [_overlay(picture, values, low, high) for picture, values in zip(pictures, maps, strict=True)]
        columns.append((word, f"{100 * low:.1f} – {100 * high:.1f} %", cells))
    bands = math.ceil(len(columns) / MOST_COLUMNS)
    per_band = math.ceil(len(columns) / bands)
    width, height = pictures[0].size
    left = MARGIN + round(max(text_width(name, LABEL) for name in ("original", "tuned"))) + MARGIN
    page_width = max(left + per_band * (width + GAP) - GAP + MARGIN, 640)
    heading, lines = wrap(prompt, TITLE, page_width - 2 * MARGIN), wrap(note, TEXT, page_width - 2 * MARGIN)
    labels = [wrap(word, LABEL, width, most=2) for word, _, _ in columns]
    label_height = 22 * max(map(len, labels)) + 6
    band_height = label_height + 2 * (height + GAP) + 36
    top = MARGIN + 28 * len(heading) + 18 * len(lines) + 8
    page = Image.new("RGB", (page_width, top + bands * band_height + 28), "white")
    for number, line in enumerate(heading):
        draw_text(page, (MARGIN, MARGIN + 20 + 28 * number), line, TITLE)
    for number, line in enumerate(lines):
        draw_text(page, (MARGIN, MARGIN + 28 * len(heading) + 14 + 18 * number), line, TEXT)
    for index, ((_, values, cells), label) in enumerate(zip(columns, labels, strict=True)):
        x, y = left + index % per_band * (width + GAP), top + index // per_band * band_height + label_height
        for number, line in enumerate(reversed(label)):
            _draw_centred(page, (x + width / 2, y - 8 - 22 * number), line, LABEL)
        for row, (name, cell) in enumerate(zip(("original", "tuned"), cells, strict=True)):
            page.paste(cell, (x, y + row * (height + GAP)))
            if index % per_band == 0:
                draw_text(page, (MARGIN, y + row * (height + GAP) + height // 2 + 6), name, LABEL)
        _draw_centred(page, (x + width / 2, y + 2 * (height + GAP) + 12), values, TEXT)
    _draw_scale(page, left, page.height - 24)
    return page


def _labels(words):
    """The words' texts, from the second time on with a number: "a", "fox", "a (2)"."""
    texts = [word.text for word in words]
    times = [texts[: place + 1].count(text) for place, text in enumerate(texts)]
    return [text if time == 1 else f"{text} ({time})" for text, time in zip(texts, times, strict=True)]


def _picture(image):
    """(3, H, W) in [0, 1] -> a PIL image whose longer side is CELL."""
    picture = Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy())
    scale = CELL / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def _overlay(picture, values, low, high):
    """A map (h, w) in colours over a grey version of its image: the brighter, the less of the image shows."""
    enlarged = Image.fromarray(values.numpy()).resize(picture.size, Image.Resampling.BILINEAR)
    heat = (np.asarray(enlarged) - low) / max(high - low, 1e-12)
    grey = np.asarray(picture.convert("L"))[..., None] / 255
    mixed = 0.35 * grey + 0.65 * COLOURS(heat)[..., :3]
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def _draw_centred(page, place, text, size):
    draw_text(page, (place[0] - text_width(text, size) / 2, place[1]), text, size)


def _draw_scale(page, x, y):
    """The scale of colours, with its words."""
    before, after = "the word's least attention ", " its most, in either image"
    draw_text(page, (x, y + 12), before, TEXT)
    x += round(text_width(before, TEXT)) + 4
    colours = (COLOURS(np.linspace(0, 1, 160))[None, :, :3] * 255).round().astype(np.uint8)
    page.paste(Image.fromarray(colours).resize((160, 14)), (x, y))
    draw_text(page, (x + 164, y + 12), after, TEXT)

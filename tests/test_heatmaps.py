"""Heat maps of words, against attention computed naively from what goes through the UNet's layers."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import heatmaps
from textcraftor.errors import UserError
from textcraftor.heatmap_options import parse_options
from textcraftor.heatmaps import AttentionRecorder, draw_with_maps, heatmap_page, prompt_words, word_maps
from textcraftor.models import clip_tokenizer, load_model, make_networks
from textcraftor.recorded import record
from textcraftor.sampling import make_images, make_scheduler, prompt_noise
from textcraftor.weight_files import save_text_encoder

REPOSITORY = Path(__file__).parents[1]
PROMPT = "a red fox and a blue cat"
T, K, GUIDANCE = 3, 2, 5.0


@pytest.fixture(scope="module")
def model(stable_diffusion):
    return load_model(str(stable_diffusion))


@pytest.fixture(scope="module")
def tuned(model):
    """A text encoder that differs from the model's own."""
    encoder = copy.deepcopy(model.text_encoder)
    generator = torch.Generator().manual_seed(0)
    for weight in encoder.parameters():
        weight.data += weight.std() * torch.randn(weight.shape, generator=generator)
    return encoder


class NaiveAttention:
    """softmax(QKᵀ / √d) of every head, in float64, from the outputs of to_q and to_k of the cross-attention layers."""

    def __init__(self, unet, size):
        self.size, self.maps, self.hooks, self.query = size, [], [], {}
        for name, layer in unet.named_modules():
            if name.endswith("attn2"):
                self.hooks.append(layer.to_q.register_forward_hook(self.keep_query(name)))
                self.hooks.append(layer.to_k.register_forward_hook(self.attend(name, layer.heads)))

    def keep_query(self, name):
        return lambda module, arguments, output: self.query.__setitem__(name, output)

    def attend(self, name, heads):
        def hook(module, arguments, keys):
            if len(keys) == 2:  # the layer's own call, with both halves of guidance, not the recorder's
                self.maps.append(self.image_maps(self.query[name][1], keys[1], heads))

        return hook

    def image_maps(self, queries, keys, heads):
        queries, keys = queries.double().numpy(), keys.double().numpy()
        width = queries.shape[1] // heads
        mean = 0
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            weights = np.exp(queries[:, part] @ keys[:, part].T / width**0.5)
            mean = mean + weights / weights.sum(1, keepdims=True) / heads
        side = round(len(mean) ** 0.5)
        maps = [Image.fromarray(token.reshape(side, side).astype(np.float32)) for token in mean.T]
        return np.stack([np.asarray(token.resize(self.size[::-1], Image.Resampling.BILINEAR)) for token in maps])

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def test_maps_are_the_attention_of_the_tuned_steps_and_leave_the_image_alone(model, tuned):
    networks, scheduler = make_networks(model, tuned), make_scheduler(model.scheduler_config, T)
    noise = prompt_noise(2023, [0], (4, 8, 8))
    before = model.unet.attn_processors
    naive = NaiveAttention(model.unet, (8, 8))
    image, maps = draw_with_maps(networks, scheduler, PROMPT, noise, K, GUIDANCE)
    naive.remove()
    assert maps.shape == (77, 8, 8) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(0), torch.ones(8, 8), rtol=0, atol=1e-5)
    layers = len(naive.maps) // T
    assert layers * T == len(naive.maps) and layers == sum(name.endswith("attn2.processor") for name in before)
    expected = torch.from_numpy(np.mean(naive.maps[-K * layers :], axis=0, dtype=np.float64)).float()
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-7)
    all_steps = torch.from_numpy(np.mean(naive.maps, axis=0, dtype=np.float64)).float()
    assert (all_steps - expected).abs().max() > 1e-5  # so the comparison above tells which steps are averaged

    assert {name: type(one) for name, one in model.unet.attn_processors.items()} == {
        name: type(one) for name, one in before.items()
    }
    with torch.no_grad():
        stock = make_images(networks, scheduler, [PROMPT], noise, tuned_steps=K, guidance=GUIDANCE)[0]
    assert torch.equal(image, stock)

    words, _ = prompt_words(model.tokenizer, PROMPT)
    by_word = word_maps(maps, words)
    torch.testing.assert_close(by_word, maps[1:8], rtol=0, atol=0)  # one token a word here


def test_half_precision_and_latents_that_are_no_square(model):
    """Bfloat16 networks give fp32 maps that sum to one; odd sides are halved as the UNet halves them."""
    half = model._replace(**{
        name: copy.deepcopy(getattr(model, name)).bfloat16() for name in ("text_encoder", "unet", "vae")
    })  # fmt: skip
    scheduler, noise = make_scheduler(model.scheduler_config, T), prompt_noise(0, [0], (4, 6, 10))
    image, maps = draw_with_maps(make_networks(half), scheduler, PROMPT, noise, T, GUIDANCE)
    assert image.shape == (3, 48, 80) and maps.shape == (77, 6, 10)
    torch.testing.assert_close(maps.sum(0), torch.ones(6, 10), rtol=0, atol=1e-5)
    _, exact = draw_with_maps(make_networks(model), scheduler, PROMPT, noise, T, GUIDANCE)
    torch.testing.assert_close(maps, exact, rtol=0.2, atol=0)

    recorder = AttentionRecorder((5, 7))
    layer = next(one for name, one in model.unet.named_modules() if name.endswith("attn2"))
    recorder.evaluations = 1
    for places in (35, 3 * 4, 2 * 2):
        recorder(layer, torch.randn(2, places, layer.to_q.in_features), torch.randn(2, 77, 32))
    assert list(recorder.sums) == [(5, 7), (3, 4), (2, 2)]
    torch.testing.assert_close(recorder.maps().sum(1), torch.ones(1, 5, 7), rtol=0, atol=1e-5)


def test_tokens_are_grouped_into_words():
    tokenizer = clip_tokenizer()
    cases = {
        "a red fox, and a blue cat": ["a", "red", "fox", "and", "a", "blue", "cat"],  # no map for the comma
        "(a well-lit 1024px fox's den...)": ["a", "well-lit", "1024px", "fox's", "den"],
        "红色的狐狸": ["红", "色", "的", "狐", "狸"],
        "赤いキツネ": ["赤", "いキツネ"],
        "여우 лиса हिन्दी": ["여우", "лиса", "हिन्दी"],
        "🦊🐱 👩‍🚀 ❤️ 🇫🇷 1️⃣": ["🦊", "🐱", "👩‍🚀", "❤️", "🇫🇷", "1️⃣"],
        "Cafe\u0301\n\tCAFÉ": ["Cafe\u0301", "CAFÉ"],
        "antidisestablishmentarianism": ["antidisestablishmentarianism"],
    }
    for prompt, expected in cases.items():
        words, cut = prompt_words(tokenizer, prompt)
        assert [word.text for word in words] == expected and cut == 0, prompt
        pieces = tokenizer(prompt).input_ids
        for word in words:
            own = tokenizer.decode([pieces[place] for place in word.tokens]).replace(" ", "").strip(",")
            assert own == tokenizer.decode(tokenizer(word.text).input_ids[1:-1]).replace(" ", ""), (prompt, word)
        places = [place for word in words for place in word.tokens]
        assert len(set(places)) == len(places) and 0 not in places and len(pieces) - 1 not in places

    pair = prompt_words(tokenizer, "fun 😂😂 fox")[0]  # CLIP has one token for the two
    assert [word.text for word in pair] == ["fun", "😂😂", "fox"] and [len(word.tokens) for word in pair] == [1, 1, 1]

    long = " ".join(f"fox{letter}" for letter in "abcdefghij" * 8)
    words, cut = prompt_words(tokenizer, long)
    assert len(words) + cut == 80 and cut > 0 and words[-1].tokens[-1] <= 75
    with pytest.raises(UserError, match="no word among the 77 tokens"):
        prompt_words(tokenizer, "! . " * 50 + "fox")


def test_the_page_has_a_column_a_word_and_one_scale_for_both_maps():
    words, _ = prompt_words(clip_tokenizer(), "红 fox and fox " + " ".join("abcdefgh"))
    image, flat = torch.zeros(3, 64, 64), torch.full((len(words), 8, 8), 0.25)
    peak = flat.clone()
    peak[:, 0, 0] = 0.75
    page = heatmap_page("two rows", words, (image, flat), (image, peak), "a note")
    pixels = np.asarray(page).astype(int)
    bright = (pixels[..., 0] > 140) & (pixels[..., 2] < pixels[..., 0] - 40)  # yellow, of the peaks and of the scale
    rows = np.flatnonzero(bright.any(1))
    starts = rows[np.diff(rows, prepend=-9) > 1]
    assert len(starts) == 3  # the tuned rows of two bands and the scale: the original's maps are the least everywhere
    same = heatmap_page("two rows", words, (image, flat), (image, flat), "a note")
    assert same.size == page.size


def test_the_program_makes_a_picture(stable_diffusion, tuned, tmp_path, capsys):
    save_text_encoder(tuned.state_dict(), tmp_path / "tc_text.safetensors")
    arguments = ["--model", stable_diffusion, "--text_path", tmp_path / "tc_text.safetensors", "-o", tmp_path / "a.png"]
    heatmaps.main(["a fox 🦊 红", *map(str, arguments), "--step", "2", "--grad-steps", "1"])
    assert "4 words, 2 images of 2 steps" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.png")] == ["a.png"]  # no unfinished one beside it
    page = Image.open(tmp_path / "a.png")
    assert page.format == "PNG" and page.width > 5 * 192 and len(page.getcolors(10**6)) > 1000


def test_the_weighting_of_the_training_is_that_of_the_picture(stable_diffusion, tuned, tmp_path, monkeypatch):
    path, found = tmp_path / "tc_text.safetensors", []
    save_text_encoder(tuned.state_dict(), path, record({"prompt_weighting": 0.5}))

    def draw(*arguments, **options):
        found.append(options["weighting"])
        return make_images(*arguments, **options)

    monkeypatch.setattr("textcraftor.heatmaps.make_images", draw)
    model = ["--model", str(stable_diffusion), "--step", "2", "--grad_steps", "1", "-o", str(tmp_path / "a.png")]
    heatmaps.main(["a fox", "--text_path", str(path), *model])
    assert found == [0.5, 0.5]


def test_steps_and_guidance_are_those_that_the_encoder_was_trained_for(tuned, tmp_path):
    path = tmp_path / "tc_text.safetensors"
    save_text_encoder(
        tuned.state_dict(), path, record({"step": 10, "grad_steps": 6, "guidance": 3, "prompt_weighting": 0.5})
    )
    for more, expected in (([], (10, 6, 3.0)), (["--step", "20"], (20, 6, 3.0)), (["--guidance", "2"], (10, 6, 2.0))):
        for model in ("x", "miniature"):
            args = parse_options("", ["fox", "--text_path", str(path), "--model", model, *more])
            assert (args.step, args.grad_steps, args.guidance) == expected and args.prompt_weighting == 0.5


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    text = ["--text_path", "tc_text.safetensors"]
    for argv, message in (
        ([*text], "required: prompt"),
        (["fox"], "no --text_path"),
        (["  ,.!", *text], "no word"),
        (["", *text], "no word"),
        (["fox", *text, "--grad_steps", "26"], "grad_steps <= step"),
        (["fox", *text, "--grad_steps", "0"], "--grad_steps 0: must be at least 1"),
        (["fox", *text, "--guidance", "nan"], "--guidance nan"),
        (["fox", *text, "-o", "fox.jpg"], "ends in .png"),
        (["fox", *text, "-o", str(tmp_path / "folder.png")], "is a folder"),
        (["fox", *text, "-o", str(tmp_path / "file" / "fox.png")], "is a file; choose a folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            parse_options("", argv)
        assert "\n" not in str(caught.value)
    defaults = json.loads((REPOSITORY / "miniature" / "defaults.json").read_text())
    for given, guidance in (([], defaults["guidance"]), (["--guidance", "4"], 4.0)):
        args = parse_options("", ["fox", *text, "--model", "miniature", *given])
        assert (args.guidance, Path(args.model).name) == (guidance, "stable-diffusion")

    with pytest.raises(UserError, match="nowhere: no such model.*\n.*none.safetensors: no such weights"):
        heatmaps.main(["fox", "--model", "nowhere", "--text_path", "none.safetensors"])

"""The miniature: its world, its models' formats, its build, and the weights that ship."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from miniature import clips, extender, world
from miniature.fit import fit, in_parts
from miniature.judge import QUESTIONS, THINGS, Judge, answers, right, see
from miniature.preferences import PAIR_NOISE, draw_group, group_of, like, preference_loss
from textcraftor.benchmark.extend import extend_prompt, load_extender
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.embeddings import count_cut
from textcraftor.errors import UserError

FOLDER = Path(__file__).parents[1] / "miniature"
needs_font = pytest.mark.skipif(
    not any(Path(f).exists() for f in world.FONT_FILES), reason="drawing the world needs the font Noto Color Emoji"
)


def scenes(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng, **options) for _ in range(count)]


def scene(name="apple", colour=None, size="large", place="left", background="blue", look="plain", condition="clean"):
    thing = {"name": name, "colour": colour, "size": size, "place": place}
    return {"objects": [thing], "background": background, "look": look, "condition": condition}


def render(drawn, seed=0):
    return world.render(drawn, np.random.default_rng(seed)).astype(float)


# Captions.


def test_a_caption_says_nothing_false_about_its_scene_and_a_complete_one_says_all():
    rng = np.random.default_rng(1)
    told = {words: kind for kind, options in world.QUALITY_WORDS.items() for words in options}
    quality = []
    for drawn in scenes(1000):
        caption = world.write_caption(drawn, rng)
        assert all(world.content_right(drawn, world.parse(caption)).values()), caption
        said = [kind for words, kind in told.items() if words in caption.split(", ")]
        assert set(said) <= {drawn["condition"], "flawed"} and not ("flawed" in said and drawn["condition"] == "clean")
        quality.append(bool(said))
        complete = world.parse(world.write_caption(drawn, rng, complete=True))
        by_name = {o["name"]: o for o in complete["objects"]}
        assert by_name == {o["name"]: o for o in drawn["objects"]}
        assert complete["background"] == drawn["background"] and complete["look"] is None
    assert np.mean(quality) == pytest.approx(0.5, abs=0.06)


def test_parse_reads_captions_by_hand_and_refuses_what_is_not_of_this_world():
    # fmt: off
    for caption, objects, background, look in (
        ("a small fox at the left and a large apple at the right of a blue background",
         [("fox", None, "small", "left"), ("apple", None, "large", "right")], "blue", None),
        ("best quality, emoji of a bee above a huge red car on red, polka dots",
         [("bee", None, None, "top"), ("car", "red", "large", "bottom")], "red", "dotted"),
        ("a whale at the top of an orange background", [("whale", None, None, "top")], "orange", None),
        ("an octopus to the right of a tiny yellow balloon, white outline",
         [("octopus", None, None, "right"), ("balloon", "yellow", "small", "left")], None, "sticker"),
    ):
        # fmt: on
        asked = world.parse(caption)
        assert [(o["name"], o["colour"], o["size"], o["place"]) for o in asked["objects"]] == objects
        assert (asked["background"], asked["look"]) == (background, look)
    with pytest.raises(ValueError, match="names 0 objects"):
        world.parse("a zebra at the left")


def test_spoiling_changes_the_one_thing_that_it_names_and_a_complete_caption_sees_it():
    rng, tried = np.random.default_rng(2), set()
    for drawn in scenes(300):
        for what in world.spoils(drawn):
            spoiled = world.spoil(drawn, rng, what)
            right = world.content_right(spoiled, world.parse(world.write_caption(drawn, rng, complete=True)))
            wrong = {key.split()[0] for key, value in right.items() if not value}
            expected = {"object": {"name", "colour", "size", "place"}, "swap": {"place"}}.get(what, {what})
            assert wrong and wrong <= expected, (what, drawn, spoiled)
            assert (spoiled["look"], spoiled["condition"]) == (drawn["look"], drawn["condition"])
            tried.add(what)
    assert tried == {"object", "size", "place", "swap", "background", "colour"}


def test_held_out_pairs_are_in_no_picture_or_caption_that_anything_learns_from():
    def pairs(of):
        return {(o["name"], of["background"]) for o in of["objects"]}

    rng, trained = np.random.default_rng(4), set()
    for drawn in scenes(3000):
        trained |= pairs(drawn) | pairs(world.spoil(drawn, rng))
    for i in range(200):
        trained |= {pair for drawn in group_of(0, i)["scenes"] for pair in pairs(drawn)}
        trained |= {pair for drawn in clips.families(rng)[0] for pair in pairs(drawn)} if i < 20 else set()
    trained |= {pair for p in (FOLDER / "prompts_train.txt").read_text().splitlines() for pair in pairs(world.parse(p))}
    assert all(pairs(drawn) - trained for drawn in scenes(300, held_out=True))
    for name in ("heldout", "validation"):
        assert all(pairs(world.parse(prompt)) - trained for prompt in pd.read_csv(FOLDER / f"{name}.csv").prompt)
    assert len(pd.read_csv(FOLDER / "heldout.csv").prompt.unique()) == 512


# Pictures.


@needs_font
def test_a_scene_is_drawn_as_it_says():
    """One large object on the left half of a plain blue picture, in colour, small ones smaller; drawing is seeded."""
    clean = render(scene())
    assert clean.shape == (64, 64, 3) and (clean == render(scene())).all() and (clean != render(scene(), 1)).any()
    background = clean[2, 60]
    assert background[2] > background[0] + 80, "blue"
    away = np.abs(clean - background).max(-1) > 20
    assert away[16:48, :32].mean() > 0.3 and not away[:, 34:].any()
    assert 0.3 < (np.abs(render(scene(size="small")) - background).max(-1) > 20).sum() / away.sum() < 0.6
    for colour, strongest in {"red": 0, "green": 1, "blue": 2}.items():
        for name in world.COLOURED:
            painted = render(scene(name, colour, background="pink", place="middle"))
            painted = painted[np.abs(painted - painted[0, 0]).max(-1) > 60]
            saturated = painted[np.ptp(painted, axis=-1) > 100]
            assert (saturated.argmax(-1) == strongest).mean() > 0.9, (name, colour)


@needs_font
def test_looks_and_flaws_change_what_they_claim_and_nothing_else():
    """Looks: around the object or behind it; flaws: sharpness, smooth areas, copies, rows, contrast, the frame."""
    drawn = scene(place="middle")
    clean, inside = render(drawn), np.zeros((64, 64), bool)
    inside[26:38, 26:38] = True  # in the midst of the apple
    background = clean[2, 60]
    for look in ("sticker", "shadow", "dotted", "ink"):
        changed = np.abs(render({**drawn, "look": look}) - clean).max(-1) > 25
        far = changed.copy()
        far[12:54, 12:54] = False
        assert changed.sum() > 40 and not changed[inside].any() and far.any() == (look == "dotted"), look
        brighter = render({**drawn, "look": look})[changed].mean() > background.mean()
        assert brighter == (look in ("sticker", "dotted")), look

    def flawed(condition, **change):
        return render({**drawn, "condition": condition, **change})

    def edges(image, axis=1):
        return np.abs(np.diff(image, axis=axis)).max(-1)

    assert np.percentile(edges(flawed("blur")), 99) < 0.5 * np.percentile(edges(clean), 99)
    corner = np.s_[:12, :12]
    assert flawed("grain")[corner].std((0, 1)).min() > 10 > clean[corner].std((0, 1)).max()
    blocks = edges(flawed("blocks"))[:12].mean(0)  # above the apple: steps only between blocks of eight
    assert blocks[7::8].min() > 4 * np.delete(blocks, np.arange(7, 63, 8)).max()
    scratches = np.abs(flawed("scratches") - clean).max(-1) > 60
    assert 100 < scratches.sum() < 700 and edges(scratches[..., None].astype(float), 0).sum() > scratches.sum() / 2
    ghost = np.abs(flawed("ghost") - clean).max(-1) > 15
    assert ghost.sum() > 100 and not ghost[:8].any() and not ghost[:, :8].any()
    ragged = flawed("ragged")
    rows = np.sort(ragged.reshape(64, -1), axis=1) - np.sort(clean.reshape(64, -1), axis=1)
    assert np.abs(rows).max() < 1e-9 < np.abs(ragged - clean).max(), "each row keeps its pixels"
    assert flawed("veil").std() < 0.6 * clean.std()
    assert (flawed("crop") == 255).all(-1).mean() > 0.12
    assert set(world.FLAWS) == {"blur", "grain", "blocks", "scratches", "ghost", "ragged", "veil", "crop"}


# Formats.


def test_openclip_weights_under_transformers_names_give_the_same_features():
    clip = clips.new_clip("L").eval()
    model = CLIPModel(clips.clip_config("L")).eval()
    result = model.load_state_dict(clips.transformers_names(clip))
    assert not result.missing_keys and not result.unexpected_keys
    images, ids = torch.rand(3, 3, 64, 64), clips.tokenize(clips.new_tokenizer(), ["a fox", "a bee on red", "a car"])
    with torch.inference_mode():
        ours = model(input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(ours.image_embeds, clip.encode_image(images, normalize=True), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.text_embeds, clip.encode_text(ids, normalize=True), atol=1e-5, rtol=1e-4)


def test_the_tokenizer_knows_whole_words_and_spells_the_rest():
    tokenizer = clips.new_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in clips.words_of_the_world())
    assert tokenizer.unk_token_id not in tokenizer("Zebra é!").input_ids[1:-1]
    assert tokenizer("fox").input_ids[-1] == len(tokenizer) - 1, "the end token is the largest id"


def test_the_tokenizer_is_the_same_in_every_process():
    """The one that ships was written by another process; equally frequent pairs must not be merged in random order."""
    tokenizer = clips.new_tokenizer()
    for folder in ("clip", "hpsv2", "pickscore/pickmodel", "stable-diffusion/tokenizer", "aesthetic/clip"):
        assert json.loads((FOLDER / folder / "vocab.json").read_text()) == tokenizer.get_vocab()
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        assert (FOLDER / folder / "merges.txt").read_text().splitlines()[1:] == [" ".join(pair) for pair in merges]


@needs_font
def test_families_and_groups_differ_in_what_they_say():
    """Families: five conditions, five looks, five places, four arrangements; groups: one thing wrong, or flawed."""
    shown, captions = clips.families(np.random.default_rng(3))
    starts = [(i, 5, "condition") for i in range(0, 30, 5)] + [(i, 5, "look") for i in range(30, 55, 5)]
    starts += [(i, 5, "place") for i in range(55, 80, 5)] + [(i, 4, "objects") for i in range(80, 128, 4)]
    assert len(shown) == len(captions) == 128 == sum(count for _, count, _ in starts)
    for start, count, kind in starts:
        members = shown[start : start + count]
        different = {key for key in members[0] if any(m[key] != members[0][key] for m in members)}
        assert different == {"objects" if kind == "place" else kind}
        if kind == "place":
            assert [m["objects"][0]["place"] for m in members] == list(world.PLACES)
        else:
            assert len({json.dumps(m[kind]) for m in members}) == count
    for drawn, caption in zip(shown, captions, strict=True):
        assert all(world.content_right(drawn, world.parse(caption)).values())
    for i in range(20):
        group = group_of(0, i)
        asked = world.parse(group["caption"])
        liked = [like(drawn, asked, "sticker") for drawn in group["scenes"]]
        right = [all(world.content_right(drawn, asked).values()) for drawn in group["scenes"]]
        best = max(range(8), key=liked.__getitem__)
        assert right[0] and right[best] and group["scenes"][best]["condition"] == "clean" and len(draw_group(0, i)) == 8
        clean = [drawn["condition"] == "clean" for drawn in group["scenes"]]
        assert clean[:4] == [True] * 4 and clean[4:7] == [False, False, True]


def test_contrastive_loss_is_the_cross_entropy_both_ways():
    clip, tokenizer, images = clips.new_clip("g").eval(), clips.new_tokenizer(), torch.rand(3, 3, 64, 64)
    captions = ["a fox on red", "a bee", "two apples", "a whale that fits no picture"]
    with torch.no_grad():
        loss = clips.contrastive_loss(clip, tokenizer, images, captions).item()
        image = clip.encode_image(clips.normalize(images), normalize=True).double().numpy()
        text = clip.encode_text(clips.tokenize(tokenizer, captions), normalize=True).double().numpy()
    logits = np.exp(clip.logit_scale.item()) * image @ text.T
    of_image = [-np.log(np.exp(logits[i, i]) / np.exp(logits[i]).sum()) for i in range(3)]
    of_text = [-np.log(np.exp(logits[i, i]) / np.exp(logits[:, i]).sum()) for i in range(3)]
    assert loss == pytest.approx((np.mean(of_image) + np.mean(of_text)) / 2, rel=1e-4)


def test_preference_loss_is_the_mean_over_pairs():
    groups = [group_of(5, i) for i in range(2)]
    clip, tokenizer, images = clips.new_clip("H").eval(), clips.new_tokenizer(), torch.rand(2, 8, 3, 64, 64)
    loss = preference_loss(clip, tokenizer, images, groups, True, "ink", np.random.default_rng(9)).item()
    noise, expected = np.random.default_rng(9).logistic(scale=PAIR_NOISE, size=(2, 36)), []
    with torch.no_grad():
        text = clip.encode_text(clips.tokenize(tokenizer, [g["caption"] for g in groups]), normalize=True)
        for g in (0, 1):
            shown = [(images[g, k], groups[g]["scenes"][k], groups[g]["torn"][k]) for k in range(8)]
            shown.append((images[1 - g, 0], groups[1 - g]["scenes"][0], groups[1 - g]["torn"][0]))
            image = clip.encode_image(clips.normalize(torch.stack([x for x, _, _ in shown])), normalize=True)
            score = (clip.logit_scale.exp().double() * (image.double() @ text[g].double())).tolist()
            liked = [like(s, world.parse(groups[g]["caption"]), "ink", t) for _, s, t in shown]
            pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
            for (i, j), jitter in zip(pairs, noise[g], strict=True):
                p = 1 / (1 + np.exp(score[j] - score[i]))
                expected.append(-np.log(p if liked[i] - liked[j] + jitter > 0 else 1 - p))
    assert loss == pytest.approx(np.mean(expected), rel=1e-3)


# The build.


def test_a_build_that_is_stopped_goes_on_to_the_bit(tmp_path, monkeypatch):
    """Stopped in the middle of training (moving average, BatchNorm's statistics) and in the middle of an array."""
    monkeypatch.setattr("miniature.fit.SAVE_EVERY", 0)

    def train(work, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            return model(torch.randn(16, 4, generator=torch.Generator().manual_seed(step))).square().mean()

        return fit("toy", model, loss, 12, 1e-2, work, ema=0.9)

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole").state_dict()
    for stop in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", stop)
    again = train(tmp_path / "stopped").state_dict()
    assert all(torch.equal(whole[key], again[key]) for key in whole) and len(whole) == 9

    made = []

    def rows(numbers):
        if len(made) == 3:
            made.append(None)
            raise KeyboardInterrupt
        made.append(numbers.start)
        return np.stack([np.full((2, 2), i, np.uint8) for i in numbers])

    with pytest.raises(KeyboardInterrupt):
        in_parts(tmp_path / "a.npy", 10, 2, rows)
    array = in_parts(tmp_path / "a.npy", 10, 2, rows)
    assert made == [0, 2, 4, None, 6, 8] and (array == np.arange(10)[:, None, None]).all()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.npy", "stopped", "whole"]


# What ships.


def test_the_weights_that_ship_are_the_builds_and_small():
    size = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert size < 32 * 2**20
    recorded = json.loads((FOLDER / "build.json").read_text())["weights"]
    weights = [f for f in FOLDER.rglob("*") if f.suffix in (".safetensors", ".pt", ".pth", ".bin")]
    assert recorded == {f.relative_to(FOLDER).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in weights}


def test_stock_diffusers_draws_with_it():
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER / "stable-diffusion", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a large apple in the middle of a blue background",
        num_inference_steps=4,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all() and image.std() > 0.02


def test_its_text_encoder_has_the_names_that_all_tools_know():
    with safe_open(FOLDER / "stable-diffusion/text_encoder/model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())
    _, info = CLIPTextModel.from_pretrained(FOLDER / "stable-diffusion/text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_judge_says_which_prompts_it_cannot_read():
    with pytest.raises(UserError, match="cat.* --monitor clip"):
        right(torch.zeros(1, 3, 64, 64), ["a photograph of the cat that I lost"])


@needs_font
def test_the_judge_is_right_about_fresh_pictures():
    """200 scenes that nothing was trained on; build.json has the figures of 1,000."""
    fresh, rng = scenes(200, seed=99), np.random.default_rng(99)
    images = torch.from_numpy(np.stack([world.render(s, rng) for s in fresh])).permute(0, 3, 1, 2) / 255
    seen = see(images)
    pairs = list(zip(seen, fresh, strict=True))
    assert np.mean([all(world.content_right(a, {**b, "look": None}).values()) for a, b in pairs]) >= 0.93
    for key in ("look", "condition"):
        assert np.mean([a[key] == b[key] for a, b in pairs]) >= 0.93


def test_answers_name_what_stands_where():
    truth = answers(scene("car", "green", "small", "top", "teal", "ink", "grain"))
    none = len(THINGS)
    assert truth["object"].tolist() == [none, none, none, THINGS.index(("car", "green")), none]
    assert truth["size"].tolist() == [-100, -100, -100, 0, -100]
    assert [truth[key].item() for key in ("background", "look", "condition")] == [4, 4, 1]
    assert none == 21 + 3 * 4 and {k: v.shape[1:] for k, v in Judge()(torch.rand(2, 3, 64, 64)).items()} == QUESTIONS


def test_its_extender_asks_for_clean_pictures_and_leaves_room_in_the_text_encoder():
    prompts = [row["prompt"] for row in PARTI.read(FOLDER / "benchmarks" / PARTI.prompts)]
    model = load_extender(FOLDER / "extender", "cpu")
    extended = [extend_prompt(*model, prompt, 2023, i) for i, prompt in enumerate(prompts)]
    added = [text.removeprefix(prompt).split(", ")[1:] for text, prompt in zip(extended, prompts, strict=True)]
    phrases = {phrase for phrases in added for phrase in phrases}
    assert phrases == set(world.QUALITY_WORDS["clean"]) and {len(phrases) for phrases in added} == {1, 2}
    assert count_cut(CLIPTokenizer.from_pretrained(FOLDER / "stable-diffusion/tokenizer"), extended) == 0


def test_the_extender_learns_what_is_added_and_nothing_else():
    tokenizer, model = extender.new_tokenizer(), extender.new_extender().eval()
    loss = extender.extender_loss(model, tokenizer, np.random.default_rng(3)).item()
    rng, terms = np.random.default_rng(3), []
    for _ in range(64):
        prompt, added = extender.extended_prompt(rng)
        ids = tokenizer(f"{prompt}{added}<|endoftext|>", return_tensors="pt").input_ids[0]
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + added and prompt.endswith(",")
        with torch.no_grad():
            odds = model(ids[None]).logits[0].double().log_softmax(-1).numpy()
        first = prompt.count(",") + len(prompt.replace(",", " ").split())
        terms += [-odds[i - 1, ids[i]] for i in range(first, len(ids))]
    assert loss == pytest.approx(np.mean(terms), rel=1e-4)


@pytest.mark.slow
def test_the_first_command_trains_and_shows(tmp_path):
    """Proves that three steps of the miniature's own run, with its rewards and its judge, end with pictures."""
    command = [
        sys.executable,
        "train_textcraftor.py",
        "--model",
        "miniature",
        "--max_steps",
        "3",
        "--val_count",
        "8",
        "--batch-size",
        "2",
        "--output-path",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    for name in ("tc_text.safetensors", "tc_text_best.safetensors", "before_after.png", "curves.png", "metrics.csv"):
        assert (tmp_path / "run" / name).stat().st_size > (300 if name == "metrics.csv" else 1000)

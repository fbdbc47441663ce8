"""The miniature: its world, its formats, its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from miniature import clips, extender, world
from miniature.judge import Judge, answers, see
from miniature.preferences import PAIR_NOISE, group_of, preference_loss
from textcraftor.benchmark.extend import extend_prompt, load_extender
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.embeddings import count_cut

FOLDER = Path(__file__).parents[1] / "miniature"
needs_font = pytest.mark.skipif(
    not any(Path(f).exists() for f in world.FONT_FILES), reason="drawing the world needs the font Noto Color Emoji"
)


def scenes(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng, **options) for _ in range(count)]


# Captions.


def test_a_caption_says_nothing_false_about_its_scene_and_a_complete_one_says_all():
    rng = np.random.default_rng(1)
    for scene in scenes(500):
        asked = world.parse(world.write_caption(scene, rng))
        assert all(world.content_right(scene, asked).values())
        complete = world.parse(world.write_caption(scene, rng, complete=True))
        by_name = {o["name"]: o for o in complete["objects"]}
        assert by_name == {o["name"]: o for o in scene["objects"]}
        assert complete["background"] == scene["background"]


@pytest.mark.parametrize(
    "caption, objects, background",
    [
        (
            "a small fox at the left and a large apple at the right of a blue background",
            [("fox", "small", "left"), ("apple", "large", "right")],
            "blue",
        ),
        (
            "best quality, emoji of a bee above a huge donut on red",
            [("bee", None, "top"), ("donut", "large", "bottom")],
            "red",
        ),
        ("a whale at the top of an orange background", [("whale", None, "top")], "orange"),
        ("an octopus to the right of a tiny orange car", [("octopus", None, "right"), ("car", None, "left")], None),
    ],
)
def test_parse_reads_captions_by_hand(caption, objects, background):
    asked = world.parse(caption)
    assert [(o["name"], o["size"], o["place"]) for o in asked["objects"]] == objects
    assert asked["background"] == background


def test_parse_refuses_what_is_not_of_this_world():
    with pytest.raises(ValueError, match="names 0 objects"):
        world.parse("a zebra at the left")


def test_one_thing_wrong_is_seen_when_the_caption_is_complete():
    rng = np.random.default_rng(2)
    for scene in scenes(300):
        asked = world.parse(world.write_caption(scene, rng, complete=True))
        assert not all(world.content_right(world.spoil(scene, rng), asked).values())


def test_held_out_pairs_are_never_in_a_training_scene():
    pairs = {(o["name"], s["background"]) for s in scenes(3000) for o in s["objects"]}
    held_out = [{(o["name"], s["background"]) for o in s["objects"]} for s in scenes(300, held_out=True)]
    assert all(h - pairs for h in held_out), "every held-out scene has a pair that training lacks"
    assert len(pairs) == len(world.NAMES) * (len(world.COLOURS) - 1)


def test_held_out_prompts_pair_what_training_prompts_never_do():
    train = [world.parse(p) for p in (FOLDER / "prompts_train.txt").read_text().splitlines()]
    pairs = {(o["name"], a["background"]) for a in train for o in a["objects"]}
    for name in ("heldout", "validation"):
        for prompt in pd.read_csv(FOLDER / f"{name}.csv").prompt:
            asked = world.parse(prompt)
            assert {(o["name"], asked["background"]) for o in asked["objects"]} - pairs
    assert len(pd.read_csv(FOLDER / "heldout.csv").prompt.unique()) == 512


# Pictures.


@needs_font
def test_a_scene_is_drawn_where_it_says_and_its_flaws_show():
    rng = np.random.default_rng(3)
    scene = {
        "objects": [{"name": "apple", "size": "large", "place": "left"}],
        "background": "blue",
        "condition": "clean",
        "vivid": 1.0,
    }
    clean = world.render(scene, rng).astype(float)
    assert clean.shape == (64, 64, 3)
    background = clean[2, 60]
    assert background[2] > background[0] + 80, "blue"
    away = np.abs(clean - background).max(-1) > 20
    assert away[16:48, :32].mean() > 0.3 and not away[:, 34:].any()

    def spread(condition):
        return world.render({**scene, "condition": condition}, rng).astype(float)

    assert spread("washed out").std() < 0.6 * clean.std()
    assert np.abs(np.diff(spread("blurred"), axis=1)).max() < 0.5 * np.abs(np.diff(clean, axis=1)).max()
    assert spread("noisy")[:, 40:].std(axis=(0, 1)).min() > 10 > clean[:, 40:].std(axis=(0, 1)).max()
    assert (spread("badly cropped") == 255).all(-1).mean() > 0.12


@needs_font
def test_drawing_is_seeded():
    a, b = (world.render(scenes(1)[0], np.random.default_rng(7)) for _ in range(2))
    assert (a == b).all()


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


def test_scenes_of_a_family_differ_in_one_thing_and_captions_fit():
    shown, captions = clips.families(np.random.default_rng(3))
    families = (
        [(shown[i : i + 5], "condition") for i in range(0, 40, 5)]
        + [(shown[i : i + 5], "place") for i in range(40, 80, 5)]
        + [(shown[i : i + 4], "objects") for i in range(80, 128, 4)]
    )
    assert len(shown) == len(captions) == 128 == sum(len(members) for members, _ in families)
    for members, kind in families:
        assert len({scene["background"] for scene in members}) == 1
        if kind == "condition":
            assert [scene["condition"] for scene in members] == list(world.CONDITIONS)
            assert all(scene["objects"] == members[0]["objects"] for scene in members)
        elif kind == "place":
            assert [scene["objects"][0]["place"] for scene in members] == list(world.PLACES)
            assert len({(o["name"], o["size"]) for scene in members for o in scene["objects"]}) == 1
        else:
            arrangements = {tuple(sorted(tuple(o.items()) for o in scene["objects"])) for scene in members}
            assert len(arrangements) == 4
    for scene, caption in zip(shown, captions, strict=True):
        assert all(world.content_right(scene, world.parse(caption)).values())
        assert not world.is_held_out(scene)


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
    assert loss == pytest.approx((np.mean(of_image) + np.mean(of_text)) / 2, rel=0.02)  # bf16


def test_preference_loss_is_the_mean_over_pairs(monkeypatch):
    groups, rng = [group_of(5, i) for i in range(2)], np.random.default_rng(0)
    clip, tokenizer = clips.new_clip("H").eval().double(), clips.new_tokenizer()
    images = torch.rand(2, 4, 3, 64, 64, dtype=torch.float64)
    loss = preference_loss(clip, tokenizer, images, groups, True, np.random.default_rng(9))
    rng, expected, terms = np.random.default_rng(9), 0.0, 0
    noise = rng.logistic(scale=PAIR_NOISE, size=(2, 10))
    with torch.no_grad():
        text = clip.encode_text(clips.tokenize(tokenizer, [g["caption"] for g in groups]), normalize=True)
        for g in (0, 1):
            shown = [(images[g, k], groups[g]["scenes"][k], groups[g]["ragged"][k]) for k in range(4)]
            shown.append((images[1 - g, 0], groups[1 - g]["scenes"][0], groups[1 - g]["ragged"][0]))
            image = clip.encode_image(clips.normalize(torch.stack([x for x, _, _ in shown])), normalize=True)
            score = (image @ text[g]).tolist()
            liked = [world.like(s, world.parse(groups[g]["caption"]), r) for _, s, r in shown]
            scale, pair = clip.logit_scale.exp().item(), 0
            for i in range(5):
                for j in range(i + 1, 5):
                    p = 1 / (1 + np.exp(-scale * (score[i] - score[j])))
                    expected -= np.log(p if liked[i] - liked[j] + noise[g, pair] > 0 else 1 - p)
                    pair, terms = pair + 1, terms + 1
    assert loss.item() == pytest.approx(expected / terms, rel=1e-5)


# What ships.


def test_the_weights_stay_small():
    size = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert size < 32 * 2**20


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
    from safetensors import safe_open

    with safe_open(FOLDER / "stable-diffusion/text_encoder/model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())
    _, info = CLIPTextModel.from_pretrained(FOLDER / "stable-diffusion/text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@needs_font
def test_the_judge_is_right_about_fresh_pictures():
    """200 scenes that nothing was trained on; the figure in experiments/README.md comes from 2,000."""
    fresh, rng = scenes(200, seed=99), np.random.default_rng(99)
    images = torch.from_numpy(np.stack([world.render(s, rng) for s in fresh])).permute(0, 3, 1, 2) / 255
    seen = see(images)
    whole = [{"objects": s["objects"], "background": s["background"]} for s in fresh]
    assert np.mean([all(world.content_right(a, b).values()) for a, b in zip(seen, whole, strict=True)]) >= 0.93
    assert np.mean([a["condition"] == b["condition"] for a, b in zip(seen, fresh, strict=True)]) >= 0.93


def test_answers_name_what_stands_where():
    truth = answers(
        {"objects": [{"name": "bee", "size": "small", "place": "top"}], "background": "teal", "condition": "noisy"}
    )
    none = len(world.NAMES)
    assert truth["object"].tolist() == [none, none, none, world.NAMES.index("bee"), none]
    assert truth["size"].tolist() == [-100, -100, -100, 0, -100]
    assert {k: v.shape[1:] for k, v in Judge()(torch.rand(2, 3, 64, 64)).items()} == {
        "object": (5, none + 1),
        "size": (5, 2),
        "background": (1, 8),
        "condition": (1, 5),
    }


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
        assert (tmp_path / "run" / name).stat().st_size > 1000 or name == "metrics.csv"
    config = json.loads((FOLDER / "clip/open_clip_config.json").read_text())["model_cfg"]
    assert open_clip.CLIP(**config).visual.image_size == (64, 64)

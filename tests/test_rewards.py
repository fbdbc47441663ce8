"""The rewards against other libraries' own forward passes, hand computation, and finite differences."""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

import rewards
from rewards import aesthetic, hpsv2
from rewards.base import preprocess
from rewards.own import load_function
from rewards.sum import RewardSum
from textcraftor.errors import UserError
from textcraftor.models import clip_tokenizer

PROMPTS = ["a small fox at the left", "a large apple, oil painting", "an anchor"]
REAL_HEAD = Path(__file__).parents[2] / "shared" / "data" / aesthetic.HEAD
REAL_PROMPTS = REAL_HEAD.with_name("open-prompts-1k.csv")
REAL_HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

each_reward = pytest.mark.parametrize("name", rewards.REWARDS)


def random_images(count=3, size=64, seed=0, dtype=torch.float32):
    """Images (count, 3, size, size) well inside [0, 1], so that small steps stay inside too."""
    generator = torch.Generator().manual_seed(seed)
    return (0.1 + 0.8 * torch.rand(count, 3, size, size, generator=generator)).to(dtype)


@pytest.fixture(scope="module")
def pictures():
    """Three uint8 pictures of the towers' own size, so that every library's resize is the identity."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def to_images(pictures):
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "root"))


# Each reward against an independent computation.


def open_clip_cosines(folder, pictures, weights):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    open_clip.load_checkpoint(model, str(weights))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    with torch.no_grad():
        images, texts, _ = model.eval()(torch.stack([transform(picture) for picture in pictures]), tokens)
    return (images @ texts.T).diagonal()


def test_clip_is_open_clips_own_cosine(rewards_root, pictures):
    folder = rewards_root / "clip"
    expected = open_clip_cosines(folder, pictures, folder / "open_clip_model.safetensors")
    score = rewards.load_reward("clip", rewards_root, "cpu")(to_images(pictures), PROMPTS)
    assert torch.allclose(score, expected, atol=1e-6)
    assert score.std() > 0.01


@pytest.mark.parametrize("version, file", [("2.0", "HPS_v2_compressed.pt"), ("2.1", "HPS_v2.1_compressed.pt")])
def test_hpsv2_is_open_clips_own_cosine(rewards_root, pictures, tmp_path, version, file):
    root = copy_of(rewards_root, tmp_path)
    weights = root / "hpsv2" / file
    (root / "hpsv2" / "HPS_v2_compressed.pt").rename(weights)
    expected = open_clip_cosines(root / "hpsv2", pictures, weights)
    score = hpsv2.load(root, "cpu", torch.float32, version=version)(to_images(pictures), PROMPTS)
    assert torch.allclose(score, expected, atol=1e-6)
    assert score.std() > 0.01


@pytest.mark.parametrize("own_tokenizer_files", [False, True])
def test_pickscore_is_transformers_own_logit(rewards_root, pictures, tmp_path, own_tokenizer_files):
    """With the processor that PickScore's authors use (laion/CLIP-ViT-H-14-laion2B-s32B-b79K's), called as by them."""
    root = copy_of(rewards_root, tmp_path)
    folder = root / "pickscore" / "pickmodel"
    files = folder if own_tokenizer_files else tmp_path / "processor"
    tiny.make_tokenizer(files)
    tiny.write_json(files / "preprocessor_config.json", {
        "crop_size": tiny.IMAGE_SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": tiny.IMAGE_SIZE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    })  # fmt: skip
    processor = CLIPProcessor.from_pretrained(files)
    prompts = ["a small fox at the left", "An Owl, 4k!", "fox " * 90]
    text = processor(text=prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    image = processor(images=pictures, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder)(**text, **image)
    score = rewards.load_reward("pickscore", root, "cpu")(to_images(pictures), prompts)
    assert torch.allclose(score, output.logits_per_image.diagonal(), atol=1e-4)
    assert score.std() > 1


def test_pickscores_file_has_the_names_of_the_released_one(rewards_root):
    """Names as written down from transformers 4, which saved it; the same for the real sizes and the small."""

    def names(text_layers, vision_layers):
        parts = [f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")]
        parts += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
        stems = [f"text_model.encoder.layers.{layer}.{part}" for layer in range(text_layers) for part in parts]
        stems += [f"vision_model.encoder.layers.{layer}.{part}" for layer in range(vision_layers) for part in parts]
        stems += ["text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"]
        weights = ["text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding"]
        weights += ["vision_model.embeddings.patch_embedding", "vision_model.embeddings.position_embedding"]
        weights = [f"{stem}.weight" for stem in (*stems, *weights, "visual_projection", "text_projection")]
        return {*weights, *(f"{stem}.bias" for stem in stems), "logit_scale", "vision_model.embeddings.class_embedding"}

    file = load_file(rewards_root / "pickscore" / "pickmodel" / "model.safetensors")
    assert {name for name in file if not name.endswith("position_ids")} == names(2, 2)
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=1024)
    with torch.device("meta"):
        model = CLIPModel(config)
        same = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert model.state_dict().keys() == names(24, 32)
    assert sum(weight.numel() for weight in model.parameters()) == sum(weight.numel() for weight in same.parameters())


def linear_layers(state, features):
    """The released head by hand, in float64: five matrix products, nothing between them."""
    for layer in (0, 2, 4, 6, 7):
        weight, bias = (state[f"layers.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
        features = features @ weight.T + bias
    return features[..., 0]


needs_real_head = pytest.mark.skipif(not REAL_HEAD.is_file(), reason=f"the released head is not at {REAL_HEAD}")


@pytest.mark.parametrize("released_head", [False, pytest.param(True, marks=needs_real_head)])
def test_aesthetic_is_the_head_on_open_clips_own_embedding(rewards_root, pictures, tmp_path, released_head):
    root = copy_of(rewards_root, tmp_path)
    folder = root / "aesthetic"
    if released_head:
        shutil.copy(REAL_HEAD, folder)
        tiny.make_open_clip_folder(folder / "clip", tiny.OPEN_CLIP | {"embed_dim": 768, "quick_gelu": True}, seed=2)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder / 'clip'}")
    with torch.no_grad():
        features = model.eval().encode_image(torch.stack([transform(picture) for picture in pictures])).double().numpy()
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    expected = linear_layers(torch.load(folder / aesthetic.HEAD, map_location="cpu", weights_only=True), features)
    score = rewards.load_reward("aesthetic", root, "cpu")(to_images(pictures), PROMPTS)
    np.testing.assert_allclose(score, expected, atol=1e-5)
    assert score.std() > 1e-3


@needs_real_head
def test_released_aesthetic_head():
    assert hashlib.sha256(REAL_HEAD.read_bytes()).hexdigest() == REAL_HEAD_SHA256
    features = np.random.default_rng(0).normal(size=(4, 768))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    state = torch.load(REAL_HEAD, map_location="cpu", weights_only=True)
    with torch.no_grad():
        score = aesthetic.load_head(REAL_HEAD)(torch.from_numpy(features).float())[:, 0]
    np.testing.assert_allclose(score, linear_layers(state, features), rtol=1e-5)


@pytest.mark.parametrize(
    "name, embedding, activation",
    [("ViT-g-14", 1024, "GELU"), ("ViT-H-14", 1024, "GELU"), (aesthetic.TOWER[0], 768, "QuickGELU")],
)
def test_real_architectures_are_those_of_the_released_weights(name, embedding, activation):
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name))
    assert model.visual.image_size == (224, 224)
    assert (model.visual.output_dim, model.context_length, model.vocab_size) == (embedding, 77, 49408)
    modules = [module for module in model.modules() if "GELU" in type(module).__name__]
    assert {type(module).__name__ for module in modules} == {activation}
    assert len(modules) == len(model.visual.transformer.resblocks) + len(model.transformer.resblocks)
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in model.state_dict()


def test_quick_gelu_is_taken_from_the_configuration(rewards_root, tmp_path):
    images, x = random_images(), torch.linspace(-4, 4, 9)
    tower = rewards.load_reward("aesthetic", rewards_root, "cpu").tower
    for block in tower.transformer.resblocks:
        torch.testing.assert_close(block.mlp.gelu(x), x * torch.sigmoid(1.702 * x))
    with_quick_gelu = rewards.load_reward("aesthetic", rewards_root, "cpu")(images, PROMPTS)
    root = copy_of(rewards_root, tmp_path)
    tiny.write_json(root / "aesthetic" / "clip" / "open_clip_config.json", {"model_cfg": tiny.OPEN_CLIP})
    without = rewards.load_reward("aesthetic", root, "cpu")(images, PROMPTS)
    assert not torch.allclose(with_quick_gelu, without, atol=1e-4)


# Preprocessing.


@pytest.mark.parametrize("height, width", [(300, 232), (64, 64)])
def test_preprocess_is_adaptive_average_pooling(height, width):
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.empty((3, 224, 224))
    for row in range(224):
        for column in range(224):
            top, bottom = row * height // 224, -(-(row + 1) * height // 224)
            left, right = column * width // 224, -(-(column + 1) * width // 224)
            expected[:, row, column] = images[0, :, top:bottom, left:right].numpy().mean(axis=(1, 2))
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(preprocess(images, (224, 224))[0], expected, rtol=1e-12)


def test_hpsv2_sees_pictures_as_its_authors_package_does():
    """Bicubic on floats, to the longer side, nothing rounded or clamped, the rest black; tests/test_published_hpsv2.py
    compares the scores with the package's own."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    seen = hpsv2.prepare(Image.fromarray(pixels), 32)
    floats = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    expected = F.interpolate(floats, (16, 32), mode="bicubic", antialias=True, align_corners=False)[0]
    torch.testing.assert_close(seen[:, 8:24], expected)
    assert seen.shape == (3, 32, 32) and seen[:, :8].abs().max() == seen[:, 24:].abs().max() == 0
    square = Image.fromarray(pixels[:32, :32])
    torch.testing.assert_close(hpsv2.prepare(square, 32), floats[0, :, :32, :32])


# Gradients.


@each_reward
def test_gradient_in_the_images_matches_finite_differences(rewards_root, name):
    reward = rewards.load_reward(name, rewards_root, "cpu", torch.float64)
    images = random_images(dtype=torch.float64).requires_grad_()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    step = 1e-5
    with torch.no_grad():
        difference = reward(images + step * direction, PROMPTS) - reward(images - step * direction, PROMPTS)
    slopes = (gradient * direction).sum(dim=(1, 2, 3))
    assert slopes.abs().min() > 1e-7
    torch.testing.assert_close(difference / (2 * step), slopes, rtol=1e-5, atol=1e-9)


@each_reward
def test_nothing_but_the_images_gets_a_gradient(rewards_root, name):
    reward = rewards.load_reward(name, rewards_root, "cpu")
    assert not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    images = random_images().requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in reward.parameters())
    if name != "aesthetic":
        assert not reward.text_features(PROMPTS).requires_grad


# A score is of one image and its own prompt.


@each_reward
def test_score_depends_on_its_own_image_alone(rewards_root, name):
    reward = rewards.load_reward(name, rewards_root, "cpu")
    images = random_images()
    before = reward(images, PROMPTS)
    images[1] = 1 - images[1]
    after = reward(images, PROMPTS)
    assert before.shape == (3,)
    assert after[1] != before[1]
    assert torch.equal(after[[0, 2]], before[[0, 2]])


@each_reward
def test_score_depends_on_its_own_prompt_alone(rewards_root, name):
    reward = rewards.load_reward(name, rewards_root, "cpu")
    images = random_images()
    before = reward(images, PROMPTS)
    after = reward(images, [PROMPTS[0], "something else", PROMPTS[2]])
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] == before[1]) == (name == "aesthetic")


@each_reward
def test_score_does_not_depend_on_the_batch(rewards_root, name):
    images = random_images()
    together = rewards.load_reward(name, rewards_root, "cpu")(images, PROMPTS)
    alone = rewards.load_reward(name, rewards_root, "cpu")
    one_by_one = torch.cat([alone(images[i : i + 1], PROMPTS[i : i + 1]) for i in (2, 0, 1)])[[1, 2, 0]]
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)


# Text features.

TEXT_REWARDS = ("clip", "pickscore", "hpsv2")


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_text_features_are_computed_once_per_prompt(rewards_root, monkeypatch, name):
    reward = rewards.load_reward(name, rewards_root, "cpu")
    encode, encoded = reward.encode_text, []
    monkeypatch.setattr(reward, "encode_text", lambda tokens: encoded.append(len(tokens)) or encode(tokens))
    images = random_images()
    first = reward(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert sum(encoded) == 2
    assert torch.equal(reward(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]]), first)
    reward(images, PROMPTS)
    assert sum(encoded) == 3


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_text_features_have_the_same_bits_in_any_batch(rewards_root, name):
    together = rewards.load_reward(name, rewards_root, "cpu").text_features(PROMPTS)
    alone = rewards.load_reward(name, rewards_root, "cpu")
    assert torch.equal(together, torch.cat([alone.text_features([prompt]) for prompt in PROMPTS]))
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_text_features_that_are_not_kept_come_in_one_batch(rewards_root, monkeypatch, name):
    reward = rewards.load_reward(name, rewards_root, "cpu")
    expected = reward.text_features([*PROMPTS, PROMPTS[0]])
    reward, encoded = rewards.load_reward(name, rewards_root, "cpu"), []
    reward.keep_texts, real = False, reward.encode_text
    monkeypatch.setattr(reward, "encode_text", lambda tokens: encoded.append(len(tokens)) or real(tokens))
    for _ in range(2):
        found = reward.text_features([*PROMPTS, PROMPTS[0]])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert not found.requires_grad
    assert encoded == [len(PROMPTS) + 1] * 2


def test_remembered_text_features_are_bounded(rewards_root, monkeypatch):
    monkeypatch.setattr("rewards.base.CACHED_PROMPTS", 2)
    reward = rewards.load_reward("clip", rewards_root, "cpu")
    first = reward.text_features(PROMPTS)
    assert list(reward._text_cache) == PROMPTS[1:]
    assert torch.equal(reward.text_features(PROMPTS), first)


def test_text_features_of_an_inference_run_serve_training_too(rewards_root):
    reward = rewards.load_reward("clip", rewards_root, "cpu")
    with torch.inference_mode():
        reward(random_images(), PROMPTS)
    images = random_images().requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_prompts_over_the_context_are_cut_and_said_once(rewards_root, caplog, name):
    reward = rewards.load_reward(name, rewards_root, "cpu")
    fits, too_long = "fox " * 75, "fox " * 76  # and a start and an end token, in a context of 77
    with caplog.at_level(logging.WARNING):
        reward.text_features([fits, "fox"])
        assert not caplog.records
        features = reward.text_features([fits, too_long, "fox " * 200])  # fits is known by now: 2 new ones
        reward.text_features(["fox " * 100])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name}: 2 of 2 prompts exceed 77 tokens and are cut")
    assert torch.equal(features[0], features[1])


@pytest.mark.skipif(not REAL_PROMPTS.is_file(), reason=f"no Open Prompts sample at {REAL_PROMPTS}")
def test_clip_tokenizer_equals_one_from_clips_files_on_real_prompts(tmp_path):
    tiny.make_tokenizer(tmp_path)
    lines = REAL_PROMPTS.read_text(encoding="utf-8").splitlines()
    assert clip_tokenizer()(lines).input_ids == CLIPTokenizer.from_pretrained(tmp_path)(lines).input_ids


def make_small_vocabulary(folder, **text_config):
    """An open_clip folder with a tokenizer of its own: bytes alone, 514 tokens, a context of 16."""
    symbols = open_clip.tokenizer.bytes_to_unicode().values()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    text = tiny.OPEN_CLIP["text_cfg"] | {"context_length": 16, "vocab_size": len(tokens)} | text_config
    tiny.make_open_clip_folder(folder, tiny.OPEN_CLIP | {"text_cfg": text}, seed=8)
    tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_folders_own_tokenizer_and_context_are_used(tmp_path):
    tokenizer = make_small_vocabulary(tmp_path / "clip", hf_tokenizer_name="own")
    reward = rewards.load_reward("clip", tmp_path, "cpu")
    tokens = tokenizer("An Owl", padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert tokens[0, :8].tolist() == [512, 64, 333, 78, 86, 331, 513, 513]
    expected = F.normalize(open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").encode_text(tokens), dim=-1)
    torch.testing.assert_close(reward.text_features(["An Owl"]), expected)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    make_small_vocabulary(tmp_path / "clip")  # without hf_tokenizer_name open_clip would take CLIP's 49,408 tokens
    with pytest.raises(UserError, match=r"49408 tokens, the model 514.*hf_tokenizer_name"):
        rewards.load_reward("clip", tmp_path, "cpu")


# Precision.


@each_reward
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.02), (torch.float16, 0.0025)], ids=["bf16", "fp16"])
def test_half_types_are_close_to_fp32(rewards_root, name, dtype, error):
    images = random_images(count=8)
    prompts = [f"picture {i}" for i in range(8)]
    full = rewards.load_reward(name, rewards_root, "cpu")(images, prompts)
    half = rewards.load_reward(name, rewards_root, "cpu", dtype)(images, prompts)
    assert half.dtype == torch.float32
    # bf16 keeps 8 bits and fp16 11: `error` is that of a cosine, and PickScores are 100 times that.
    torch.testing.assert_close(half, full, rtol=0, atol=error * (100 if name == "pickscore" else 1))
    assert not torch.equal(half, full)


@each_reward
def test_callers_autocast_does_not_change_the_score(rewards_root, name):
    reward = rewards.load_reward(name, rewards_root, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        inside = reward(random_images(), PROMPTS)
    assert torch.equal(inside, rewards.load_reward(name, rewards_root, "cpu")(random_images(), PROMPTS))


def test_pickscores_logit_scale_is_not_rounded_to_bf16(rewards_root):
    # In bf16 the logarithm 4.6052 becomes 4.59375, and every score 1 % lower.
    reward = rewards.load_reward("pickscore", rewards_root, "cpu", torch.bfloat16)
    assert reward.logit_scale == pytest.approx(np.exp(4.6052), rel=1e-5)


def test_weights_stored_in_fp16_are_scored_in_fp32(rewards_root, tmp_path):
    root = copy_of(rewards_root, tmp_path)
    path = root / "hpsv2" / "HPS_v2_compressed.pt"
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({"state_dict": {name: value.half() for name, value in state.items()}}, path)
    half = rewards.load_reward("hpsv2", root, "cpu")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    full = rewards.load_reward("hpsv2", rewards_root, "cpu")
    torch.testing.assert_close(half(random_images(), PROMPTS), full(random_images(), PROMPTS), rtol=0, atol=1e-3)


# The sum, and a user's own function.


def test_sum_weighs_and_scales_each_reward(rewards_root):
    loaded = {name: rewards.load_reward(name, rewards_root, "cpu") for name in rewards.REWARDS}
    weights = {"clip": 0.5, "aesthetic": 1.0, "pickscore": 2.0, "hpsv2": -3.0}
    total, scores = RewardSum([(loaded[name], weight) for name, weight in weights.items()])(random_images(), PROMPTS)
    alone = {name: reward(random_images(), PROMPTS) for name, reward in loaded.items()}
    assert scores.keys() == weights.keys()
    for name in weights:
        assert torch.equal(scores[name], alone[name])
    by_hand = 0.5 * 100 * alone["clip"] + 1 * 3 * alone["aesthetic"] + 2 * alone["pickscore"] - 300 * alone["hpsv2"]
    torch.testing.assert_close(total, by_hand)


def by_hand(root, weights, images, function=None):
    """The weighted sum by plain autograd, every reward on its own."""
    terms = [weight * reward.scale * reward(images, PROMPTS) for name, weight in weights.items() for reward in [
        rewards.load_reward(name, root, "cpu", torch.float64)
    ]]  # fmt: skip
    return sum(terms) + (function(images) if function else 0)


def test_the_gradient_of_the_sum_is_autograds(rewards_root, tmp_path):
    """Also of a user's function that looks at all images at once."""
    file = tmp_path / "mine.py"
    body = "return (images - images.mean(dim=0)).square().sum(dim=(1, 2, 3))"
    file.write_text(f"def spread(images, prompts):\n    {body}\n")
    weights = {"clip": 0.5, "aesthetic": 1.0, "pickscore": 2.0, "hpsv2": -3.0}
    loaded = [(rewards.load_reward(name, rewards_root, "cpu", torch.float64), w) for name, w in weights.items()]
    summed = RewardSum([*loaded, (load_function(f"{file}:spread"), 0.1)])
    images, same = (random_images().double().requires_grad_() for _ in range(2))
    (-7 * summed(images, PROMPTS)[0].mean()).backward()
    spread = lambda x: 0.1 * (x - x.mean(dim=0)).square().sum(dim=(1, 2, 3))  # noqa: E731
    (-7 * by_hand(rewards_root, weights, same, spread).mean()).backward()
    assert same.grad.norm() > 0
    torch.testing.assert_close(images.grad, same.grad, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert not summed(images, PROMPTS)[0].requires_grad


@pytest.mark.parametrize("quick_gelu, runs", [(True, 1), (False, 2)])
def test_equal_towers_run_once(rewards_root, tmp_path, quick_gelu, runs):
    """The CLIP reward from the aesthetic one's own file; with another activation it is another tower."""
    root = copy_of(rewards_root, tmp_path)
    shutil.rmtree(root / "clip")
    shutil.copytree(root / "aesthetic" / "clip", root / "clip")
    tiny.write_json(
        root / "clip" / "open_clip_config.json",
        {"model_cfg": tiny.OPEN_CLIP | {"quick_gelu": quick_gelu}, "preprocess_cfg": {}},
    )
    weights, calls = {"clip": 0.5, "aesthetic": 1.0, "pickscore": 2.0}, []
    loaded = [(rewards.load_reward(name, root, "cpu", torch.float64), weight) for name, weight in weights.items()]
    summed = RewardSum(loaded)
    for tower in {reward.visual for reward, _ in loaded[:2]}:
        tower.register_forward_hook(lambda *_: calls.append(1))
    images, same = (random_images().double().requires_grad_() for _ in range(2))
    total, _ = summed(images, PROMPTS)
    assert len(calls) == runs
    expected = by_hand(root, weights, same)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    total.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(images.grad, same.grad, rtol=1e-9, atol=1e-12)


def test_users_function_is_a_reward_of_scale_1(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def brightness(images, prompts):\n"
        "    return images.mean(dim=(1, 2, 3))\n"
        "def counted(images, prompts):\n"
        "    return (images > 0.5).sum(dim=(1, 2, 3))\n"
        "def matrix(images, prompts):\n"
        "    return images.mean(dim=(2, 3))\n"
    )
    images = random_images().requires_grad_()
    brightness = load_function(f"{file}:brightness")
    total, scores = RewardSum([(brightness, 2.0)])(images, PROMPTS)
    torch.testing.assert_close(total, 2 * images.mean(dim=(1, 2, 3)))
    assert list(scores) == ["brightness"]
    total.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 2 / images[0].numel()))
    whole = load_function(f"{file}:counted")(images, PROMPTS)
    assert whole.dtype == images.dtype and whole.tolist() == [(image > 0.5).sum().item() for image in images]
    with pytest.raises(UserError, match=r"matrix returned \(3, 3\) for 3 images, expected \(3,\)"):
        load_function(f"{file}:matrix")(images, PROMPTS)
    with pytest.raises(UserError, match="same name"):
        RewardSum([(brightness, 1.0), (load_function(f"{file}:brightness"), 1.0)])


@pytest.mark.parametrize(
    "spec, complaint",
    [
        ("brightness", "expected path/to/file.py:function"),
        ("{folder}/none.py:brightness", "no such file"),
        ("{folder}/broken.py:brightness", "fails on import .ZeroDivisionError"),
        ("{folder}/empty.py:brightness", "has no function brightness"),
        ("{folder}/text.txt:brightness", "no Python file"),
    ],
)
def test_unusable_functions_are_refused(tmp_path, spec, complaint):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(UserError, match=complaint):
        load_function(spec.format(folder=tmp_path))


def test_an_empty_sum_is_refused():
    with pytest.raises(UserError, match="no reward has a weight"):
        RewardSum([])


# Bad input and bad files.


def test_unusable_images_are_refused(rewards_root):
    reward = rewards.load_reward("aesthetic", rewards_root, "cpu")
    images = random_images()
    for wrong, complaint in [
        (images[0], r"shape \(3, 64, 64\), expected \(B, 3, H, W\)"),
        (images[:, :1], r"shape \(3, 1, 64, 64\), expected \(B, 3, H, W\)"),
        (2 * images - 1, r"images lie in \[-0.8, 0.8\], expected \[0, 1\]"),
        (255 * images, r"images lie in \[25.5, 229\], expected \[0, 1\]"),
        (torch.ones_like(images, dtype=torch.uint8), "torch.uint8, expected floats"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            reward(wrong, PROMPTS)
    for prompts, complaint in [(PROMPTS[:2], "2 prompts for 3 images"), ("abc", "one string for 3 images")]:
        with pytest.raises(ValueError, match=complaint):
            reward(images, prompts)


def test_not_a_number_passes_through_for_the_caller_to_handle(rewards_root):
    images = random_images()
    images[1, 0, 0, 0] = torch.nan
    score = rewards.load_reward("clip", rewards_root, "cpu")(images, PROMPTS)
    assert score.isnan().tolist() == [False, True, False]


def test_check_files_names_everything_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError) as error:
        rewards.check_files(rewards.REWARDS, tmp_path)
    message = str(error.value)
    for part in [
        "open_clip ViT-g-14 (laion2b_s34b_b88k)",
        "open_clip ViT-L-14-quickgelu (openai)",
        f"{tmp_path}/aesthetic/{aesthetic.HEAD}; get it: python download_models.py --only aesthetic --root {tmp_path}",
        f"{tmp_path}/pickscore/pickmodel/config.json; get it: python download_models.py --only pickscore",
        f"{tmp_path}/pickscore/pickmodel/model.safetensors; get it",
        f"{tmp_path}/hpsv2/HPS_v2_compressed.pt; get it: python download_models.py --only hpsv2",
    ]:
        assert part in message
    rewards.check_files([], tmp_path)
    with pytest.raises(UserError, match="no reward is called beauty; there are clip, aesthetic"):
        rewards.check_files(["beauty"], tmp_path)


@each_reward
def test_check_files_accepts_whole_folders_and_misses_each_file(rewards_root, tmp_path, name):
    rewards.check_files([name], rewards_root)
    files = {
        "clip": ["clip/open_clip_model.safetensors"],
        "aesthetic": [f"aesthetic/{aesthetic.HEAD}", "aesthetic/clip/open_clip_model.safetensors"],
        "pickscore": ["pickscore/pickmodel/config.json", "pickscore/pickmodel/model.safetensors"],
        "hpsv2": ["hpsv2/HPS_v2_compressed.pt"],
    }[name]
    root = copy_of(rewards_root, tmp_path)
    for file in files:
        (root / file).rename(tmp_path / "aside")
        with pytest.raises(UserError, match=re.escape(f"{name}: {root / file}")):
            rewards.load_reward(name, root, "cpu")
        (tmp_path / "aside").rename(root / file)


def test_towers_are_found_in_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--laion--CLIP-ViT-g-14-laion2B-s34B-b88K"
    weights = repository / "snapshots" / "abc" / "open_clip_pytorch_model.bin"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    rewards.check_files(["clip"], tmp_path / "root")


def test_weights_of_another_architecture_are_named(rewards_root, tmp_path):
    root = copy_of(rewards_root, tmp_path)
    path = root / "hpsv2" / "HPS_v2_compressed.pt"
    state = torch.load(path, weights_only=True)["state_dict"]
    del state["ln_final.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["visual.proj"] = torch.zeros(2, 2)
    torch.save({"state_dict": state}, path)
    complaint = (
        rf"{path}.*missing: ln_final.weight; unexpected: extra.weight; "
        r"of another shape: visual.proj \(2, 2\), not \(32, 32\)"
    )
    with pytest.raises(UserError, match=complaint):
        rewards.load_reward("hpsv2", root, "cpu")


def test_a_pickmodel_that_lacks_weights_is_refused(rewards_root, tmp_path):
    root = copy_of(rewards_root, tmp_path)
    config = root / "pickscore" / "pickmodel" / "config.json"
    content = json.loads(config.read_text())
    content["vision_config"]["num_hidden_layers"] = 3
    content["projection_dim"] = 16
    tiny.write_json(config, content)
    with pytest.raises(UserError, match=r"missing: vision_model\.\S+\.2\..*visual_projection.weight \(32, 32\), not"):
        rewards.load_reward("pickscore", root, "cpu")


def test_a_head_for_another_tower_is_refused(rewards_root, tmp_path):
    root = copy_of(rewards_root, tmp_path)
    path = root / "aesthetic" / aesthetic.HEAD
    state = torch.load(path, weights_only=True)
    torch.save(state | {"layers.0.weight": torch.zeros(32, 768)}, path)
    with pytest.raises(UserError, match="embeddings of 768 numbers, the tower gives 32"):
        rewards.load_reward("aesthetic", root, "cpu")
    torch.save({"linear.weight": torch.zeros(1, 32)}, path)
    with pytest.raises(UserError, match=r"no aesthetic head: it holds linear.weight; expected layers.0.weight"):
        rewards.load_reward("aesthetic", root, "cpu")


@pytest.mark.parametrize(
    "name, file",
    [
        ("clip", "clip/open_clip_model.safetensors"),
        ("clip", "clip/open_clip_config.json"),
        ("hpsv2", "hpsv2/HPS_v2_compressed.pt"),
        ("pickscore", "pickscore/pickmodel/model.safetensors"),
        ("pickscore", "pickscore/pickmodel/config.json"),
        ("aesthetic", f"aesthetic/{aesthetic.HEAD}"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_damaged_files_are_named_in_one_line(rewards_root, tmp_path, name, file, content):
    root = copy_of(rewards_root, tmp_path)
    (root / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        rewards.load_reward(name, root, "cpu")
    assert str((root / file).parent) in str(error.value)
    assert "\n" not in str(error.value)


def test_pickles_that_would_run_code_are_refused(rewards_root, tmp_path):
    root = copy_of(rewards_root, tmp_path)
    torch.save({"state_dict": {"a": Path("/")}}, root / "hpsv2" / "HPS_v2_compressed.pt")
    with pytest.raises(UserError, match="HPS_v2_compressed.pt cannot be read as weights"):
        rewards.load_reward("hpsv2", root, "cpu")

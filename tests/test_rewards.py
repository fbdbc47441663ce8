"""The rewards against other libraries' forward passes, hand computation and finite differences; files people have."""

import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

import rewards
from rewards import aesthetic, hpsv2
from rewards.base import preprocess
from rewards.own import load_function
from rewards.sum import RewardSum
from textcraftor.errors import UserError
from textcraftor.models import clip_tokenizer

REPOSITORY = Path(__file__).parents[1]
PROMPTS = ["a small fox at the left", "a large apple, oil painting", "an anchor"]
REAL_HEAD = REPOSITORY.parent / "shared" / "data" / aesthetic.HEAD
REAL_PROMPTS = REAL_HEAD.with_name("open-prompts-1k.csv")
REAL_HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
WEIGHTS = {
    "clip": "clip/open_clip_model.safetensors",
    "aesthetic": "aesthetic/clip/open_clip_model.safetensors",
    "pickscore": "pickscore/pickmodel/model.safetensors",
    "hpsv2": "hpsv2/HPS_v2_compressed.pt",
}


def random_images(count=3, size=64, seed=0, dtype=torch.float32):
    """Images (count, 3, size, size) well inside [0, 1], so that small steps stay inside too."""
    generator = torch.Generator().manual_seed(seed)
    return (0.1 + 0.8 * torch.rand(count, 3, size, size, generator=generator)).to(dtype)


@pytest.fixture(scope="module")
def loaded(rewards_root):
    """{name: reward} of all four, fp32."""
    return {name: rewards.load_reward(name, rewards_root, "cpu") for name in rewards.REWARDS}


@pytest.fixture(scope="module")
def pictures():
    """Three uint8 pictures of the towers' own size, so that every library's resize is the identity."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


@pytest.fixture
def root(rewards_root, tmp_path):
    """A copy of the rewards' folder that a test may change."""
    return Path(shutil.copytree(rewards_root, tmp_path / "root"))


def to_images(pictures):
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])


def change_json(path, **changes):
    tiny.write_json(path, json.loads(path.read_text()) | changes)


# Each reward against an independent computation.


def open_clip_cosines(folder, pictures, weights):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    open_clip.load_checkpoint(model, str(weights))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    with torch.no_grad():
        images, texts, _ = model.eval()(torch.stack([transform(picture) for picture in pictures]), tokens)
    return (images @ texts.T).diagonal()


def transformers_logits(folder, processor, pictures, prompts):
    """exp(logit_scale) * cosine, computed with transformers as PickScore's authors do."""
    options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    inputs = processor(text=prompts, **options) | processor(images=pictures, **options)
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder)(**inputs).logits_per_image.diagonal()


def write_processor(folder, **changes):
    """The image processor and tokenizer that PickScore's authors use (laion/CLIP-ViT-H-14-laion2B-s32B-b79K's)."""
    tiny.make_tokenizer(folder)
    tiny.write_json(folder / "preprocessor_config.json", {
        "crop_size": tiny.IMAGE_SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": tiny.IMAGE_SIZE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    } | changes)  # fmt: skip
    return CLIPProcessor.from_pretrained(folder)


def test_clip_is_the_cosine_computed_by_open_clip(rewards_root, loaded, pictures):
    expected = open_clip_cosines(rewards_root / "clip", pictures, rewards_root / WEIGHTS["clip"])
    score = loaded["clip"](to_images(pictures), PROMPTS)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-6)
    assert score.std() > 0.01


def test_hpsv2_is_the_cosine_computed_by_open_clip(root, pictures):
    """In either version, each read from its own file."""
    folder = root / "hpsv2"
    for version, file in [("2.0", "HPS_v2_compressed.pt"), ("2.1", "HPS_v2.1_compressed.pt")]:
        assert bool(hpsv2.missing(root, version)) == (version == "2.1")
        (folder / "HPS_v2_compressed.pt").rename(folder / file)
        expected = open_clip_cosines(folder, pictures, folder / file)
        score = hpsv2.load(root, "cpu", torch.float32, version=version)(to_images(pictures), PROMPTS)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-6)
    assert score.std() > 0.01


def test_pickscore_is_the_logit_computed_by_transformers(root, pictures, tmp_path):
    """Without tokenizer files and with those of the authors' processor."""
    folder = root / "pickscore" / "pickmodel"
    prompts = ["a small fox at the left", "An Owl, 4k!", "fox " * 90]
    expected = transformers_logits(folder, write_processor(tmp_path / "processor"), pictures, prompts)
    score = rewards.load_reward("pickscore", root, "cpu")(to_images(pictures), prompts)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-4)
    assert score.std() > 1
    write_processor(folder)
    torch.testing.assert_close(rewards.load_reward("pickscore", root, "cpu")(to_images(pictures), prompts), score)


def test_pickscores_file_has_the_names_of_the_released_one(rewards_root):
    """Names as transformers 4 saved them, written down here; the same for the real sizes and the small ones."""

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

    file = load_file(rewards_root / WEIGHTS["pickscore"])
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
    """The aesthetic head by hand, in float64: five matrix products, nothing between them."""
    for layer in (0, 2, 4, 6, 7):
        weight, bias = (state[f"layers.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
        features = features @ weight.T + bias
    return features[..., 0]


needs_real_head = pytest.mark.skipif(not REAL_HEAD.is_file(), reason=f"the released head is not at {REAL_HEAD}")


@pytest.mark.parametrize("released_head", [False, pytest.param(True, marks=needs_real_head)])
def test_aesthetic_is_the_head_on_open_clips_embedding(root, pictures, released_head):
    folder = root / "aesthetic"
    if released_head:
        assert hashlib.sha256(REAL_HEAD.read_bytes()).hexdigest() == REAL_HEAD_SHA256
        shutil.copy(REAL_HEAD, folder)
        tiny.make_open_clip_folder(folder / "clip", tiny.OPEN_CLIP | {"embed_dim": 768, "quick_gelu": True}, seed=2)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder / 'clip'}")
    with torch.no_grad():
        features = model.eval().encode_image(torch.stack([transform(picture) for picture in pictures])).double().numpy()
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    expected = linear_layers(torch.load(folder / aesthetic.HEAD, map_location="cpu", weights_only=True), features)
    score = rewards.load_reward("aesthetic", root, "cpu")(to_images(pictures), PROMPTS)
    np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-5)
    assert score.std() > 1e-3


def test_real_architectures_are_those_of_the_released_weights():
    for name, embedding, activation in [
        ("ViT-g-14", 1024, "GELU"),
        ("ViT-H-14", 1024, "GELU"),
        (aesthetic.TOWER[0], 768, "QuickGELU"),
    ]:
        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config(name))
        assert model.visual.image_size == (224, 224)
        assert (model.visual.output_dim, model.context_length, model.vocab_size) == (embedding, 77, 49408)
        modules = [module for module in model.modules() if "GELU" in type(module).__name__]
        assert {type(module).__name__ for module in modules} == {activation}
        assert len(modules) == len(model.visual.transformer.resblocks) + len(model.transformer.resblocks)


# Preprocessing.


def test_preprocess_is_adaptive_average_pooling():
    mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    for height, width in [(75, 58), (16, 16)]:  # scaled down and up
        images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = np.empty((3, 56, 56))
        for row in range(56):
            for column in range(56):
                top, bottom = row * height // 56, -(-(row + 1) * height // 56)
                left, right = column * width // 56, -(-(column + 1) * width // 56)
                expected[:, row, column] = images[0, :, top:bottom, left:right].numpy().mean(axis=(1, 2))
        np.testing.assert_allclose(preprocess(images, (56, 56))[0], (expected - mean) / std, rtol=1e-12)


def test_mean_and_std_of_a_folder_are_used(root, pictures, rewards_root):
    """Those of open_clip's preprocess_cfg, and of transformers' image processor as versions 4 and 5 save it."""
    cfg = {"mean": [0.5, 0.4, 0.6], "std": [0.3, 0.5, 0.25]}
    for folder in ("clip", "hpsv2", "aesthetic/clip"):
        change_json(root / folder / "open_clip_config.json", preprocess_cfg=cfg | {"size": [32, 32], "mode": "RGB"})
    images = to_images(pictures)
    for name, folder in [("clip", root / "clip"), ("hpsv2", root / "hpsv2")]:
        expected = open_clip_cosines(folder, pictures, root / WEIGHTS[name])
        reward = rewards.load_reward(name, root, "cpu")
        torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-6)
    tower = rewards.load_reward("aesthetic", root, "cpu")
    plain = rewards.load_reward("aesthetic", rewards_root, "cpu")
    as_plain = (images - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    features = F.normalize(plain.encode_image(as_plain), dim=-1)
    torch.testing.assert_close(tower.image_features(images), features, rtol=0, atol=1e-6)

    folder = root / "pickscore" / "pickmodel"
    processor = write_processor(folder, image_mean=cfg["mean"], image_std=cfg["std"])
    expected = transformers_logits(folder, processor, pictures, PROMPTS)
    reward = rewards.load_reward("pickscore", root, "cpu")
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-4)
    (folder / "preprocessor_config.json").unlink()
    processor.save_pretrained(folder)  # nested in processor_config.json since transformers 5
    assert rewards.load_reward("pickscore", root, "cpu").std == reward.std

    for wrong in [{"mean": [0.5]}, {"std": [1, 1, 0]}, {"std": "large"}, {"mean": [0.5, 0.5, float("nan")]}]:
        change_json(root / "clip" / "open_clip_config.json", preprocess_cfg=wrong)
        with pytest.raises(UserError, match=r"open_clip_config.json: mean .* and std .*; expected three numbers"):
            rewards.load_reward("clip", root, "cpu")


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


def test_gradient_in_the_images_matches_finite_differences(rewards_root):
    """And nothing else gets a gradient."""
    for name in rewards.REWARDS:
        reward = rewards.load_reward(name, rewards_root, "cpu", torch.float64)
        assert not reward.training and not any(parameter.requires_grad for parameter in reward.parameters())
        images = random_images(dtype=torch.float64).requires_grad_()
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        reward(images, PROMPTS).sum().backward()
        step = 1e-5
        with torch.no_grad():
            difference = reward(images + step * direction, PROMPTS) - reward(images - step * direction, PROMPTS)
        slopes = (images.grad * direction).sum(dim=(1, 2, 3))
        assert slopes.abs().min() > 1e-7
        torch.testing.assert_close(difference / (2 * step), slopes, rtol=1e-5, atol=1e-9)
        assert all(parameter.grad is None for parameter in reward.parameters())


# A score is of one image and its own prompt.


def test_score_depends_on_its_own_image_and_prompt_alone(loaded):
    images, changed = random_images(), random_images()
    changed[1] = 1 - changed[1]
    for name, reward in loaded.items():
        before = reward(images, PROMPTS)
        other_image = reward(changed, PROMPTS)
        other_prompt = reward(images, [PROMPTS[0], "something else", PROMPTS[2]])
        alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
        tolerance = {"rtol": 1e-5, "atol": 1e-6}
        assert before.shape == (3,)
        torch.testing.assert_close(alone, before, **tolerance)
        for after in (other_image, other_prompt):
            torch.testing.assert_close(after[[0, 2]], before[[0, 2]], **tolerance)
        assert abs(other_image[1] - before[1]) > 1e-4
        assert (abs(other_prompt[1] - before[1]) > 1e-4) == (name != "aesthetic")


def test_text_features_are_those_of_the_batch_and_of_nothing_before_it(rewards_root, loaded):
    """A run that was stopped and resumed has the same bits: they may depend on the batch, and on nothing else."""
    for name in ("clip", "pickscore", "hpsv2"):
        fresh = rewards.load_reward(name, rewards_root, "cpu")
        batches = []
        text = fresh.tower.text_model.embeddings if name == "pickscore" else fresh.tower
        text.token_embedding.register_forward_pre_hook(
            lambda _, tokens, batches=batches: batches.append(len(tokens[0]))
        )
        prompts = [*PROMPTS, PROMPTS[0]]
        with torch.inference_mode():
            loaded[name].text_features(PROMPTS[:2])
        found = fresh.text_features(prompts)
        assert batches == [4]
        assert torch.equal(found, loaded[name].text_features(prompts))
        alone = torch.cat([loaded[name].text_features([prompt]) for prompt in prompts])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))
        assert not found.requires_grad


def test_too_long_prompts_are_truncated_with_one_warning(rewards_root, caplog):
    fits, too_long = "fox " * 75, "fox " * 76  # and a start and an end token, in a context of 77
    for name in ("clip", "pickscore", "hpsv2"):
        reward = rewards.load_reward(name, rewards_root, "cpu")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rewards"):
            reward.text_features([fits, "fox"])
            assert not caplog.records
            features = reward.text_features([fits, too_long, "fox " * 200])
            reward.text_features(["fox " * 100])
        (record,) = caplog.records
        assert record.getMessage().startswith(f"{name}: 2 of 3 prompts are longer than 77 tokens and are truncated")
        torch.testing.assert_close(features[0], features[1])


@pytest.mark.skipif(not REAL_PROMPTS.is_file(), reason=f"no Open Prompts sample at {REAL_PROMPTS}")
def test_clip_tokenizer_equals_one_from_clips_files_on_real_prompts(tmp_path):
    tiny.make_tokenizer(tmp_path)
    lines = REAL_PROMPTS.read_text(encoding="utf-8").splitlines()
    assert clip_tokenizer()(lines).input_ids == CLIPTokenizer.from_pretrained(tmp_path)(lines).input_ids


def make_small_vocabulary(folder, **text_cfg):
    """An open_clip folder with a tokenizer of 514 tokens of its own: bytes, and bytes that end a word."""
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder)
    text = {"context_length": 16, "vocab_size": 514, "width": 32, "heads": 2, "layers": 1, **text_cfg}
    tiny.make_open_clip_folder(folder, tiny.OPEN_CLIP | {"text_cfg": text}, seed=0)
    return tokenizer


def test_a_folders_own_tokenizer_is_used_and_must_be_the_models(tmp_path):
    tokenizer = make_small_vocabulary(tmp_path / "clip", hf_tokenizer_name="own")
    reward = rewards.load_reward("clip", tmp_path, "cpu")
    tokens = tokenizer("An Owl", padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert tokens[0, 0] == 512 and tokens[0, 7:].tolist() == [513] * 9
    expected = F.normalize(open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").encode_text(tokens), dim=-1)
    torch.testing.assert_close(reward.text_features(["An Owl"]), expected)
    make_small_vocabulary(tmp_path / "clip")  # without hf_tokenizer_name open_clip takes CLIP's 49,408 tokens
    with pytest.raises(UserError, match=r"49408 tokens, the model 514.*hf_tokenizer_name"):
        rewards.load_reward("clip", tmp_path, "cpu")


# Precision.


def test_half_types_are_close_to_fp32(rewards_root, loaded):
    images, prompts = random_images(count=8), [f"picture {i}" for i in range(8)]
    for name, reward in loaded.items():
        full = reward(images, prompts)
        with torch.autocast("cpu", torch.bfloat16):  # the caller's, which changes nothing
            torch.testing.assert_close(reward(images, prompts), full, rtol=1e-5, atol=1e-6)
        # bf16 keeps 8 bits and fp16 11: the error is that of a cosine, and PickScores are 100 times that.
        for dtype, error in [(torch.bfloat16, 0.02), (torch.float16, 0.0025)]:
            half_reward = rewards.load_reward(name, rewards_root, "cpu", dtype)
            half = half_reward(images, prompts)
            assert half.dtype == torch.float32 and not torch.equal(half, full)
            torch.testing.assert_close(half, full, rtol=0, atol=error * (100 if name == "pickscore" else 1))
            if name == "pickscore":  # in bf16 the logarithm 4.6052 becomes 4.59375, and every score 1 % lower
                assert half_reward.logit_scale == pytest.approx(np.exp(4.6052), rel=1e-5)


# The sum, and a user's own function.


def test_the_sum_and_its_gradient_are_those_of_its_terms(loaded, rewards_root, tmp_path):
    """Also with a user's function that looks at all images at once."""
    file = tmp_path / "mine.py"
    body = "return (images - images.mean(dim=0)).square().sum(dim=(1, 2, 3))"
    file.write_text(f"def spread(images, prompts):\n    {body}\n")
    weights = {"clip": 0.5, "aesthetic": 1.0, "pickscore": 2.0, "hpsv2": -3.0}
    wide = {name: rewards.load_reward(name, rewards_root, "cpu", torch.float64) for name in weights}
    summed = RewardSum([*((wide[name], w) for name, w in weights.items()), (load_function(f"{file}:spread"), 0.1)])
    images, same = (random_images().double().requires_grad_() for _ in range(2))
    total, scores = summed(images, PROMPTS)
    alone = {name: reward(same, PROMPTS) for name, reward in wide.items()}
    by_hand = 0.5 * 100 * alone["clip"] + 1 * 3 * alone["aesthetic"] + 2 * alone["pickscore"] - 300 * alone["hpsv2"]
    by_hand = by_hand + 0.1 * (same - same.mean(dim=0)).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(total, by_hand, rtol=1e-12, atol=0)
    for name in weights:
        torch.testing.assert_close(scores[name], alone[name].detach(), rtol=1e-12, atol=0)
    (-7 * total.mean()).backward()
    (-7 * by_hand.mean()).backward()
    assert same.grad.norm() > 0
    torch.testing.assert_close(images.grad, same.grad, rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match="all rewards have weight 0"):
        RewardSum([])


def test_equal_towers_run_once(root):
    """A CLIP reward with the aesthetic reward's tower; with another activation or mean it is another tower."""
    for difference, runs in [({}, 1), ({"quick_gelu": False}, 2), ({"mean": [0.5, 0.5, 0.5]}, 2)]:
        shutil.rmtree(root / "clip")
        shutil.copytree(root / "aesthetic" / "clip", root / "clip")
        model = tiny.OPEN_CLIP | {"quick_gelu": difference.get("quick_gelu", True)}
        preprocess_cfg = {"mean": difference["mean"]} if "mean" in difference else {}
        change_json(root / "clip" / "open_clip_config.json", model_cfg=model, preprocess_cfg=preprocess_cfg)
        names, calls = ("clip", "aesthetic", "pickscore"), []
        loaded = [rewards.load_reward(name, root, "cpu") for name in names]
        images = random_images()
        expected = {reward.name: reward(images, PROMPTS) for reward in loaded}
        summed = RewardSum([(reward, 1.0) for reward in loaded])
        for tower in {reward.visual for reward in loaded[:2]}:
            tower.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        _, scores = summed(images, PROMPTS)
        assert len(calls) == runs
        torch.testing.assert_close(scores, expected)


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


def test_unusable_functions_are_refused(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "text.txt").write_text("")
    for spec, complaint in [
        ("brightness", "expected path/to/file.py:function"),
        ("{folder}/none.py:brightness", "no such file"),
        ("{folder}/broken.py:brightness", "fails on import .ZeroDivisionError"),
        ("{folder}/empty.py:brightness", "has no function brightness"),
        ("{folder}/text.txt:brightness", "not a Python file"),
    ]:
        with pytest.raises(UserError, match=complaint):
            load_function(spec.format(folder=tmp_path))


def test_a_users_file_that_imports_hpsv2_gets_the_package(tmp_path, monkeypatch):
    """The repository comes first on the path, as for its programs; without a package the message names what to do."""
    package = tmp_path / "site" / "hpsv2" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("def score(images):\n    return images.mean(dim=(1, 2, 3))\n")
    (tmp_path / "top.py").write_text("from hpsv2 import score\ndef mine(images, prompts):\n    return score(images)\n")
    (tmp_path / "late.py").write_text("def mine(images, prompts):\n    import hpsv2\n    return hpsv2.score(images)\n")
    others = [entry for entry in sys.path if not Path(entry, "hpsv2").exists()]
    images = random_images()

    def scores(file, path):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "hpsv2", raising=False)
            patch.setattr(sys, "path", [str(REPOSITORY), *path, *others])
            try:
                return load_function(f"{tmp_path / file}:mine")(images, PROMPTS)
            finally:
                sys.modules.pop("hpsv2", None)

    for file in ("top.py", "late.py"):
        torch.testing.assert_close(scores(file, [str(tmp_path / "site")]), images.mean(dim=(1, 2, 3)))
        with pytest.raises(UserError, match="the package hpsv2 is not installed.*pip install hpsv2"):
            scores(file, [])


# Bad input.


def test_unusable_images_are_refused(loaded):
    reward, images = loaded["aesthetic"], random_images()
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
    images[1, 0, 0, 0] = torch.nan  # passes through, for the caller to handle
    assert loaded["clip"](images, PROMPTS).isnan().tolist() == [False, True, False]


# Files.


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
        f"{tmp_path}/pickscore/pickmodel/model.safetensors (or pytorch_model.bin, or shards with their .index.json)",
        f"{tmp_path}/hpsv2/HPS_v2_compressed.pt (or HPS_v2_compressed.safetensors, open_clip_model.safetensors",
        "get it: python download_models.py --only hpsv2",
    ]:
        assert part in message
    rewards.check_files([], tmp_path)
    with pytest.raises(UserError, match="no reward is called beauty; choose from clip, aesthetic"):
        rewards.check_files(["beauty"], tmp_path)


def test_check_files_accepts_whole_folders_and_misses_each_file(root, tmp_path):
    files = [*WEIGHTS.items(), ("aesthetic", f"aesthetic/{aesthetic.HEAD}")]
    for name, file in [*files, ("pickscore", "pickscore/pickmodel/config.json")]:
        rewards.check_files([name], root)
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


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def shard(state, folder, name, save):
    """Write two shards and their index as transformers and huggingface_hub do."""
    names, stem, suffix = sorted(state), *name.split(".")
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for part, file in zip(parts, files, strict=True):
        save({key: state[key] for key in part}, folder / file)
    weight_map = {key: file for part, file in zip(parts, files, strict=True) for key in part}
    tiny.write_json(folder / f"{name}.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder / files[1]


def test_open_clip_weights_as_trainers_save_them(root, loaded):
    """CLIP, HPS v2 and the aesthetic tower under prefixes, nested, with harmless extras, in half precision, sharded."""
    images, expected = random_images(), {name: loaded[name](random_images(), PROMPTS) for name in WEIGHTS}
    extras = {"attn_mask": torch.zeros(77, 77), "logit_bias": torch.zeros(1), "logit_scale": torch.tensor([4.6])}
    for name, folder in [("clip", root / "clip"), ("hpsv2", root / "hpsv2"), ("aesthetic", root / "aesthetic/clip")]:
        path = root / WEIGHTS[name]
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
        path.unlink()
        text = {key: state[key] for key in state if not key.startswith(("visual.", "logit_"))}
        custom = {key: state[key] for key in state if key not in text} | prefixed(text, "text.")
        bare = {f"module.{key.replace('visual.', 'visual._orig_mod.')}": value for key, value in state.items()}
        for file, content in {
            "open_clip_pytorch_model.bin": {"epoch": 3, "state_dict": prefixed(state | extras, "module.")},
            "open_clip_model.safetensors": prefixed(state | extras, "module._orig_mod.model.clip."),
            "pytorch_model.bin": {"model": custom, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
            "model.safetensors": bare,
        }.items():
            (torch.save if file.endswith(".bin") else save_file)(content, folder / file)
            score = rewards.load_reward(name, root, "cpu")(images, PROMPTS)
            torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-6)
            (folder / file).unlink()
        for dtype, file in [(torch.float16, "open_clip_model.safetensors"), (torch.bfloat16, "pytorch_model.bin")]:
            save = torch.save if file.endswith(".bin") else save_file
            last = shard({key: value.to(dtype) for key, value in state.items()}, folder, file, save)
            reward = rewards.load_reward(name, root, "cpu")
            assert {parameter.dtype for parameter in reward.parameters()} == {torch.float32}
            torch.testing.assert_close(reward(images, PROMPTS), expected[name], rtol=0, atol=0.1)
            last.unlink()
            with pytest.raises(UserError, match=f"{last.name}; {file}.index.json lists it as a shard"):
                rewards.check_files([name], root)
            (folder / f"{file}.index.json").unlink()


def test_transformers_weights_as_trainers_save_them(root, loaded, pictures):
    """PickScore, and a CLIP reward from a transformers folder: cosines of the same model, without its temperature."""
    folder, images = root / "pickscore" / "pickmodel", to_images(pictures)
    expected = loaded["pickscore"](images, PROMPTS)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    doubled = {re.sub(r"^(text|vision)_model\.", r"\1_model.\1_model.", name): state[name] for name in state}
    scale = {"logit_scale": state["logit_scale"].reshape(1)}
    for file, content in {
        "model.safetensors": prefixed(doubled | scale, "_orig_mod.module."),
        "pytorch_model.bin": {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 1e-6}},
    }.items():
        (torch.save if file.endswith(".bin") else save_file)(content, folder / file)
        torch.testing.assert_close(rewards.load_reward("pickscore", root, "cpu")(images, PROMPTS), expected)
        (folder / file).unlink()
    shard({name: value.clone() for name, value in state.items()}, folder, "model.safetensors", save_file)
    torch.testing.assert_close(rewards.load_reward("pickscore", root, "cpu")(images, PROMPTS), expected)
    shutil.rmtree(root / "clip")
    shutil.copytree(folder, root / "clip")
    score = rewards.load_reward("clip", root, "cpu")(images, PROMPTS)
    torch.testing.assert_close(score * loaded["pickscore"].logit_scale, expected)


def test_weights_that_do_not_fit_are_named_in_one_line(root, caplog):
    hps, pick = root / WEIGHTS["hpsv2"], root / WEIGHTS["pickscore"]
    state, pickstate = torch.load(hps, weights_only=True)["state_dict"], load_file(pick)
    head = root / "aesthetic" / aesthetic.HEAD
    headstate = torch.load(head, weights_only=True)
    first = "visual.transformer.resblocks.0.attn.in_proj_weight"
    misfit = {name: state[name] for name in state if name != "ln_final.weight"}
    misfit |= {"extra.weight": torch.zeros(1), "visual.proj": torch.zeros(2, 2)}
    text_only = {name: state[name] for name in state if not name.startswith("visual.")}
    visual_only = {name: value for name, value in pickstate.items() if name.startswith("vision_model.")}
    for name, path, content, complaint in [
        (
            "hpsv2",
            hps,
            misfit,
            r"missing: ln_final.weight; unexpected: extra.weight; of another shape: visual.proj \(2",
        ),
        ("hpsv2", hps, text_only, "no CLIP model under open_clip's names in it"),
        ("hpsv2", hps, pickstate, "no CLIP model under open_clip's names in it"),
        ("hpsv2", hps, state | {first: state[first] / 0}, f"{first} holds NaN or infinity"),
        ("hpsv2", hps, state | {first: state[first].to(torch.int8)}, f"{first} holds torch.int8 numbers, expected flo"),
        ("pickscore", pick, visual_only, r"missing: logit_scale, text_model"),
        ("pickscore", pick, state, "no transformers CLIPModel in it"),
        ("pickscore", pick, pickstate | {"logit_scale": torch.tensor(torch.nan)}, "logit_scale holds NaN or infinity"),
        ("aesthetic", head, headstate | {"layers.0.weight": torch.zeros(32, 768)}, "768 numbers, the tower gives 32"),
        ("aesthetic", head, {"linear.weight": torch.zeros(1, 32)}, "no aesthetic head .layers.0.weight, …. in it"),
        ("aesthetic", head, {"layers.0.weight": torch.zeros(1, 32)}, "expected the matrices layers.0.weight, layers.2"),
    ]:
        before = path.read_bytes()
        save_file(content, path) if path.suffix == ".safetensors" else torch.save({"state_dict": content}, path)
        with pytest.raises(UserError, match=complaint) as error:
            rewards.load_reward(name, root, "cpu")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(before)
    # A head of the user's own beside a prefixed CLIP would change the score: it is not passed over in silence.
    torch.save(prefixed(state, "clip.") | {"my_head.weight": torch.zeros(1, 32)}, hps)
    with caplog.at_level(logging.WARNING, "rewards"):
        rewards.load_reward("hpsv2", root, "cpu")
    assert "HPS_v2_compressed.pt: not used: my_head.weight" in caplog.text


def test_damaged_files_are_named_in_one_line(root):
    for name, file in [
        *WEIGHTS.items(),
        ("aesthetic", f"aesthetic/{aesthetic.HEAD}"),
        ("clip", "clip/open_clip_config.json"),
        ("pickscore", "pickscore/pickmodel/config.json"),
        ("pickscore", "pickscore/pickmodel/preprocessor_config.json"),
        ("pickscore", "pickscore/pickmodel/tokenizer.json"),
    ]:
        before = (root / file).read_bytes() if (root / file).exists() else None
        for content in (b"", b"<html>not found</html>", b'{"a": 3', b"[]"):
            (root / file).write_bytes(content)
            with pytest.raises(UserError) as error:
                rewards.load_reward(name, root, "cpu")
            assert str((root / file).parent) in str(error.value)
            assert "\n" not in str(error.value)
        (root / file).unlink() if before is None else (root / file).write_bytes(before)


class RandomNumbers(TorchDispatchMode):
    """Counts the random numbers that are drawn into memory."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in function.tags and not result.is_meta:
            self.count += result.numel()
        return result


def test_towers_are_filled_once(rewards_root):
    """No random numbers first but for a few vectors; constants such as the attention mask are right."""
    for name in rewards.REWARDS:
        with RandomNumbers() as drawn:
            reward = rewards.load_reward(name, rewards_root, "cpu")
        weights = sum(parameter.numel() for parameter in reward.parameters())
        assert drawn.count < weights / 10
        assert not any(tensor.is_meta for tensor in (*reward.parameters(), *reward.buffers()))
    with RandomNumbers() as drawn:
        built = open_clip.CLIP(**tiny.OPEN_CLIP)
    assert drawn.count > 1e6
    mask = torch.full((77, 77), -torch.inf).triu(1)
    assert torch.equal(rewards.load_reward("clip", rewards_root, "cpu").tower.attn_mask, mask)
    assert built.attn_mask.equal(mask)
    aesthetic_reward = rewards.load_reward("aesthetic", rewards_root, "cpu")
    assert sum(parameter.numel() for parameter in aesthetic_reward.parameters()) < 50_000  # no text tower


def test_a_new_reward_needs_its_module_and_its_line_in_the_registry(tmp_path, monkeypatch):
    (tmp_path / "redness.py").write_text(
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from rewards.base import Reward\n"
        "class Redness(Reward):\n"
        "    name, scale, image_size = 'redness', 2.0, (8, 8)\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.tower = nn.Linear(1, 1)\n"
        "    def encode_image(self, pixels):\n"
        "        return pixels.mean(dim=(2, 3))\n"
        "    def score(self, image_features, prompts):\n"
        "        return image_features[:, 0]\n"
        "def missing(root):\n"
        "    return [] if (root / 'redness').is_dir() else [f'{root}/redness; make it']\n"
        "def load(root, device, dtype):\n"
        "    return Redness().frozen(device, dtype)\n"
    )
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    monkeypatch.setitem(rewards.REWARDS, "redness", (1.0, "weight of the redness"))
    try:
        with pytest.raises(UserError, match="redness: .*/redness; make it"):
            rewards.load_reward("redness", tmp_path, "cpu")
        (tmp_path / "redness").mkdir()
        images = random_images().requires_grad_()
        total, scores = RewardSum([(rewards.load_reward("redness", tmp_path, "cpu"), 3.0)])(images, PROMPTS)
        torch.testing.assert_close(total, 6 * scores["redness"])
        total.sum().backward()
        assert images.grad.abs().sum() > 0
    finally:
        sys.modules.pop("rewards.redness", None)
    done = subprocess.run(
        [sys.executable, "-c", "import rewards, sys; sys.exit('torch' in sys.modules)"], cwd=REPOSITORY, timeout=60
    )
    assert done.returncode == 0  # the registry alone is quick to import

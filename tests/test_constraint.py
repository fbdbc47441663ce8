"""The CLIP constraint and the weakened text direction, with the weights that the training script uses."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import make_rewards, make_stable_diffusion

import rewards
from rewards import constraint
from rewards.base import share_towers
from rewards.sum import RewardSum
from textcraftor.embeddings import encode_prompts
from textcraftor.errors import UserError
from textcraftor.models import load_model
from textcraftor.objective import pooled_embeddings

MINIATURE = Path(__file__).parents[1] / "miniature"
PROMPTS = ["a large fox on grass", "a rocket"]


def test_constraint_is_the_clip_cosine_with_gradient_to_image_and_text_encoder():
    """Before any tuning it is the plain CLIP score of the model that the text encoder came from."""
    model = load_model(str(MINIATURE / "stable-diffusion"))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    term = constraint.load_constraint(MINIATURE, model.text_encoder, "cpu", torch.float32)
    encoder = model.text_encoder.requires_grad_()
    tokens = model.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    hidden = encode_prompts(model.tokenizer, encoder, PROMPTS)["encoder_hidden_states"]
    pooled = pooled_embeddings(tokens, hidden, model.tokenizer.eos_token_id)
    cosine = term.score(term.image_features(images), pooled)
    architecture, weights = constraint.find_tower(MINIATURE / "aesthetic" / "clip", *constraint.aesthetic.TOWER)
    plain = constraint.load_open_clip("clip", 1.0, architecture, weights).frozen("cpu", torch.float32)
    torch.testing.assert_close(cosine, plain(images, PROMPTS), rtol=1e-3, atol=1e-4)
    cosine.sum().backward()
    assert images.grad.norm() > 0
    assert encoder.get_input_embeddings().weight.grad.norm() > 0
    assert not any(parameter.requires_grad for parameter in term.parameters())


def test_three_equal_towers_run_once(tmp_path):
    """The CLIP reward may be the same ViT-L/14, too."""
    shutil.copytree(MINIATURE / "aesthetic", tmp_path / "aesthetic")
    shutil.copytree(MINIATURE / "aesthetic" / "clip", tmp_path / "clip")
    term = constraint.load_constraint(
        tmp_path, load_model(str(MINIATURE / "stable-diffusion")).text_encoder, "cpu", torch.float32
    )
    clip, aesthetic = (rewards.load_reward(name, tmp_path, "cpu") for name in ("clip", "aesthetic"))
    for order in ([clip, aesthetic, term], [term, aesthetic, clip], [aesthetic, term, clip]):
        share_towers(order)
        assert clip.visual is aesthetic.visual is term.visual


def test_constraint_shares_the_aesthetic_rewards_tower():
    model = load_model(str(MINIATURE / "stable-diffusion"))
    term = constraint.load_constraint(MINIATURE, model.text_encoder, "cpu", torch.float32)
    summed = RewardSum([(rewards.load_reward("aesthetic", MINIATURE, "cpu"), 1.0)])
    share_towers([*summed.rewards, term])
    calls, features = [], {}
    term.visual.register_forward_hook(lambda *_: calls.append(1))
    images = torch.rand(2, 3, 64, 64)
    total, _ = summed(images, PROMPTS, features)
    assert features[term.visual].shape[0] == 2 and len(calls) == 1
    torch.testing.assert_close(total, 3 * rewards.load_reward("aesthetic", MINIATURE, "cpu")(images, PROMPTS))


def test_constraint_refuses_another_models_text_encoder(tmp_path):
    model = load_model(str(make_stable_diffusion(tmp_path / "model")))
    with pytest.raises(UserError, match="is not the text tower of .*another token embedding"):
        constraint.load_constraint(make_rewards(tmp_path / "rewards"), model.text_encoder, "cpu", torch.float32)
    with pytest.raises(UserError, match="weights are missing"):
        constraint.load_constraint(tmp_path, model.text_encoder, "cpu", torch.float32)


def test_weakened_text_direction_changes_the_total_and_not_the_scores(tmp_path):
    root = make_rewards(tmp_path)
    weights = {"clip": 0.5, "aesthetic": 1.0, "pickscore": 2.0}
    loaded = {name: rewards.load_reward(name, root, "cpu", torch.float64) for name in weights}
    summed = RewardSum([(reward, weights[name]) for name, reward in loaded.items()])
    corpus = ["a fox", "a red car by the sea", "two cats", "a hat", "a photo of a dog"]
    summed.find_shared(corpus, batch_size=2)
    images, prompts = torch.rand(2, 3, 64, 64, dtype=torch.float64), ["a blue cat", "a car"]
    total, scores = summed(images, prompts, shared_text=0.3)
    plain_total, plain_scores = summed(images, prompts)
    torch.testing.assert_close(scores, plain_scores)
    torch.testing.assert_close(summed.total(scores), plain_total)
    expected = 3 * plain_scores["aesthetic"]
    for name, factor in (("clip", 0.5 * 100), ("pickscore", 2 * loaded["pickscore"].logit_scale)):
        reward = loaded[name]
        mean = torch.stack([reward.text_features([prompt])[0] for prompt in corpus]).mean(dim=0)
        u = mean / mean.norm()
        seen, texts = reward.image_features(images), reward.text_features(prompts)
        for row in range(2):
            kept = texts[row] - 0.7 * (texts[row] @ u) * u
            expected[row] += factor * (seen[row] @ kept)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)

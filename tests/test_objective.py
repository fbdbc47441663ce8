"""The terms beside the rewards, each against its definition in float64."""

import math

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from textcraftor.objective import (
    anchor_distance,
    move_against,
    pooled_embeddings,
    shared_direction,
    weaken_shared,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_anchor_is_the_mean_cosine_distance_of_the_prompts_tokens():
    original, tuned = random(6, 5, 4), random(6, 5, 4, seed=1).requires_grad_()
    conditions = {"encoder_hidden_states": original}, {"encoder_hidden_states": tuned}
    distance = anchor_distance(*conditions)
    cosines = []
    for row in range(3, 6):  # rows 0 to 2 are unconditional
        for token in range(5):
            a, b = original[row, token].numpy(), tuned[row, token].detach().numpy()
            cosines.append(a @ b / math.sqrt((a @ a) * (b @ b)))
    assert abs(distance.item() - (1 - np.mean(cosines))) < 1e-6
    distance.backward()
    assert not tuned.grad[:3].any() and tuned.grad[3:].any()
    assert anchor_distance(conditions[1], conditions[1]).item() < 1e-6


def test_pooled_embedding_is_transformers_own():
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, projection_dim=8, bos_token_id=57, eos_token_id=58, pad_token_id=59,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(config).eval()
    tokens = torch.tensor(
        [[57, 3, 4, 58, 58, 58, 58, 58, 58], [57, 5, 6, 7, 8, 9, 10, 11, 58], [57, 58, 59, *[59] * 6]]
    )
    with torch.no_grad():
        output = model(tokens)
        pooled = pooled_embeddings(tokens, output.last_hidden_state, config.eos_token_id)
    torch.testing.assert_close(pooled @ model.text_projection.weight.T, output.text_embeds)


def test_smoothed_reward_is_that_of_images_moved_against_its_gradient():
    images = (0.5 + 0.02 * random(2, 3, 4, 4)).requires_grad_()

    def reward(x):
        return (x.sin() * torch.arange(1, 49, dtype=x.dtype).view(3, 4, 4)).sum(dim=(1, 2, 3))

    (gradient,) = torch.autograd.grad(reward(images).sum(), images)
    moved = move_against(gradient, images, 0.01)
    shift = (images - moved).detach()
    rms = shift.pow(2).mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.full((2,), 0.01, dtype=torch.float64), rtol=1e-6, atol=0)
    for one, g in zip(shift, gradient, strict=True):  # parallel to the gradient
        assert (one * g).sum() / (one.norm() * g.norm()) > 1 - 1e-9
    assert (reward(moved) < reward(images)).all()
    # The gradient is the reward's at the moved images, as if the move were a constant.
    (smoothed,) = torch.autograd.grad(reward(moved).sum(), images)
    at = moved.detach().requires_grad_()
    (expected,) = torch.autograd.grad(reward(at).sum(), at)
    torch.testing.assert_close(smoothed, expected)
    # An image without gradient stays, and nothing leaves [0, 1].
    flat = torch.full((1, 3, 2, 2), 0.995, dtype=torch.float64)
    assert torch.equal(move_against(torch.zeros_like(flat), flat, 0.01), flat)
    assert move_against(-torch.ones_like(flat), flat, 0.01).max() == 1


def test_shared_text_direction_is_weakened():
    features = torch.nn.functional.normalize(random(50, 6) + torch.tensor([3.0, 1, 0, 0, 0, 0]), dim=-1)
    direction = shared_direction(features)
    mean = features.numpy().mean(axis=0)
    np.testing.assert_allclose(direction.numpy(), mean / np.linalg.norm(mean))
    image = torch.nn.functional.normalize(random(6, seed=2), dim=0)
    for weight in (0, 0.3, 1):
        for text, weak in zip(features, weaken_shared(features, direction, weight), strict=True):
            along = (text @ direction) * direction
            expected = image @ (text - along) + weight * (image @ along)
            assert abs((image @ weak - expected).item()) < 1e-12

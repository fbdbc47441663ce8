"""What one training step maximises: the weighted rewards, and terms that keep them from being gamed.

All such terms are off by default. Each is one short function of tensors; `training_objective` puts them together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import at_least_fp32
from textcraftor.embeddings import Conditions, tokenize
from textcraftor.errors import UserError

EMBEDDINGS = "encoder_hidden_states"  # the prompts' token embeddings among Conditions


def training_objective(args, rewards, constraint, tokenizer, images, prompts, conditions):
    """The objective (B,), with gradient, of images (B, 3, H, W) in [0, 1] -> (objective, {name: score (B,)}, detached).

    args: options smooth, shared_text, anchor and clip_constraint; rewards: a RewardSum; constraint: a ClipConstraint if
    clip_constraint is not 0; conditions: of embed_prompts for these prompts. The scores are those of the rewards, of
    the images as they are, then "clip_constraint" and "anchor" where these are in use. Raises UserError if nothing that
    is scored has a gradient.
    """
    features, texts, seen = {}, {}, images
    if args.smooth:
        at = images.detach().requires_grad_()
        objective, scores = rewards(at, prompts, texts=texts, shared_text=args.shared_text)
        if objective.requires_grad:
            (gradient,) = torch.autograd.grad(objective.sum(), at)
            seen = move_against(gradient, images, args.smooth)
            objective, _ = rewards(seen, prompts, features, texts, args.shared_text)
    else:
        objective, scores = rewards(images, prompts, features, texts, args.shared_text)
    if not (objective.requires_grad or args.clip_constraint):
        raise UserError("no reward is differentiable in the images; train on at least one that is")
    if args.clip_constraint:
        if constraint.visual not in features:
            features[constraint.visual] = constraint.image_features(seen)
        tokens = tokenize(tokenizer, prompts)
        pooled = pooled_embeddings(tokens, conditions[1][EMBEDDINGS].chunk(2)[1], tokenizer.eos_token_id)
        cosine = constraint.score(features[constraint.visual], pooled)
        objective = objective + args.clip_constraint * constraint.scale * cosine
        scores["clip_constraint"] = cosine.detach()
    if args.anchor:
        distance = anchor_distance(*conditions)
        objective = objective - args.anchor * distance
        scores["anchor"] = distance.detach().expand(len(images))
    return objective, scores


def anchor_distance(original: Conditions, tuned: Conditions) -> Tensor:
    """1 - cos(T_φ(p), T_0(p)), a number in [0, 2]: how far the tuned prompt embeddings are from the original ones.

    Conditions of 2B rows, the unconditional ones first. The cosine is that of each token's embedding, averaged over the
    tokens, padding included (the UNet attends to it, too), and over the B prompts. Gradient flows to `tuned` alone.
    Source: the regulariser of TextBoost, there with weight 0.1.
    """
    before, after = (conditions[EMBEDDINGS].chunk(2)[1] for conditions in (original, tuned))
    before, after = (rows.to(at_least_fp32(rows.dtype)) for rows in (before, after))
    return 1 - F.cosine_similarity(before.detach(), after, dim=-1).mean()


def pooled_embeddings(tokens: Tensor, hidden: Tensor, end_token: int) -> Tensor:
    """CLIP's pooled text embedding: the last hidden state (B, L, D) at each prompt's first end token -> (B, D).

    tokens: ids (B, L). CLIP text encoders apply their final layer norm to the hidden state before this.
    """
    first_end = (tokens == end_token).int().argmax(dim=-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first_end.to(hidden.device)]


def move_against(gradient: Tensor, images: Tensor, rho: float) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], each moved by `rho` against its reward's gradient and clamped to [0, 1].

    rho: root mean square of the move over an image's numbers, of a range of 1. Gradient flows to `images` as if they
    had been moved by a constant. Source: RSA-FT (arXiv 2603.21175), which takes the reward's gradient at the image that
    is worst near the one generated: a maximum so sharp that no neighbour shares it attracts nothing.
    """
    rms = gradient.to(at_least_fp32(gradient.dtype)).pow(2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
    shift = rho * gradient / rms.clamp_min(torch.finfo(torch.float32).tiny).to(gradient)
    return (images - shift.detach()).clamp(0, 1)


def weaken_shared(features: Tensor, direction: Tensor, weight: float) -> Tensor:
    """Text features (B, D) whose part along `direction`, a unit vector (D,), is multiplied by `weight`.

    The direction is what the texts of all prompts share. An image can raise its score along it whatever its prompt
    says. 1 leaves the features as they are, 0 removes the shared part; LongAlign (arXiv 2410.11817) uses 0.3. The
    result is not normalised again, so a cosine loses just that part.
    """
    shared = (features @ direction)[:, None] * direction
    return features - (1 - weight) * shared


def shared_direction(features: Tensor) -> Tensor:
    """The direction (D,), of length 1, that unit text features (N, D) of many prompts share: their normalised mean."""
    return F.normalize(features.mean(dim=0), dim=0)

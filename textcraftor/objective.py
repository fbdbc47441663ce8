"""What training maximises beside the rewards themselves, and what keeps the rewards from being gamed.

Each of these is off by default and is one short function of tensors; train_textcraftor.train_step puts them together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from textcraftor.embeddings import Conditions

EMBEDDINGS = "encoder_hidden_states"  # the prompts' token embeddings among Conditions


def anchor_distance(original: Conditions, tuned: Conditions) -> Tensor:
    """1 - cos(T_φ(p), T_0(p)), a number in [0, 2]: how far the tuned prompt embeddings are from the original ones.

    Conditions of 2B rows, the unconditional ones first. The cosine is that of each token's embedding, averaged over the
    tokens, padding included (the UNet attends to it, too), and over the B prompts. Gradient flows to `tuned` alone.
    Source: the regulariser of TextBoost, there with weight 0.1.
    """
    before, after = (conditions[EMBEDDINGS].chunk(2)[1].float() for conditions in (original, tuned))
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
    rms = gradient.float().pow(2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
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

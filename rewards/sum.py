"""The weighted sum of rewards that training maximises."""

import torch
from torch import Tensor, nn

from rewards.base import Reward, check_inputs, share_towers
from textcraftor.errors import UserError


class RewardSum(nn.Module):
    """total = sum of weight * scale * r over (reward, weight) pairs; their names must differ.

    Equal image towers, as of the aesthetic reward and of a CLIP reward with ViT-L/14, become one and run once.
    """

    def __init__(self, weighted: list[tuple[nn.Module, float]]):
        super().__init__()
        self.rewards = nn.ModuleList(reward for reward, _ in weighted)
        self.weights = [weight for _, weight in weighted]
        names = [reward.name for reward in self.rewards]
        if not names:
            raise UserError("no reward has a weight; give at least one, such as --clip 0.5")
        if len(set(names)) < len(names):
            raise UserError(f"two rewards have the same name ({', '.join(names)}); rename the function")
        share_towers([reward for reward in self.rewards if isinstance(reward, Reward)])

    def forward(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W) in [0, 1], B prompts -> (total (B,) with gradient, {name: r (B,)} unscaled, detached)."""
        check_inputs(images, prompts)
        features, scores = {}, {}
        for reward in self.rewards:
            if not isinstance(reward, Reward):
                scores[reward.name] = reward(images, prompts)
                continue
            if reward.visual not in features:
                features[reward.visual] = reward.image_features(images)
            scores[reward.name] = reward.score(features[reward.visual], prompts)
        terms = [
            weight * reward.scale * scores[reward.name]
            for reward, weight in zip(self.rewards, self.weights, strict=True)
        ]
        return torch.stack(terms).sum(dim=0), {name: score.detach() for name, score in scores.items()}

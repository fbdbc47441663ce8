"""The weighted sum of rewards that training maximises."""

import torch
from torch import Tensor, nn

from rewards.base import Reward, check_inputs, share_towers
from textcraftor.errors import UserError


class RewardSum(nn.Module):
    """total = sum of weight * scale * r over (reward, weight) pairs.

    Rewards with equal image towers, such as the aesthetic reward and a CLIP reward with ViT-L/14, share one forward
    pass. Raises UserError if there is no reward, or two with the same name.
    """

    def __init__(self, weighted: list[tuple[nn.Module, float]]):
        super().__init__()
        self.rewards = nn.ModuleList(reward for reward, _ in weighted)
        self.weights = [weight for _, weight in weighted]
        names = [reward.name for reward in self.rewards]
        if not names:
            raise UserError("all rewards have weight 0; give one a weight, such as --clip 0.5")
        if len(set(names)) < len(names):
            raise UserError(f"two rewards have the same name ({', '.join(names)}); rename the function")
        share_towers([reward for reward in self.rewards if isinstance(reward, Reward)])

    def forward(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W) in [0, 1] and B prompts -> total (B,) with gradient, and {name: r (B,)}, detached.

        r is the score as the reward itself defines it, without scale and weight.
        """
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

"""The weighted sum of rewards that training maximises."""

import torch
from torch import Tensor, nn

from rewards.base import Reward, check_inputs, share_towers
from textcraftor.errors import UserError
from textcraftor.objective import shared_direction, weaken_shared


class RewardSum(nn.Module):
    """total = sum of weight * scale * r over (reward, weight) pairs.

    Rewards with equal image towers, such as the aesthetic reward and a CLIP reward with ViT-L/14, share one forward
    pass. Raises UserError if there is no reward, or two with the same name.
    """

    def __init__(self, weighted: list[tuple[nn.Module, float]]):
        super().__init__()
        self.rewards = nn.ModuleList(reward for reward, _ in weighted)
        self.weights = [weight for _, weight in weighted]
        self.checked = False  # whether images of the caller have been found in [0, 1]
        self.shared = {}  # reward name -> unit vector (D,)
        names = [reward.name for reward in self.rewards]
        if not names:
            raise UserError("all rewards have weight 0; give one a weight, such as --clip 0.5")
        if len(set(names)) < len(names):
            raise UserError(f"two rewards have the same name ({', '.join(names)}); rename the function")
        share_towers([reward for reward in self.rewards if isinstance(reward, Reward)])

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        features: dict | None = None,
        texts: dict | None = None,
        shared_text: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W) in [0, 1] and B prompts -> total (B,) with gradient, and {name: r (B,)}, detached.

        r is the score as the reward itself defines it, without scale and weight. features, texts: dicts that keep the
        image features by tower, for another reward with the same tower, and the text features by reward, for another
        call with the same prompts. shared_text: weight in the total, not in the r, of the text direction that all
        prompts share (objective.weaken_shared), known after `find_shared`. The first call raises ValueError for images
        that are not in [0, 1].
        """
        check_inputs(images, prompts, values=not self.checked)
        self.checked = True
        features, texts = ({} if known is None else known for known in (features, texts))
        scores, terms = {}, []
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            if not isinstance(reward, Reward):
                score = term = reward(images, prompts)
            else:
                if reward.visual not in features:
                    features[reward.visual] = reward.image_features(images)
                seen = features[reward.visual]
                if not reward.compares_texts:
                    score = term = reward.score(seen, prompts)
                else:
                    if reward not in texts:
                        texts[reward] = reward.text_features(prompts)
                    score = term = reward.compare(seen, texts[reward])
                    if shared_text != 1:
                        weakened = weaken_shared(texts[reward], self.shared[reward.name], shared_text)
                        term = reward.compare(seen, weakened)
            scores[reward.name] = score.detach()
            terms.append(weight * reward.scale * term)
        return torch.stack(terms).sum(dim=0), scores

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """{name: r (B,)} -> their weighted sum (B,)."""
        pairs = zip(self.rewards, self.weights, strict=True)
        return torch.stack([weight * reward.scale * scores[reward.name] for reward, weight in pairs]).sum(dim=0)

    def find_shared(self, prompts: list[str], batch_size: int = 64) -> None:
        """Find the text direction that `prompts` share, for each reward that compares texts."""
        starts = range(0, len(prompts), batch_size)
        for reward in self.rewards:
            if isinstance(reward, Reward) and reward.compares_texts:
                texts = [reward.text_features(prompts[start : start + batch_size]) for start in starts]
                self.shared[reward.name] = shared_direction(torch.cat(texts))

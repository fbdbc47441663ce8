"""All rewards of a training run: those in its objective, those only watched, and the CLIP constraint."""

from pathlib import Path

import torch
from torch import nn

from rewards import load_reward
from rewards.base import Reward, share_towers
from rewards.constraint import ClipConstraint, load_constraint
from rewards.sum import RewardSum

SHARED_PROMPTS = 1000  # prompts from which --shared_text finds the direction that all share


def load_rewards(
    args, functions: dict[str, nn.Module], prompts, text_encoder: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[RewardSum, list[nn.Module], ClipConstraint | None]:
    """Load what the options name, frozen -> (weighted sum, monitors, CLIP constraint if --clip_constraint is not 0).

    functions: users' own rewards by their specs; prompts: those to train on; text_encoder: the original one. Raises
    UserError if files are missing or do not fit.
    """

    def load(spec):
        return functions.get(spec) or load_reward(spec, args.weights, device, dtype)

    rewards = RewardSum([(load(spec), weight) for spec, weight in args.weighted.items()])
    monitors = [load(spec) for spec in args.monitored]
    constraint = None
    if args.clip_constraint:
        constraint = load_constraint(Path(args.weights), text_encoder, device, dtype)
        share_towers([reward for reward in (*rewards.rewards, constraint) if isinstance(reward, Reward)])
    if args.shared_text != 1:
        rewards.find_shared(prompts[:SHARED_PROMPTS])
    return rewards, monitors, constraint

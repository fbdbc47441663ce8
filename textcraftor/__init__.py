"""Shared parts of training and evaluation: prompts, models, sampling, checkpoints."""

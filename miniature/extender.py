"""The miniature's prompt extender: a causal language model that says what people add for a better picture.

A GPT-2 of 39,000 parameters over this world's words. It learns what follows a prompt, never prompts themselves: one or
two of the phrases with which captions speak of clean pictures.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from miniature.clips import words_of_the_world
from miniature.world import QUALITY_WORDS, random_scene, write_caption

LENGTH = 96  # tokens; prompts have about 25, and textcraftor.benchmark.extend leaves 50 for what it adds
END, UNKNOWN = "<|endoftext|>", "<|unknown|>"


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, alone and after a space, and the comma: what is decoded has its spaces right."""
    words = words_of_the_world()
    tokens = [END, UNKNOWN, ",", *words, *(f" {word}" for word in words)]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Split(Regex(" ?[^ ,]+|,"), "removed", invert=True)
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN, pad_token=END, model_max_length=LENGTH
    )


def new_extender() -> GPT2LMHeadModel:
    torch.manual_seed(51)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(new_tokenizer()),
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )


def extended_prompt(rng: np.random.Generator) -> tuple[str, str]:
    """A prompt with the comma after it, and what somebody added."""
    prompt = write_caption(random_scene(rng), rng, complete=rng.random() < 0.7, quality=0)
    phrases = rng.choice(QUALITY_WORDS["clean"], rng.integers(1, 3), replace=False)
    return f"{prompt},", "".join(f" {phrase}," for phrase in phrases)[:-1]


def extender_loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> torch.Tensor:
    """Cross entropy of what was added to 64 prompts, and of its end."""
    prompts, added = zip(*(extended_prompt(rng) for _ in range(64)), strict=True)
    batch = tokenizer([p + a + END for p, a in zip(prompts, added, strict=True)], padding=True, return_tensors="pt")
    labels, lengths = batch.input_ids.clone(), [len(ids) for ids in tokenizer(list(prompts)).input_ids]
    for row, length in enumerate(lengths):
        labels[row, :length] = -100
    labels[batch.attention_mask == 0] = -100
    return model(**batch, labels=labels).loss


def save_extender(model: GPT2LMHeadModel, folder: Path) -> None:
    """A transformers folder, weights in fp16."""
    model.half().save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)

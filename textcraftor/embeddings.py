"""Prompt embeddings: what the UNet is conditioned on.

Conditions are keyword arguments of the UNet, a dict of tensors with one row per prompt: for Stable Diffusion v1
{"encoder_hidden_states": (B, L, D)}. Everything except `encode_prompts` also takes other tensors, such as SDXL's.
"""

from threading import Lock

import torch

from textcraftor.mixing import Weighted, mix

Conditions = dict[str, torch.Tensor]
_tokenizing = Lock()  # tokenizers store the current call's settings: one thread at a time


def tokenize(tokenizer, prompts: list[str]) -> torch.Tensor:
    """B prompts -> token ids (B, L) on the CPU, padded or cut to the model's L tokens."""
    with _tokenizing:
        return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def encode_prompts(tokenizer, text_encoder, prompts: list[str]) -> Conditions:
    """B prompts -> the text encoder's last hidden state (B, L, D)."""
    return encode_tokens(text_encoder, tokenize(tokenizer, prompts))


def encode_tokens(text_encoder, tokens: torch.Tensor) -> Conditions:
    """Token ids (B, L) -> the text encoder's last hidden state (B, L, D)."""
    return {"encoder_hidden_states": text_encoder(tokens.to(text_encoder.device)).last_hidden_state}


def embed_prompts(networks, prompts: list[str], weighting: float = 1.0) -> tuple[Conditions, Conditions]:
    """Original and tuned conditions for the sampler, each of 2B rows, the B unconditional ones first.

    networks: a models.Networks. Returns (the original encoder's, without gradient; weighting * tuned +
    (1 - weighting) * original). The tuned encoder runs once, on "" and all prompts. If both encoders are the same
    object, both results are too. Several tuned encoders Tᵢ with weights wᵢ are mixed: Σ wᵢ Tᵢ + (1 − Σ wᵢ) T₀. With
    networks.tune_unconditional off, the unconditional rows of the second are those of the first.
    """
    tokens = tokenize(networks.tokenizer, ["", *prompts])
    with torch.no_grad():
        conditional = encode_tokens(networks.original_encoder, tokens[1:])
        rows = {name: torch.cat([networks.unconditional[name], value]) for name, value in conditional.items()}
        original = guidance_pair(rows)
    if networks.text_encoder is networks.original_encoder:
        return original, original
    several = isinstance(networks.text_encoder, list)
    tuned, both = [], networks.tune_unconditional
    compared = original if both else conditional
    for encoder, weight in networks.text_encoder if several else [Weighted(networks.text_encoder)]:
        rows = guidance_pair(encode_tokens(encoder, tokens)) if both else encode_tokens(encoder, tokens[1:])
        tuned.append((rows, weighting * weight))
    mixed = mix(compared, tuned)
    if not both:
        mixed = {name: torch.cat([original[name].chunk(2)[0], rows]) for name, rows in mixed.items()}
    return original, mixed


def guidance_pair(conditions: Conditions) -> Conditions:
    """1 + B rows, the unconditional one and B conditional ones -> 2B rows, B unconditional ones first."""
    pairs = {}
    for name, rows in conditions.items():
        pairs[name] = torch.cat([rows[:1].expand_as(rows[1:]), rows[1:]])
    return pairs


def count_cut(tokenizer, prompts: list[str]) -> int:
    """How many prompts have more tokens than the text encoder reads and are truncated."""
    lengths = map(len, tokenizer(prompts, verbose=False).input_ids)
    return sum(length > tokenizer.model_max_length for length in lengths)

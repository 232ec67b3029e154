"""Small models, prompts and ways of decoding for the tests of generations."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.generation.beam_search import BeamSearch
from attention.generation.sampling import Greedy, Sampling
from attention.generation.search import DecodingRequest
from attention.generation.transformer import Transformer, TransformerConfig

VOCAB = 60
EOS = 3
LENGTHS = (1, 16, 33, 48)
METHODS = {
    "greedy": Greedy(),
    "samples": Sampling(3, seed=7),
    "beams": BeamSearch(3),
    "unpenalised beams": BeamSearch(4, length_penalty=0.0, early_stopping=True),
}


def transformer(dtype: torch.dtype = torch.float64, vocab_size: int = VOCAB, seed: int = 0) -> Transformer:
    return Transformer(
        TransformerConfig(
            vocab_size=vocab_size,
            hidden_dim=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=48,
            dtype=dtype,
            seed=seed,
        )
    )


def prompt(length: int, seed: int = 0, vocab_size: int = VOCAB) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch(method, max_tokens: int = 20, lengths=LENGTHS, eos: int | None = EOS) -> list[DecodingRequest]:
    return [
        DecodingRequest(prompt(length, length), max_tokens, method, eos, request_id=number)
        for number, length in enumerate(lengths)
    ]


def logits_of(model: Transformer, tokens: list[int]) -> Tensor:
    """Logits behind the last token of a sequence that is computed as a whole."""
    kv = model.contiguous_kv()
    metadata = kv.extend([kv.new()], [len(tokens)])
    return model(torch.tensor(tokens), torch.arange(len(tokens)), kv, metadata)[-1]


def total(model: Transformer, start: list[int], tokens: tuple[int, ...]) -> float:
    """Sum of the log-probabilities of tokens that follow a prompt."""
    history, score = list(start), 0.0
    for token in tokens:
        score += float(torch.log_softmax(logits_of(model, history), 0)[token])
        history.append(token)
    return score

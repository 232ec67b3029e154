"""Generation: a small transformer that decodes for real over a paged cache."""

from attention.generation.beam_search import BeamSearch
from attention.generation.decoding import decode
from attention.generation.sampling import Greedy, Sampling
from attention.generation.search import DecodingRequest
from attention.generation.transformer import Transformer, TransformerConfig

__all__ = [
    "BeamSearch", "DecodingRequest", "Greedy", "Sampling", "Transformer", "TransformerConfig", "decode",
]  # fmt: skip

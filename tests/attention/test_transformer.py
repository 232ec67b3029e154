"""The transformer: against a plain forward pass over whole sequences, over both kinds of cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from attention.generation.transformer import Transformer, TransformerConfig
from attention.rotary import rotate, rotations

CONFIG = TransformerConfig(
    vocab_size=50, hidden_dim=32, num_heads=4, num_kv_heads=2, dtype=torch.float64, seed=4
)


def tokens_of(length: int, seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def oracle(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits of a whole sequence at once, head by head and query by query, with RoPE as complex numbers."""
    config = model.config
    dim, group = config.head_dim, config.num_heads // config.num_kv_heads

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).sqrt()

    def turned(x: Tensor) -> Tensor:  # [length, head_dim] of one head
        frequencies = config.rope_theta ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
        pairs = torch.complex(x[:, : dim // 2], x[:, dim // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([pairs.real, pairs.imag], dim=1)

    x = model.embedding[tokens]
    for layer in model.layers:
        y = norm(x)
        heads = []
        for head in range(config.num_heads):
            mine = slice(head * dim, (head + 1) * dim)
            theirs = slice(head // group * dim, (head // group + 1) * dim)
            q, k = turned(y @ layer.q_weight[mine].T), turned(y @ layer.k_weight[theirs].T)
            v = y @ layer.v_weight[theirs].T
            rows = []
            for place in range(len(x)):
                weights = torch.softmax(q[place] @ k[: place + 1].T / dim**0.5, dim=0)
                rows.append(weights @ v[: place + 1])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, dim=1) @ layer.out_weight.T
        y = norm(x)
        x = x + (silu(y @ layer.gate_weight.T) * (y @ layer.up_weight.T)) @ layer.down_weight.T
    return norm(x) @ model.head.T


def chunked(model: Transformer, kv, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Logits of a sequence that is computed in chunks of these sizes."""
    seq_id = kv.new()
    logits, begin = [], 0
    for size in sizes:
        metadata = kv.extend([seq_id], [size])
        positions = torch.arange(begin, begin + size)
        logits.append(model(tokens[begin : begin + size], positions, kv, metadata))
        begin += size
    return torch.cat(logits)


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("sizes", [[13], [1] * 13, [5, 4, 4], [12, 1]])
def test_every_way_through_both_caches_gives_the_logits_of_the_whole_sequence(sizes, tied_head):
    model = Transformer(replace(CONFIG, tied_head=tied_head))
    tokens = tokens_of(13)
    expected = oracle(model, tokens)
    for kv in (model.contiguous_kv(), model.paged_kv(8, 4, "reference"), model.paged_kv(8, 4, "torch")):
        torch.testing.assert_close(chunked(model, kv, tokens, sizes), expected, rtol=1e-12, atol=1e-12)


def test_sequences_of_a_ragged_batch_do_not_see_each_other():
    model = Transformer(CONFIG)
    lengths = [3, 8, 1]
    prompts = [tokens_of(length, seed) for seed, length in enumerate(lengths)]
    for kv in (model.contiguous_kv(), model.paged_kv(8, 4, "torch")):
        metadata = kv.extend([kv.new() for _ in lengths], lengths)
        positions = torch.cat([torch.arange(length) for length in lengths])
        logits = model(torch.cat(prompts), positions, kv, metadata)
        for prompt, rows in zip(prompts, logits.split(lengths), strict=True):
            torch.testing.assert_close(rows, oracle(model, prompt), rtol=1e-12, atol=1e-12)


def test_grouped_queries_are_repeated_heads_of_k_and_v():
    grouped = Transformer(CONFIG)
    full = Transformer(replace(CONFIG, num_kv_heads=CONFIG.num_heads))
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("k_weight", "v_weight")):
            heads = weight.view(CONFIG.num_kv_heads, CONFIG.head_dim, -1)
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = tokens_of(9)
    one, other = (chunked(model, model.paged_kv(8, 4), tokens, [7, 1, 1]) for model in (grouped, full))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rotation_makes_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def score(query_at: int, key_at: int) -> Tensor:
        at = [rotations(torch.tensor([place]), 8, 10_000.0, torch.float64) for place in (query_at, key_at)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100))
    torch.testing.assert_close(score(5, 5), (q * k).sum())
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_the_seed_makes_the_weights_and_the_dtype_rounds_them():
    exact = Transformer(CONFIG)
    single = Transformer(replace(CONFIG, dtype=torch.float32))
    other = Transformer(replace(CONFIG, seed=5))
    for name, weight in exact.state_dict().items():
        assert torch.equal(weight.float(), single.state_dict()[name])
    assert not torch.equal(exact.embedding, other.embedding)
    assert Transformer(replace(CONFIG, tied_head=True)).head.shape == exact.head.shape


def test_half_precision_is_near(device):
    config = replace(CONFIG, dtype=torch.bfloat16)
    model = Transformer(config, device)
    tokens = tokens_of(9)
    kv = model.paged_kv(8, 4, "torch")
    metadata = kv.extend([kv.new()], [9])
    logits = model(tokens.to(device), torch.arange(9, device=device), kv, metadata)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.double().cpu(), oracle(Transformer(CONFIG), tokens), rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_kv_heads", 3, "num_heads: got 4, expected a multiple of 3 KV heads"),
        ("hidden_dim", 36, "hidden_dim: got 36, expected a multiple of 8"),
        ("num_layers", 0, "num_layers: got 0, expected at least 1"),
        ("dtype", torch.int32, "dtype: got torch.int32"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(field, value, told):
    with pytest.raises(ValueError, match=told):
        replace(CONFIG, **{field: value})

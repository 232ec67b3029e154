"""Lengths drawn from a file."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from sim.errors import UserError
from workloads import Empirical, Streams


def test_pairs_of_the_file_come_together_and_equally_often(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv.gz"
    path.write_bytes(
        gzip.compress(b"num_prefill_tokens,num_decode_tokens,pd_ratio\n10,1,x\n20,2,x\n30,3,x\n40,0,x\n")
    )
    prompts, outputs = Empirical(path=path).sample(Streams(0)("lengths"), 40_000, 2048)
    assert set(zip(prompts.tolist(), outputs.tolist(), strict=True)) == {(10, 1), (20, 2), (30, 3), (40, 1)}
    assert np.bincount(prompts)[[10, 20, 30, 40]] == pytest.approx(np.full(4, 10_000), rel=0.05)
    prompts, outputs = Empirical(path=path, max_prompt=15, max_output=2).sample(
        Streams(0)("lengths"), 1000, 2048
    )
    assert set(zip(prompts.tolist(), outputs.tolist(), strict=True)) == {(10, 1), (15, 1), (15, 2)}


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("input,asked,answered\nx,7,8\n")
    sampler = Empirical(path=path, prompt_column="asked", output_column="answered")
    assert sampler.prompts.tolist() == [7]
    assert sampler.outputs.tolist() == [8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt_tokens,output_tokens\n5,6\n5,six\n",
            ":3: output_tokens: got 'six', expected a whole number of tokens from 0 to 2147483647",
        ),
        ("prompt_tokens,output_tokens\n5,6\n\n0,6\n", ":4: got a prompt of 0 tokens, expected at least 1"),
        ("prompt_tokens,output_tokens\n", ": no rows under the header"),
        (
            "prompt_tokens,decoded\n1,2\n",
            ":1: no column for output tokens: got prompt_tokens, decoded; expected output_t",
        ),
        ("", ":1: the file is empty, expected a header such as prompt_tokens, output_tokens"),
    ],
)
def test_a_bad_file_is_told_before_anything_is_drawn(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Empirical(path=path)
    assert str(caught.value).startswith(f"{path}{message}")

"""`kvsim bench beams`: how often beams die in a real beam search, beside the simulator's model of it."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from attention.generation.beam_search import BeamSearch
from attention.generation.ngram import NGram
from attention.generation.search import DecodingRequest
from experiments.text import table
from sim.allocators import Capacity
from sim.allocators.paged import PagedAllocator
from sim.genealogy import Turnover, draw_parents
from sim.recorder import Recorder
from sim.schedulers.vllm_v0 import VllmV0
from sim.simulation import simulate
from sim.timing import Transfers
from sim.timing.fixed import Fixed
from workloads.arrivals import Burst
from workloads.lengths import Fixed as FixedLengths
from workloads.sampling import Sampling, measured_turnover
from workloads.streams import Streams
from workloads.synthetic import Synthetic

ORDER = 5
"""The order that foretells held-back text best, as the table of perplexities shows."""
PIECE = 200
"""Words of the pieces of which a tenth is held back for the perplexity."""
WIDTHS = (2, 3, 4, 6, 8, 16)
AGES = (range(1, 2), range(2, 4), range(4, 8), range(8, 16), range(16, 32))
SEARCHES = 100
PROMPT, OUTPUT = 8, 58
"""Tokens of a prompt, and of what is generated: the mean output of Alpaca."""
FEW, LONG, LONG_WIDTHS = 40, 200, (2, 4, 6)
"""Searches of more tokens, and how many."""

Text = Sequence[int]


def bench_beams(folder: Path) -> str:
    """Perplexity by order of the model, then deaths and sharing by width, measured and modelled."""
    text, vocab_size = read_text()
    models = table(
        f"n-gram models of {len(text):,} words of Python's documentation, {vocab_size:,} different",
        ["order", "perplexity of held-back text"],
        [
            [str(order), f"{held_out_perplexity(text, order, vocab_size):.1f}"]
            for order in range(ORDER - 2, ORDER + 2)
        ],
    )
    model = NGram([text], ORDER, vocab_size)
    rows = []
    for width in WIDTHS:
        measured = [search(model, prompt, width) for prompt in prompts(text)]
        saved = _saved(measured)
        default = measured_turnover(width)
        died = sum([search.died for search in measured], Counter[int]())
        lived = sum([search.lived for search in measured], Counter[int]())
        chances = [sum(died[age] for age in ages) / sum(lived[age] for age in ages) for ages in AGES]
        rows.append(
            [
                str(width),
                " ".join(f"{chance:.2f}" for chance in chances),
                " ".join(f"{default.young / _middle(ages) ** default.decay:.2f}" for ages in AGES),
                f"{sum(died.values()) / sum(lived.values()):.3f}",
                f"{modelled_deaths(width, default):.3f}",
                f"{100 * saved:.1f}",
                f"{100 * modelled_saving(width, default):.1f}",
            ]
        )
    ages = " ".join(f"{ages.start}-{ages.stop - 1}" if len(ages) > 1 else f"{ages.start}" for ages in AGES)
    header = [
        "width", f"die at age {ages}", "by the model", "die in a step", "by the model", "tokens saved, %",
        "by the model, %",
    ]  # fmt: skip
    title = f"{SEARCHES} beam searches with the model of order {ORDER}, {OUTPUT} tokens behind {PROMPT}"
    longer = []
    for width in LONG_WIDTHS:
        saved = _saved([search(model, prompt, width, LONG) for prompt in prompts(text)[:FEW]])
        modelled = modelled_saving(width, measured_turnover(width), LONG)
        longer.append([str(width), f"{100 * saved:.1f}", f"{100 * modelled:.1f}"])
    lasting = f"{FEW} of them of {LONG} tokens"
    return "\n".join([models, table(title, header, rows), table(lasting, ["width", *header[-2:]], longer)])


def _saved(searches: Sequence[Search]) -> float:
    return sum(search.saved for search in searches) / sum(search.unshared for search in searches)


def _middle(ages: range) -> float:
    """The age in the middle of some, by ratio."""
    return float((ages.start * (ages.stop - 1)) ** 0.5)


def read_text() -> tuple[Text, int]:
    """The docstrings of Python's standard library, in words and punctuation: as numbers from 0, and how many.

    Those of its modules, not of its packages; they are there wherever Python is, and differ little between versions.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    words = [
        word for file in files for text in _docstrings(file) for word in re.findall(r"\w+|[^\w\s]", text)
    ]
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word.lower(), len(numbers)) for word in words], len(numbers)


def _docstrings(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def held_out_perplexity(text: Text, order: int, vocab_size: int) -> float:
    """Perplexity of a tenth of the text, drawn in pieces, of a model of the rest."""
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    random.Random(0).shuffle(pieces)
    held = len(pieces) // 10
    return NGram(pieces[held:], order, vocab_size).perplexity(pieces[:held])


def prompts(text: Text) -> list[Text]:
    """Words of the text from places that are drawn, the same every time."""
    draw = random.Random(0)
    starts = [draw.randrange(len(text) - PROMPT) for _ in range(SEARCHES)]
    return [text[start : start + PROMPT] for start in starts]


class Search:
    """What a beam search did: beams by age that stood before a step, and those of them without a successor in it.

    An age is the number of steps since the beam was forked; of several successors the likeliest goes on as their
    beam. And the tokens that beams had in common.
    """

    def __init__(self) -> None:
        self.lived: Counter[int] = Counter()
        self.died: Counter[int] = Counter()
        self.saved = 0
        self.unshared = 0


def search(model: NGram, prompt: Text, width: int, output: int = OUTPUT) -> Search:
    """A beam search of so many tokens; sharing is that of the steps in which they are computed.

    The first tokens all come from the prompt and are no turnover; the last ones are not computed.
    """
    request = DecodingRequest(prompt=prompt, max_tokens=output + 1, method=BeamSearch(width))
    beams = request.method.start(request, keep=False)
    histories = [list(prompt)]
    nodes: list[tuple[int, ...]] = [tuple(range(PROMPT))]  # a number for each computed token, equal if shared
    number = PROMPT
    ages = [1] * width
    found = Search()
    for step in range(output - 1):
        live = beams.choose(model.logits(histories)).live
        histories = [[*histories[pick.row], pick.token] for pick in live]
        nodes = [(*nodes[pick.row], number + place) for place, pick in enumerate(live)]
        number += width
        if step:
            rows = [pick.row for pick in live]  # from the likeliest on
            found.lived.update(ages)
            found.died.update([age for beam, age in enumerate(ages) if beam not in rows])
            ages = [ages[row] + 1 if row not in rows[:place] else 1 for place, row in enumerate(rows)]
        unshared = sum(map(len, nodes))
        found.unshared += unshared
        found.saved += unshared - len(set(chain.from_iterable(nodes)))
    return found


def modelled_deaths(width: int, turnover: Turnover) -> float:
    """The share of beams that die in a step in the simulator."""
    parents = np.stack([draw_parents(turnover, width, OUTPUT - 2, number) for number in range(SEARCHES)])
    survivors = 1 + (np.diff(np.sort(parents, axis=2), axis=2) > 0).sum(axis=2)
    return float(1 - survivors.mean() / width)


def modelled_saving(width: int, turnover: Turnover, output: int = OUTPUT) -> float:
    """The same saving in the simulator, with blocks of one token."""
    workload = Synthetic(
        Streams(0),
        PROMPT + output,
        num_requests=SEARCHES,
        arrivals=Burst(),
        lengths=FixedLengths(prompt=PROMPT, output=output),
        sampling=Sampling(beam_width=width),
    )
    workload.beams = turnover, 0
    slots = 2 * SEARCHES * width * (PROMPT + output)
    memory = PagedAllocator(Capacity(slots, PROMPT + output), block_size=1)
    summary = simulate(
        workload,
        scheduler=VllmV0(memory, max_num_seqs=SEARCHES * width),
        timing=Fixed(prefill_ms=1e-6, decode_ms=1.0),
        transfers=Transfers(None, None, 1, copy_latency_us=0.0),
        recorder=Recorder(),
        max_model_len=PROMPT + output,
    )
    return summary["blocks_saved_share"]

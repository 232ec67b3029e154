"""Orders of the queue: predictions, deadlines, levels of service, fair shares of tenants.

A prompt takes 10 ms whatever its length, a decode 1 ms; one sequence runs at a time unless said otherwise.
"""

from __future__ import annotations

import math
import statistics

import pytest

from sim import Request, order
from sim.schedulers.vtc import TenantDecodeSet
from tests.sim.story import Story, ask, memory, scheduled


def served(who, requests, *, seqs: int = 1, kind: str = "vllm_v0", **fields) -> list[str]:
    """The prompts of a run, in order, with who gave way for them."""
    story = Story(scheduled(kind, memory(slots=400), max_num_seqs=seqs, order=who, **fields), requests)
    return [line for line in story.log if "prompt" in line]


def of_tenants(tenants: list[int], *rows: tuple[float, int, int]) -> list[Request]:
    requests = ask(*rows)
    for request, tenant in zip(requests, tenants, strict=True):
        request.tenant = tenant
    return requests


# Predictions


def test_a_prediction_is_wrong_by_a_lognormal_factor_of_its_own():
    requests = [Request(number, 0, 8, 100) for number in range(4000)]

    def errors(**fields) -> list[float]:
        return [math.log(order["sjf"](request, **fields) / 100) for request in requests]

    drawn = errors(noise=0.5, seed=3)
    assert statistics.mean(drawn) == pytest.approx(0, abs=0.03)
    assert statistics.stdev(drawn) == pytest.approx(0.5, abs=0.02)
    assert errors(noise=0.5, seed=3) == drawn
    assert errors(noise=1.0, seed=3) == pytest.approx([2 * error for error in drawn])
    assert abs(statistics.correlation(drawn, errors(noise=0.5, seed=4))) < 0.05
    assert [order["sjf"](request) for request in requests[:3]] == [100, 100, 100]


def test_the_shortest_goes_first_as_far_as_one_knows():
    requests = (0, 4, 9), (1, 4, 30), (2, 4, 10), (3, 4, 20)
    assert served(order["sjf"], ask(*requests)) == [
        "0: prompt 0(4)", "18: prompt 2(4)", "37: prompt 3(4)", "66: prompt 1(4)",
    ]  # fmt: skip


# Deadlines


def test_the_earliest_deadline_goes_first():
    def rule(request: Request) -> int:
        return order["edf"](request, target_s=0.05, per_prompt_token_ms=2.0)

    # Deadlines: 130 ms for 1, which is long; 64 for 2; 3 comes last and is due at 59.
    requests = ask((0, 4, 1), (0, 40, 1), (2, 6, 1), (5, 2, 1))
    assert [rule(request) / 1e6 for request in requests] == [58, 130, 64, 59]
    assert [line.split()[2] for line in served(rule, requests)] == ["0(4)", "3(2)", "2(6)", "1(40)"]


# FastServe's levels


def test_who_has_used_up_its_quantum_gives_way_to_a_new_one():
    levels = order["mlfq"](quantum=2, prompt_weight=0)
    story = Story(
        scheduled("vllm_v0", memory(slots=64), max_num_seqs=1, order=levels), ask((0, 4, 8), (11.5, 4, 2))
    )
    assert story.log == [
        "0: prompt 0(4)",
        "10: decode 0",  # its second output: the quantum of the first level
        "11: decode 0",
        "12: prompt 1(4), recompute 0",  # 1 has come
        "22: decode 1",
        "23: prompt 0(7)",  # with the three outputs that it had
        *(f"{at}: decode 0" for at in (33, 34, 35, 36)),
    ]


def test_nobody_gives_way_to_an_equal():
    levels = order["mlfq"](quantum=16, prompt_weight=0)
    assert served(levels, ask((0, 4, 8), (11.5, 4, 2))) == ["0: prompt 0(4)", "17: prompt 1(4)"]


def test_nobody_gives_way_where_there_is_room():
    levels = order["mlfq"](quantum=1, prompt_weight=0)
    assert served(levels, ask((0, 4, 8), (11.5, 4, 2)), seqs=2) == ["0: prompt 0(4)", "12: prompt 1(4)"]


def test_a_long_prompt_joins_a_lower_level():
    levels = order["mlfq"](quantum=2, prompt_weight=0.1)
    requests = (0, 4, 1), (1, 40, 1), (2, 4, 1)
    assert served(levels, ask(*requests)) == ["0: prompt 0(4)", "10: prompt 2(4)", "20: prompt 1(40)"]
    levels = order["mlfq"](quantum=4, prompt_weight=0.1)  # 40 tokens count for 4
    assert served(levels, ask(*requests)) == ["0: prompt 0(4)", "10: prompt 1(40)", "20: prompt 2(4)"]


def test_quanta_double_from_level_to_level():
    """With 1, 2 and 4 outputs a level, 0 gives way to one of the second after 3 and to one of the third after 7."""
    levels = order["mlfq"](quantum=1, prompt_weight=0.1)
    requests = ask((0, 4, 9), (1, 20, 1), (1, 40, 1))
    # 1 joins the second level (20 tokens count for 2), 2 the third.
    assert served(levels, requests) == [
        "0: prompt 0(4)",
        "12: prompt 1(20), recompute 0",
        "22: prompt 0(7)",
        "35: prompt 2(40), recompute 0",
        "45: prompt 0(11)",
    ]


@pytest.mark.parametrize(("patience", "at"), [(0.025, "30"), (0.035, "40"), (None, "60")])
def test_who_waits_too_long_is_promoted(patience, at):
    short = [(9 + 10 * number, 4, 1) for number in range(5)]
    levels = order["mlfq"](quantum=2, prompt_weight=0.1, starvation_s=patience)
    prompts = served(levels, ask((0, 4, 1), (1, 40, 1), *short))
    assert f"{at}: prompt 1(40)" in prompts
    assert len(prompts) == 7


def test_the_worst_gives_way_first_and_only_as_many_as_needed():
    levels = order["mlfq"](quantum=2, prompt_weight=0)
    requests = ask((0, 4, 20), (0, 4, 20), (11.5, 4, 1))
    assert served(levels, requests, seqs=2)[:2] == ["0: prompt 0(4) 1(4)", "12: prompt 2(4), recompute 1"]


# Fair shares


def test_tenants_take_turns():
    requests = of_tenants([0, 0, 0, 1, 1], *[(0, 4, 3)] * 3, *[(5, 4, 3)] * 2)
    prompts = served(order["vtc"](), requests)
    assert [line.split()[2][0] for line in prompts] == ["0", "3", "1", "4", "2"]


def test_counters_weigh_prompts_and_outputs():
    """Tenant 0 asks for long prompts, 1 for long outputs; each has two more requests that wait."""
    rows = (0, 40, 2), (0, 40, 2), (0, 40, 2), (0, 4, 12), (0, 4, 12), (0, 4, 12)
    # A request of tenant 0 counts 40 w + 2, one of tenant 1 4 w + 12: tied in the beginning, 0 goes first.
    by_prompts = served(order["vtc"](input_weight=1, output_weight=1), of_tenants([0, 0, 0, 1, 1, 1], *rows))
    assert [line.split()[2][0] for line in by_prompts] == [
        "0",
        "3",
        "4",
        "5",
        "1",
        "2",
    ]  # 42 against 16, 32, 48
    by_outputs = served(
        order["vtc"](input_weight=0.01, output_weight=1), of_tenants([0, 0, 0, 1, 1, 1], *rows)
    )
    assert [line.split()[2][0] for line in by_outputs] == [
        "0",
        "3",
        "1",
        "2",
        "4",
        "5",
    ]  # 2.4, 12.04, 4.8, 7.2


def test_the_token_that_a_prompt_ends_in_counts():
    rows = (0, 1, 1), (0, 1, 1), (0, 1, 1), (0, 40, 1), (0, 40, 1)
    fair = order["vtc"](input_weight=0.01, output_weight=1)
    prompts = served(fair, of_tenants([0, 0, 0, 1, 1], *rows))
    assert [line.split()[2][0] for line in prompts] == ["0", "3", "1", "4", "2"]  # 1.01, 1.4, 2.02


def test_what_is_computed_again_is_not_counted_again():
    fair = order["vtc"]()
    policy = scheduled("vllm_v0", memory(slots=24), order=fair)
    story = Story(policy, of_tenants([0, 1, 1], (0, 10, 8), (0, 12, 3), (11.5, 6, 2)))
    assert story.summary["recomputed_tokens"] > 0
    assert [fair._accounts[tenant].prompts for tenant in (0, 1)] == [10, 18]
    assert fair.counter(policy, 0) == 10 + 2 * 8


def test_nobody_saves_up_service_by_staying_away():
    """Tenant 1 comes when 0 has had a counter of 46, and is lifted to 40 + 2 and the 4 of the decodes until then."""
    rows = (0, 40, 5), (0, 4, 3), (0, 4, 3), (13, 4, 3), (13, 4, 3)
    requests = of_tenants([0, 0, 0, 1, 1], *rows)
    prompts = served(order["vtc"](output_weight=1), requests)
    assert [line.split()[2][0] for line in prompts] == ["0", "3", "1", "4", "2"]
    alone = order["vtc"](output_weight=1)
    alone._floor = lambda queues, tenant: 0.0  # without the lift
    requests = of_tenants([0, 0, 0, 1, 1], *rows)
    assert [line.split()[2][0] for line in served(alone, requests)] == ["0", "3", "4", "1", "2"]


def test_the_order_may_change_while_somebody_runs():
    """Both run; the queue is refused. Tenant 0, two of whose requests run, falls behind as they decode."""
    rows = (0, 4, 9), (0, 4, 9), (0, 4, 5), (1, 4, 2), (1, 4, 2)
    requests = of_tenants([0, 0, 1, 0, 1], *rows)
    policy = scheduled("vllm_v0", memory(slots=400), max_num_seqs=3, order=order["vtc"]())
    story = Story(policy, requests, stretches=True)
    assert [line for line in story.log if "prompt" in line][1] == "14: prompt 4(4)"


def test_the_decode_set_counts_by_tenant():
    decodes = TenantDecodeSet()
    sequences = []
    for number, tenant in enumerate((0, 1, 1)):
        request = Request(number, 0, 4, 9, tenant=tenant)
        policy = scheduled("vllm_v0", memory(slots=64))
        policy.add(request)
        sequences.append(policy.plan(0).chunks[0][0])
    decodes.join(sequences[0])
    decodes.advance(3)
    decodes.join(sequences[1])
    decodes.join(sequences[2])
    decodes.advance(2)
    assert [decodes.members(tenant) for tenant in (0, 1, 2)] == [1, 2, 0]
    assert [decodes.delivered(tenant) for tenant in (0, 1, 2)] == [5, 4, 0]
    decodes.leave(sequences[1])
    decodes.advance()
    assert [decodes.delivered(tenant) for tenant in (0, 1)] == [6, 5]


# What is known of requests that are over is dropped


def test_levels_of_requests_that_are_over_are_forgotten(monkeypatch):
    monkeypatch.setattr("sim.schedulers.mlfq._FEW", 8)
    levels = order["mlfq"]()
    served(levels, ask(*[(number * 20, 4, 1) for number in range(100)]))
    assert len(levels._places) < 20

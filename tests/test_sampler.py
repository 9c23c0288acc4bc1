"""Sampling: the kept tokens and their probabilities are those of transformers; stop strings never show."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashmoe.errors import ConfigError, ModelError
from flashmoe.sampler import Sampler, SamplingParams, StopStrings, log_probabilities

V = 1000


def random_logits(seed: int, vocab_size: int = V, spread: float = 3.0) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def draws(params: SamplingParams, logits: Tensor, n: int) -> list[int]:
    sampler = Sampler(params, len(logits))
    return [sampler.next_token(logits, []) for _ in range(n)]


# Against transformers


def transformers_probabilities(params: SamplingParams, logits: Tensor, history: list[int]) -> Tensor:
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        steps.append(MinPLogitsWarper(params.min_p))
    ids: Any = torch.tensor([history])
    return steps(ids, logits[None].clone())[0].softmax(0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 40},
        {"temperature": 1.0, "top_k": V + 1},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.3, "top_p": 0.01},
        {"temperature": 2.0, "top_p": 0.999},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 0.8, "repetition_penalty": 1.3},
        {"temperature": 0.8, "repetition_penalty": 0.5},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(5))
def test_kept_tokens_and_probabilities_are_those_of_transformers(options: dict[str, Any], seed: int) -> None:
    params, logits = SamplingParams(**options), random_logits(seed)
    history = [1, 5, 5, 7, int(logits.argmax()), int(logits.argmin())]
    expected = transformers_probabilities(params, logits, history)
    ids, probabilities = Sampler(params, V).candidates(logits, history)
    assert ids.tolist() == expected.nonzero().squeeze(1).tolist()
    torch.testing.assert_close(torch.from_numpy(probabilities), expected[ids])


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20, unique=True),
    top_k=st.integers(0, 25),
    temperature=st.floats(0.1, 3),
)
def test_top_k_keeps_the_k_likeliest(logits: list[float], top_k: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k)
    ids, probabilities = Sampler(params, len(logits)).candidates(torch.tensor(logits), [])
    ranking = sorted(range(len(logits)), key=lambda i: -logits[i])
    assert ids.tolist() == sorted(ranking[: top_k or None])
    assert float(probabilities.sum()) == pytest.approx(1)


# Small stories


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id() -> None:
    sampler = Sampler(SamplingParams(temperature=0), 5)
    assert sampler.next_token(torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0]), []) == 1


def test_a_temperature_next_to_zero_is_greedy_too() -> None:
    assert draws(SamplingParams(temperature=1e-30), torch.tensor([0.0, 1e-3]), 20) == [1] * 20
    assert draws(SamplingParams(temperature=1e-4), torch.tensor([0.0, 1.0]), 20) == [1] * 20


def test_the_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2), 3)
    logits = torch.tensor([4.0, 3.0, -1.0])
    assert sampler.next_token(logits, [0, 0, 0]) == 1  # 4 / 2 = 2, not 4 / 8
    assert sampler.next_token(logits, [0, 1]) == 0
    assert sampler.next_token(torch.tensor([-1.0, -1.5, -9.0]), [0]) == 1  # -1 * 2 = -2
    assert logits.tolist() == [4, 3, -1], "the caller's logits are left alone"


def test_top_p_keeps_as_few_as_reach_it_and_the_lowest_ids_of_equals() -> None:
    sampler = Sampler(SamplingParams(temperature=1, top_p=0.5), 1024)
    ids, probabilities = sampler.candidates(torch.zeros(1024), [])
    assert ids.tolist() == list(range(512))
    assert probabilities.tolist() == [1 / 512] * 512


def test_top_p_cuts_between_equals_so_that_the_lowest_ids_stay() -> None:
    sampler = Sampler(SamplingParams(temperature=1, top_p=0.5), 1024)
    ids, _ = sampler.candidates(torch.tensor([0.0, 1.0] * 512), [])  # the odd ones have 73 % together
    assert ids.tolist() == list(range(1, 702, 2))


def test_the_likeliest_token_always_stays() -> None:
    params = SamplingParams(temperature=1, top_p=1e-9, min_p=1, top_k=1)
    assert draws(params, random_logits(0), 5) == [int(random_logits(0).argmax())] * 5
    assert len(draws(SamplingParams(temperature=1, top_p=1e-9), torch.zeros(V), 1)) == 1


def test_a_token_ruled_out_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert set(draws(SamplingParams(temperature=1, top_k=4), logits, 100)) == {1, 3}


def test_a_token_ruled_out_is_not_drawn_by_the_lowest_draw_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.zeros((), dtype=torch.float64))
    assert draws(SamplingParams(temperature=1), torch.tensor([-torch.inf, 0.0, 0.0]), 1) == [1]


def test_logits_masked_with_the_lowest_number_are_ruled_out_too() -> None:
    lowest = torch.finfo(torch.float32).min
    params = SamplingParams(temperature=0.5, repetition_penalty=1.1, top_p=0.99)
    ids, probabilities = Sampler(params, 3).candidates(torch.tensor([lowest, 1.0, 1.0]), [0])
    assert (ids.tolist(), probabilities.tolist()) == ([1, 2], [0.5, 0.5])


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    first = draws(SamplingParams(temperature=1, seed=7), random_logits(0), 50)
    assert draws(SamplingParams(temperature=1, seed=7), random_logits(0), 50) == first
    assert draws(SamplingParams(temperature=1, seed=8), random_logits(0), 50) != first


def test_without_a_seed_a_sampler_takes_a_new_one_and_tells_it() -> None:
    sampler = Sampler(SamplingParams(temperature=1), V)
    tokens = [sampler.next_token(random_logits(0), []) for _ in range(50)]
    assert draws(SamplingParams(temperature=1, seed=sampler.seed), random_logits(0), 50) == tokens
    assert Sampler(SamplingParams(temperature=1), V).seed != sampler.seed


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 5 tokens: 18.5 is exceeded once in a thousand; the seed is fixed."""
    expected = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    drawn = draws(SamplingParams(temperature=1, seed=0), expected.log(), 4000)
    counts = torch.tensor(drawn).bincount(minlength=5)
    assert float(((counts - 4000 * expected) ** 2 / (4000 * expected)).sum()) < 18.5


def test_half_precision_logits_are_taken_as_they_are() -> None:
    assert Sampler(SamplingParams(), 3).next_token(torch.tensor([1, 3, 2], dtype=torch.bfloat16), []) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0, torch.nan, 1], [0, torch.inf, 1], [-torch.inf] * 3], ids=str)
def test_logits_that_are_not_numbers_are_a_model_error(bad: list[float], temperature: float) -> None:
    with pytest.raises(ModelError, match="logits are not numbers"):
        Sampler(SamplingParams(temperature=temperature), 3).next_token(torch.tensor(bad), [])


def test_logits_of_another_vocabulary_are_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"shape \(4,\) for a vocabulary of 3"):
        Sampler(SamplingParams(), 3).next_token(torch.zeros(4), [])


# Parameters


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", -0.1, "a number from 0 to 100"),
        ("temperature", float("nan"), "a number from 0 to 100"),
        ("temperature", float("inf"), "a number from 0 to 100"),
        ("temperature", "hot", "a number from 0 to 100"),
        ("temperature", True, "a number from 0 to 100"),
        ("temperature", 10**400, "a number from 0 to 100"),
        ("top_p", 0, "a number above 0 to 1"),
        ("top_p", 1.1, "a number above 0 to 1"),
        ("top_k", -1, "a whole number from 0"),
        ("top_k", 2.5, "a whole number from 0"),
        ("top_k", True, "a whole number from 0"),
        ("min_p", -0.1, "a number from 0 to 1"),
        ("min_p", 2, "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number from 0.01 to 100"),
        ("seed", -1, "a whole number from 0"),
        ("seed", 2**64, "a whole number from 0"),
        ("max_tokens", 0, "a whole number from 1"),
        ("stop", ("",), "a tuple of strings, none of them empty"),
        ("stop", 3, "a tuple of strings, none of them empty"),
        ("stop", ["a", 1], "a tuple of strings, none of them empty"),
    ],
)
def test_a_senseless_option_is_refused_by_name_and_value(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} .* should be {wanted}$"):
        SamplingParams.from_generation_config({}, **{name: value})


def test_defaults_come_from_the_models_generation_config() -> None:
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": None,
        "max_new_tokens": 99,
        "stop_strings": ["</s>"],
        "transformers_version": "5.0",
    }
    assert SamplingParams.from_generation_config(config) == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, max_tokens=99, stop=("</s>",)
    )


@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        ({}, 0),
        ({"do_sample": False, "temperature": 0.6}, 0),
        ({"do_sample": True}, 1),
        ({"temperature": 0.6}, 0.6),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
    ],
)
def test_a_model_that_does_not_sample_is_greedy(config: dict[str, Any], temperature: float) -> None:
    assert SamplingParams.from_generation_config(config).temperature == temperature


def test_what_the_user_says_goes_over_the_file_and_none_says_nothing() -> None:
    config = {"do_sample": False, "top_k": 20, "top_p": 7}  # the bad top_p is no error, for it is overridden
    params = SamplingParams.from_generation_config(config, temperature=0.9, top_k=None, top_p=0.5, stop="END")
    assert params == SamplingParams(temperature=0.9, top_k=20, top_p=0.5, stop=("END",))


def test_a_bad_value_in_the_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_p 7 should be"):
        SamplingParams.from_generation_config({"top_p": 7})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown sampling option 'heat'; known are temperature, top_p"):
        SamplingParams.from_generation_config({}, heat=1)


# Stop strings


def streamed(pieces: Sequence[str], stop: Sequence[str]) -> tuple[list[str], bool]:
    """What is shown after each piece and at the end."""
    matcher = StopStrings(stop)
    return [*(matcher.push(piece) for piece in pieces), matcher.flush()], matcher.stopped


def test_text_up_to_a_stop_string_is_shown_and_nothing_after() -> None:
    assert streamed(["Hello wor", "ld. STOP", " more", "."], ["STOP"]) == (
        ["Hello wor", "ld. ", "", "", ""],
        True,
    )


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    assert streamed(["a<", "|e", "x", "<|"], ["<|end|>"]) == (["a", "", "<|ex", "", "<|"], False)


def test_the_stop_string_that_ends_first_counts() -> None:
    assert streamed(["xabcy"], ["abcy", "b"]) == (["xa", ""], True)
    assert streamed(["xabc"], ["c", "abc"]) == (["x", ""], True)


def test_without_stop_strings_text_passes_through() -> None:
    assert streamed(["a", "", "b"], []) == (["a", "", "b", ""], False)


stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@settings(deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=5), max_size=12), stop=stop_lists)
def test_streamed_text_joins_to_the_text_cut_at_the_first_stop(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stop))]
    expected = text
    if ends:
        longest = max(len(s) for s in stop if text[: ends[0]].endswith(s))
        expected = text[: ends[0] - longest]
    shown, stopped = streamed(pieces, stop)
    assert ("".join(shown), stopped) == (expected, bool(ends))


@settings(deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=5), max_size=12), stop=stop_lists)
def test_no_more_is_held_back_than_may_begin_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    matcher, pushed, shown = StopStrings(stop), "", ""
    for piece in pieces:
        pushed, shown = pushed + piece, shown + matcher.push(piece)
        if matcher.stopped:
            return
        held = pushed.removeprefix(shown)
        assert not held or any(s.startswith(held) and s != held for s in stop)


def test_frequency_and_presence_penalties_count_what_was_generated_and_not_the_prompt() -> None:
    logits = torch.tensor([2.0, 1.9, 1.0, 0.0])
    history = [0, 0, 1, 1, 2]  # a prompt of two tokens, then 1, 1, 2

    def chosen(**options: float) -> int:
        return Sampler(SamplingParams(**options), 4).next_token(logits, history, prompt_tokens=2)

    assert chosen() == 0
    penalised = Sampler(SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, temperature=1.0), 4)
    ids, probabilities = penalised.candidates(logits, history, 2)
    expected = torch.softmax(logits - torch.tensor([0.0, 1.25, 0.75, 0.0]), 0)
    torch.testing.assert_close(torch.from_numpy(probabilities), expected)
    assert ids.tolist() == [0, 1, 2, 3]
    assert chosen(frequency_penalty=-0.1) == 1  # twice 0.1 more
    assert logits.tolist() == pytest.approx([2.0, 1.9, 1.0, 0.0])


def test_only_what_is_allowed_is_drawn_whatever_the_other_options() -> None:
    logits = torch.arange(6.0)
    allowed = np.array([True, False, True, False, False, False])
    greedy = Sampler(SamplingParams(), 6)
    assert greedy.next_token(logits, [], 0, allowed) == 2
    for options in ({"top_k": 1}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.9}, {}):
        sampler = Sampler(SamplingParams(temperature=5.0, seed=1, **options), 6)
        assert {sampler.next_token(logits, [], 0, allowed) for _ in range(60)} <= {0, 2}
    last = np.array([True] + [False] * 5)
    assert Sampler(SamplingParams(temperature=1e-3, seed=1), 6).next_token(logits, [], 0, last) == 0


def test_log_probabilities_are_those_of_the_logits_as_they_are() -> None:
    logits = torch.tensor([0.5, 3.0, -1.0, 3.0, float("-inf")])
    values, top = log_probabilities(logits, 3)
    torch.testing.assert_close(torch.from_numpy(values), torch.log_softmax(logits, 0))
    assert top.tolist() == [1, 3, 0]  # the lower id first where two are equal
    assert log_probabilities(logits, 0)[1].tolist() == []
    with pytest.raises(ModelError, match="not numbers"):
        log_probabilities(torch.tensor([0.0, float("nan")]), 1)


@pytest.mark.parametrize(
    "bad", [{"frequency_penalty": 2.1}, {"presence_penalty": "1"}, {"logprobs": 21}, {"logprobs": -1}]
)
def test_penalties_and_log_probabilities_have_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**bad)

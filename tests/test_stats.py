"""The figures of a generation: what follows from what was counted, and that every name is there."""

import json
from dataclasses import fields

import pytest

from flashmoe.stats import GenerationStats, TokenStats

# What `--stats-json` promises, by name.
PROMISED = {
    "text", "token_ids", "prompt_tokens", "decode_tokens", "prefill_tokens_per_s", "decode_tokens_per_s",
    "time_to_first_token_s", "hit_rate", "hits", "misses", "expert_bytes_read", "stall_s",
    "bound_tokens_per_s", "peak_rss_bytes", "ram_budget_bytes", "policy", "reader",
}  # fmt: skip
MB = 10**6


def measured() -> GenerationStats:
    """100 prompt tokens, 20 of them known, in 4 s; then ten steps in 5 s, of which 3 s waited for 600 MB."""
    return GenerationStats(
        text="Paris.", token_ids=[7] * 11, finish_reason="stop", prompt_tokens=100, cached_tokens=20,
        prefill_tokens=80, decode_tokens=11, decode_steps=10, prefill_s=4.0, decode_s=5.0,
        time_to_first_token_s=4.1, hits=90, misses=60, expert_bytes_read=1500 * MB, stall_s=5.0,
        read_s=7.5, decode_hits=75, decode_misses=25, decode_bytes_read=600 * MB,
        decode_stall_s=3.0, drive_mb_per_s=200.0,
        peak_rss_bytes=3 << 30, rss_bytes=2 << 30, ram_budget_bytes=4 << 30, policy="lru", reader="direct",
        tokens=[TokenStats(7, "Paris", 0.5, 0.3, 7, 1, 60 * MB)],
    )  # fmt: skip


def test_speeds_and_shares_follow_from_the_counts() -> None:
    stats = measured()
    assert stats.prefill_tokens_per_s == 20.0  # 80 tokens run in 4 s; the 20 from the KV cache cost nothing
    assert stats.decode_tokens_per_s == 2.0  # ten steps in 5 s: the eleventh token came out of prefill
    assert stats.hit_rate == 0.6 and stats.decode_hit_rate == 0.75
    assert stats.bytes_per_token == 60 * MB
    assert stats.read_mb_per_s == 200.0  # 1500 MB in 7.5 s with reads in flight


def test_the_bound_is_the_slower_of_computing_and_reading() -> None:
    stats = measured()
    assert stats.bound_tokens_per_s == pytest.approx(10 / 3.0)  # 600 MB at 200 MB/s take 3 s, computing 2 s
    stats.drive_mb_per_s = 1000.0
    assert stats.bound_tokens_per_s == pytest.approx(10 / 2.0)
    stats.decode_bytes_read = 0
    assert stats.bound_tokens_per_s == pytest.approx(10 / 2.0)


def test_no_speed_is_above_its_bound_when_all_time_is_accounted_for() -> None:
    stats = measured()
    assert stats.decode_tokens_per_s <= stats.bound_tokens_per_s


def test_nothing_done_yet_gives_zeros_not_errors() -> None:
    stats = GenerationStats()
    derived = (
        stats.prefill_tokens_per_s, stats.decode_tokens_per_s, stats.hit_rate, stats.decode_hit_rate,
        stats.bytes_per_token, stats.read_mb_per_s, stats.bound_tokens_per_s,
    )  # fmt: skip
    assert derived == (0.0,) * 7
    assert "0.0 tok/s" in stats.line() and "hit rate" in str(stats)
    assert json.loads(json.dumps(stats.as_dict()))["finish_reason"] is None


def test_one_token_without_a_decode_step_has_no_decode_speed() -> None:
    stats = GenerationStats(decode_tokens=1, prefill_tokens=5, prefill_s=2.0, hits=3, misses=1)
    assert stats.decode_tokens_per_s == stats.bound_tokens_per_s == stats.bytes_per_token == 0.0
    assert stats.prefill_tokens_per_s == 2.5 and stats.hit_rate == 0.75


def test_a_drive_that_delivers_more_than_its_probe_is_held_to_what_it_delivered() -> None:
    stats = measured()
    stats.read_s = 5.0  # 1500 MB in 5 s; the probe said 200 MB/s
    assert stats.bound_tokens_per_s == pytest.approx(10 / 2.0)  # 600 MB at 300 MB/s: as long as computing


def test_a_drive_that_was_neither_probed_nor_read_leaves_only_the_computing_in_the_bound() -> None:
    stats = measured()
    stats.drive_mb_per_s = stats.read_s = 0.0
    assert stats.bound_tokens_per_s == pytest.approx(10 / 2.0)


def test_the_dictionary_has_every_promised_name_and_every_counter() -> None:
    values = json.loads(json.dumps(measured().as_dict()))
    assert values.keys() >= PROMISED
    assert values.keys() >= {field.name for field in fields(GenerationStats)} - {"tokens"}
    derived = {name for name, value in vars(GenerationStats).items() if isinstance(value, property)}
    assert derived and values.keys() >= derived
    assert values["decode_tokens_per_s"] == 2.0 and values["token_ids"] == [7] * 11
    assert values["policy"] == "lru" and values["reader"] == "direct"


def test_tokens_are_listed_only_when_asked_for() -> None:
    assert "tokens" not in measured().as_dict()
    (token,) = measured().as_dict(per_token=True)["tokens"]
    assert token == dict(
        token_id=7, text="Paris", time_s=0.5, stall_s=0.3, hits=7, misses=1, bytes_read=60 * MB
    )


def test_the_dictionary_is_a_copy() -> None:
    stats = measured()
    stats.as_dict(per_token=True)["token_ids"].append(1)
    assert stats.token_ids == [7] * 11 and len(stats.tokens) == 1


def test_the_line_after_an_answer_says_speed_hits_reads_stall_and_memory() -> None:
    expected = "2.0 tok/s · hit rate 75.0% · 60 MB read/token · stall 60% · RSS 2.0 GiB of 4.0 GiB"
    assert measured().line() == expected


def test_the_table_names_every_figure_with_its_unit() -> None:
    table = dict(measured().rows())
    assert table["prompt"] == "100 tokens, 20 of them from the KV cache"
    assert table["prefill"] == "20.0 tok/s, first token after 4.10 s"
    assert table["decode"] == "11 tokens, 2.00 tok/s (bound 3.33)"
    assert table["hit rate"] == "75.0% in decode (75 hits, 25 misses), 60.0% with prefill"
    assert table["read"] == "60.0 MB a token, 1500 MB in all, at 200 MB/s (probed: 200, direct)"
    assert table["stall"] == "5.00 s waiting for reads, 3.00 s of it in decode"
    assert table["memory"] == "RSS 2.0 GiB, peak 3.0 GiB of 4.0 GiB"
    assert table["policy"] == "lru"
    assert str(measured()).count("\n") == len(table) - 1


def test_two_generations_do_not_share_their_lists() -> None:
    one, other = GenerationStats(), GenerationStats()
    one.token_ids.append(1)
    assert other.token_ids == [] and other.tokens == []


def test_prefetch_says_what_it_did() -> None:
    assert dict(GenerationStats().rows())["prefetch"] == "off"
    stats = GenerationStats(prefetch="auto: on, time a token -8.0% with it", prefetch_issued=50,
                            prefetch_hits=20, prefetch_late=10, prefetch_bytes_wasted=40 * MB)  # fmt: skip
    assert dict(stats.rows())["prefetch"] == (
        "auto: on, time a token -8.0% with it; 50 guesses, 20 in time, 10 late, 40 MB in vain"
    )

"""The comparison with the policies of two papers: its counting, and all of it over a piece of a trace."""

import json
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cache_policies import lrb, paper_network
from cache_policies.belady import Belady
from cache_policies.policy import Geometry
from cache_policies.replay import replay
from flashmoe.policy_file import shipped_policy
from flashmoe.trace import load_trace
from scripts.compare_learned_baselines import COLUMNS, gap_closed, main, train_paper

SLICE = Path(__file__).parent / "data" / "gpt-oss-20b-slice.npz"
QUICK = (str(SLICE), "--sequences", "1", "--rows", "300", "--epochs", "2", "--jobs", "1")


def test_the_gap_goes_from_lru_to_belady() -> None:
    assert [gap_closed(rate, 0.25, 0.75) for rate in (0.25, 0.5, 0.75, 0)] == [0, 0.5, 1, -0.5]
    assert gap_closed(0.5, 0.5, 0.5) == 0


def test_networks_trained_layer_by_layer_are_those_trained_together() -> None:
    trace = load_trace(SLICE).rows(0, 60)
    ours = train_paper(trace, Namespace(seed=3, epochs=2, rows=50, jobs=1))
    together = paper_network.train(trace, seed=3, epochs=2, rows=50)
    for mine, theirs in zip(ours.matrices + ours.biases, together.matrices + together.biases, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_every_policy_stands_below_belady_and_the_last_line_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.txt"
    policy.write_text(shipped_policy(), "ascii")
    with mock.patch.object(lrb, "BATCH", 4000):  # so that both have models within the slice
        main([*QUICK, "--capacities", "8,5", "--policy", str(policy)])
    *table, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    assert (facts["held_out"], facts["rows"], facts["learned"]) == ("last fifth", 300, str(policy))
    assert [row["capacity"] for row in facts["capacities"]] == [5, 8]
    assert all(line.split()[0] == capacity for line, capacity in zip(table[-2:], "58", strict=True))
    for row in facts["capacities"]:
        hits, gaps = row["hit_rates"], row["gap_closed"]
        assert tuple(hits) == COLUMNS and max(hits.values()) == hits["belady"] > hits["lru"]
        assert (gaps["lru"], gaps["belady"]) == (0, 1)
        assert len({hits["lru"], hits["lrb"], hits["lrb warm"]}) == 3, "LRB had models, not the same"
    trace = load_trace(SLICE).select([3])
    geometry = Geometry(24, 32, 4, 5, per_layer=True)
    assert facts["capacities"][0]["hit_rates"]["belady"] == replay(trace, Belady(trace), geometry).hit_rate


def test_it_says_that_the_shipped_policy_has_seen_the_trace_and_trains_a_fair_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one_tree = shipped_policy().split("\nTree=1\n")[0] + "\nend of trees\n"
    name = "scripts.compare_learned_baselines"
    hits = []
    for options in ((), ("--train",)):
        with (
            mock.patch(f"{name}.train_paper"),
            mock.patch(f"{name}.hit_rate", return_value=0.5),
            mock.patch(f"{name}.train_policy", return_value=one_tree),
        ):
            main([*QUICK, "--capacities", "8", *options])
        *table, last = capsys.readouterr().out.splitlines()
        assert ("SEEN THIS TRACE" in "".join(table)) == (not options)
        hits.append(json.loads(last)["capacities"][0]["hit_rates"])
    assert {name for name in COLUMNS if hits[0][name] != hits[1][name]} == {"learned"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--fold", "1"), "has 1 folds, counted from 0"),
        (("--capacities", "3,8"), "--capacities go from 4, the experts of a token, to 32"),
        (("--policy", "some.txt", "--train"), "not allowed with"),
    ],
)
def test_a_wrong_option_ends_before_the_training(
    options: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*QUICK, *options])
    assert complaint in capsys.readouterr().err

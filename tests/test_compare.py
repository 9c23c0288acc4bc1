"""Policies compared, on traces and live: rows, gaps, capacities, held-out data sets, plot, command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_policies.policy import Geometry
from cache_policies.registry import make_policy
from cache_policies.replay import replay
from flashmoe import cli
from flashmoe.compare import Capacity, CompareRow, Comparison, build_policy, compare
from flashmoe.errors import ConfigError, FlashMoEError, TraceError
from flashmoe.npz import write_npz
from flashmoe.policy_plot import panels_of, write_plot
from flashmoe.trace import load_trace

ROOT = Path(__file__).parent.parent
FIELDS = ["trace", "policy", "scope", "capacity", "events", "hits", "misses", "hit_rate", "gap_closed"]
QUARTER, HALF = Capacity(0.25, True), Capacity(0.5, True)


def make_trace(path: Path, *, experts: int = 16, top_k: int = 2, rows: int = 120, seed: int = 0) -> Path:
    """Three data sets; popular experts, other ones in every layer."""
    random = np.random.default_rng(seed)
    popularity = random.permuted(np.tile(1.0 / np.arange(1, experts + 1), (3, 1)), axis=1)
    noise = random.gumbel(size=(rows, 3, experts))
    ids = np.argsort(-(np.log(popularity) + noise), axis=2)[:, :, :top_k].astype(np.uint8)
    third = rows // 3
    write_npz(
        path,
        {
            "experts": ids,
            "seq_offsets": np.array([0, third, 2 * third, rows]),
            "dataset": np.array(["code", "prose", "maths"]),
            "num_experts": np.array(experts),
        },
    )
    return path


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    return make_trace(tmp_path / "small.npz")


def by_policy(comparison: Comparison, **fixed: Any) -> dict[str, CompareRow]:
    return {
        row.policy: row
        for row in comparison.rows
        if all(getattr(row, name) == value for name, value in fixed.items())
    }


# On traces


def test_every_row_is_a_replay(trace_file: Path):
    trace = load_trace(trace_file)
    compared = compare(
        [trace_file], ["lfu", "random"], [QUARTER, Capacity(5, False)], ["layer", "global"], jobs=1
    )
    assert {(row.scope, row.capacity) for row in compared.rows} == {
        (scope, capacity) for scope in ("layer", "global") for capacity in (4, 5)
    }
    for row in compared.rows:
        per_layer = row.scope == "layer"
        slots = row.capacity if per_layer else 3 * row.capacity
        geometry = Geometry(3, 16, 2, slots, per_layer)
        counts = replay(trace, make_policy(row.policy, geometry, trace=trace), geometry)
        assert (row.events, row.hits, row.misses) == (counts.events, counts.hits, counts.misses)
        assert row.events == 120 * 3
        assert row.hits + row.misses == 120 * 3 * 2


def test_the_gap_goes_from_lru_to_belady_which_are_replayed_but_not_listed(trace_file: Path):
    compared = compare([trace_file], ["lfu"], [QUARTER], jobs=1)
    assert [row.policy for row in compared.rows] == ["lru", "lfu", "belady"]
    assert [row.policy for row in compared.of(["lfu"])] == ["lfu"]
    rows = by_policy(compared)
    assert rows["lru"].gap_closed == 0
    assert rows["belady"].gap_closed == 1
    floor, rate, ceiling = (rows[name].hit_rate for name in ("lru", "lfu", "belady"))
    assert rows["lfu"].gap_closed == pytest.approx((rate - floor) / (ceiling - floor))


def test_where_there_is_no_gap_none_is_closed(trace_file: Path):
    compared = compare([trace_file], ["lfu"], [Capacity(16, False)], jobs=1)  # everything fits
    assert {row.gap_closed for row in compared.rows} == {None}
    assert "–" in compared.rows[0].cells()


def test_rows_come_in_the_order_that_was_asked_for(trace_file: Path):
    policies = ["belady", "lfu", "lru"]
    compared = compare([trace_file], policies, [HALF, QUARTER], ["global", "layer"], jobs=1)
    rows = [(row.scope, row.capacity, row.policy) for row in compared.of(policies)]
    expected = [(s, c, p) for s in ("global", "layer") for c in (8, 4) for p in policies]
    assert rows == expected


def test_processes_give_the_same_rows_as_one(trace_file: Path, tmp_path: Path):
    other = make_trace(tmp_path / "other.npz", seed=1)
    arguments = ([trace_file, other], ["random", "lfru"], [QUARTER, HALF], ["layer"], ["code"], 3)
    assert compare(*arguments, jobs=2) == compare(*arguments, jobs=1)


def test_the_seed_reaches_the_policies(trace_file: Path):
    def misses(seed: int) -> int:
        return by_policy(compare([trace_file], ["random"], [QUARTER], seed=seed, jobs=1))["random"].misses

    assert misses(1) == misses(1)
    assert len({misses(seed) for seed in range(5)}) > 1


def test_held_out_data_sets_are_replayed_alone(trace_file: Path):
    compared = compare([trace_file], ["lru"], [QUARTER], holdout=["prose", "code"], jobs=1)
    assert {row.events for row in compared.rows} == {80 * 3}
    alone = load_trace(trace_file).of_datasets(["prose", "code"])
    geometry = Geometry(3, 16, 2, 4, per_layer=True)
    assert compared.rows[0].hits == replay(alone, make_policy("lru", geometry), geometry).hits


def test_an_unknown_data_set_is_an_error_that_lists_the_known_ones(trace_file: Path):
    with pytest.raises(TraceError, match="no trace has the data set poems; known are code, maths, prose"):
        compare([trace_file], ["lru"], [QUARTER], holdout=["code", "poems"], jobs=1)


def test_a_trace_without_the_data_set_is_left_out_with_a_note(trace_file: Path, tmp_path: Path):
    ids = load_trace(trace_file).experts
    write_npz(tmp_path / "bare.npz", {"experts": ids, "seq_offsets": np.array([0, len(ids)])})
    compared = compare([trace_file, tmp_path / "bare.npz"], ["lru"], [HALF], holdout=["code"], jobs=1)
    assert {row.trace for row in compared.rows} == {"small"}
    assert compared.notes == ("bare: none of its sequences are of code: left out",)


def test_capacities_that_a_trace_cannot_have_are_left_out_with_a_note(trace_file: Path):
    capacities = [Capacity(0.05, True), Capacity(1, False), Capacity(17, False), HALF, Capacity(8, False)]
    compared = compare([trace_file], ["lru"], capacities, jobs=1)
    assert {row.capacity for row in compared.rows} == {8}
    assert len(compared.rows) == 2  # half of 16 is 8: once
    assert compared.notes == (
        "small: capacity 5% is 1 of 16 experts, below top-k 2: left out",
        "small: capacity 1 is 1 of 16 experts, below top-k 2: left out",
        "small: capacity 17 is more than its 16 experts: left out",
    )
    with pytest.raises(TraceError, match="no capacity is left to replay: small: capacity 1 is"):
        compare([trace_file], ["lru"], [Capacity(1, False)], jobs=1)


def test_traces_of_one_name_are_told_apart(trace_file: Path, tmp_path: Path):
    (tmp_path / "deeper").mkdir()
    other = make_trace(tmp_path / "deeper" / "small.npz")
    compared = compare([trace_file, other], ["lru"], [HALF], jobs=1)
    assert {row.trace for row in compared.rows} == {str(trace_file), str(other)}


def test_an_unknown_policy_is_a_config_error(trace_file: Path):
    with pytest.raises(ConfigError, match="unknown policy 'best'"):
        build_policy("best", load_trace(trace_file), Geometry(3, 16, 2, 4, per_layer=True), 0)


def test_comparing_traces_needs_no_torch(trace_file: Path):
    script = (
        "import sys; from flashmoe.cli import main\n"
        f"code = main(['compare', '--trace', {str(trace_file)!r}, '--jobs', '1', '--quiet'])\n"
        "print(code, {'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 set()"


# The plot


def test_the_plot_has_a_line_a_policy_below_the_ceiling(trace_file: Path):
    compared = compare([trace_file], ["lfu", "lru"], [HALF, QUARTER], ["layer", "global"], jobs=1)
    first, second = panels_of(compared.rows, ["lfu", "lru"])
    assert first.title == "small, slots of each layer"
    assert second.title == "small, slots shared by all layers"
    assert [series.policy for series in first.series] == ["lfu", "lru"]
    assert first.ceiling.policy == "belady"
    for series in (*first.series, first.ceiling):
        assert series.capacities == (4, 8)
        rows = [by_policy(compared, scope="layer", capacity=n)[series.policy] for n in (4, 8)]
        assert series.hit_rates == tuple(100 * row.hit_rate for row in rows)
        assert series.gaps_closed == tuple(100 * (row.gap_closed or 0) for row in rows)
        assert all(rate <= best for rate, best in zip(series.hit_rates, first.ceiling.hit_rates, strict=True))


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_the_plot_is_written_whole(name: str, begins: bytes, trace_file: Path, tmp_path: Path):
    """Names that matplotlib would take for a formula, or has no letters for, and points without a gap."""
    compared = compare([trace_file], ["lfu"], [QUARTER, Capacity(16, False)], jobs=1)
    rows = [
        CompareRow(**{f: getattr(row, f) for f in row.__slots__} | {"trace": "$x^ 模型_"})
        for row in compared.rows
    ]
    path = tmp_path / "plots" / name
    path.parent.mkdir()
    write_plot(path, panels_of(rows, ["lfu", "belady", "lru"]))
    assert path.read_bytes().startswith(begins)
    assert list(path.parent.iterdir()) == [path]


# The command


def run_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert cli.main(["compare", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_compare_prints_a_table(trace_file: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--policies", "lru,lfu", "--capacity", "25%,6", "--scope", "both", "--jobs", "1"]
    assert cli.main(["compare", "--trace", str(trace_file), *options]) == 0
    out, _ = capsys.readouterr()
    lines = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()]
    assert lines[0] == ["trace", "scope", "capacity", "policy", "hit rate", "misses", "gap closed"]
    assert [line[1:4] for line in lines[1:]] == [
        [scope, f"{capacity} of 16", policy]
        for scope in ("layer", "global")
        for capacity in (4, 6)
        for policy in ("lru", "lfu")
    ]


def test_compare_as_json_has_exactly_the_promised_fields(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plot = tmp_path / "out.png"
    options = ["--policies", "lfu,belady", "--capacity", "25%,100%", "--jobs", "1", "--plot", str(plot)]
    report = run_json(["--trace", str(trace_file), *options], capsys)
    assert list(report) == ["rows"]
    assert [list(row) for row in report["rows"]] == [FIELDS] * 4
    first, _, last, _ = report["rows"]
    assert (first["trace"], first["policy"], first["scope"], first["capacity"]) == (
        "small",
        "lfu",
        "layer",
        4,
    )
    assert first["hit_rate"] == first["hits"] / (first["hits"] + first["misses"])
    assert last["gap_closed"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_all_policies_are_compared_by_default(trace_file: Path, capsys: pytest.CaptureFixture[str]):
    report = run_json(["--trace", str(trace_file), "--jobs", "1"], capsys)
    policies = {row["policy"] for row in report["rows"]}
    assert {"lru", "lfu", "lfru", "fifo", "random", "belady"} <= policies
    assert {row["capacity"] for row in report["rows"]} == {2, 3, 6, 10}
    for row in report["rows"]:  # nothing beats Belady where tokens come one by one
        assert row["gap_closed"] is None or row["gap_closed"] <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either --trace FILE, to replay, or --prompts FILE"),
        (["--trace", "a.npz", "--prompts", "b.txt"], "give either --trace"),
        (["--trace", "a.npz", "--model", "m"], "--model belongs to --prompts FILE"),
        (["--trace", "a.npz", "--max-tokens", "3"], "--max-tokens belongs to --prompts FILE"),
        (["--trace", "a.npz", "--ram-budget", "4G"], "--ram-budget belongs to --prompts FILE"),
        (["--trace", "a.npz", "--reader", "mmap"], "--reader belongs to --prompts FILE"),
        (["--trace", "a.npz", "--check-reads"], "--check-reads belongs to --prompts FILE"),
        (["--prompts", "a.txt", "--capacity", "8"], "--capacity belongs to --trace FILE"),
        (["--trace", "a.npz", "--prefetch", "off"], "--prefetch belongs to --prompts FILE"),
        (["--prompts", "a.txt", "--plot", "a.png"], "--plot belongs to --trace FILE"),
        (["--prompts", "a.txt", "--policies", "belady"], "unknown policy 'belady'"),
        (["--trace", "a.npz", "--policies", "best"], "unknown policy 'best'; known are lru"),
        (["--trace", "a.npz", "--policies", "lru,,lfu"], "has an empty name"),
        (["--trace", "a.npz", "--capacity", "0"], "'0' is not a share of up to 100%, or a count from 1"),
        (["--trace", "a.npz", "--capacity", "101%"], "'101%' is not a share"),
        (["--trace", "a.npz", "--capacity", "8.5"], "'8.5' is neither a count of experts nor a share"),
        (["--trace", "a.npz", "--capacity", "nan%"], "'nan%' is neither"),
        (["--trace", "a.npz", "--scope", "some"], "--scope: invalid choice"),
        (["--trace", "a.npz", "--plot", "a.jpg"], "--plot a.jpg should end in .png or .svg"),
        (["--trace", "a.npz", "--jobs", "0"], "'0' is not a whole number from 1"),
        (["--trace", "a.npz", "--seed", "-1"], "--seed"),
    ],
)
def test_wrong_usage_exits_with_2(options: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        cli.main(["compare", *options])
    assert left.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_the_user_can_mend_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "bad.npz").write_bytes(b"PK")
    for name, said in (("none.npz", "No such file"), ("bad.npz", "no .npz file, or truncated")):
        assert cli.main(["compare", "--trace", str(tmp_path / name)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("flashmoe: error: ")
        assert said in err
        assert err.count("\n") == 1
    plot = tmp_path / "none" / "a.png"
    assert cli.main(["compare", "--trace", str(tmp_path / "none.npz"), "--plot", str(plot)]) == 1
    assert f"no folder {plot.parent} to write a.png to" in capsys.readouterr().err, "before any trace is read"


# Live


@pytest.fixture
def live(tiny_model: Path, tmp_path: Path) -> list[str]:
    """A model with room for every expert, two conversations of short answers, one round."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"category": "a", "turns": ["what is the capital of France", "user"]},
        {"category": "b", "turns": ["the expert that was used longest ago"]},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    options = ["--context", "256", "--generate", "6", "--repeat", "2", "--quiet"]
    return ["--model", str(tiny_model), "--ram-budget", "8G", "--prompts", str(prompts), *options]


def test_live_all_policies_give_the_same_tokens(live: list[str], capsys: pytest.CaptureFixture[str]):
    report = run_json([*live, "--policies", "lfu,lru"], capsys)
    assert [row["policy"] for row in report["rows"]] == ["lfu", "lru"]
    assert (report["model"], report["prompts"], report["tokens"]) == ("mixtral", 2, 18)
    assert report["identical_tokens"] is True
    assert {row["prefetch"] for row in report["rows"]} == {"off"}
    for row in report["rows"]:
        assert [each["tokens"] for each in row["rounds"]] == [15, 15]  # the first of an answer is prefill's
        assert row["least_tokens_per_s"] <= row["tokens_per_s"] <= row["most_tokens_per_s"]
        assert 0 < row["hit_rate"] <= 1
        # Each round begins with empty slots: both read the same.
        assert len({each["misses"] for each in row["rounds"]}) == 1


def test_live_prints_a_table(live: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", *live, "--policies", "lru,lfru", "--max-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    header, *rows, note = out.splitlines()
    assert header.split("|")[0].strip() == "policy"
    assert [row.split("|")[0].strip() for row in rows] == ["lru", "lfru"]
    assert note.startswith(
        "1 prompts, 8 tokens, the same under every policy; medians of 2 interleaved rounds"
    )
    assert err == ""


def test_live_every_policy_meets_every_prefetch(live: list[str], capsys: pytest.CaptureFixture[str]):
    report = run_json([*live, "--policies", "lfu,lru", "--prefetch", "off,2,auto"], capsys)
    contenders = [(row["policy"], row["prefetch"]) for row in report["rows"]]
    assert contenders == [
        (policy, prefetch) for policy in ("lfu", "lru") for prefetch in ("off", "2", "auto")
    ]
    assert cli.main(["compare", *live, "--prefetch", "often"]) == 1
    assert "--prefetch 'often' is not auto, off or a number" in capsys.readouterr().err


def test_live_tokens_that_depend_on_the_policy_are_an_error(
    live: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from flashmoe.api import LLM

    use_policy = LLM.use_policy

    def change_a_weight(llm: LLM, policy: str, prefetch: str) -> None:
        use_policy(llm, policy, prefetch)
        if policy == "lfu":
            llm.engine.decoder._weights.norm.neg_()

    monkeypatch.setattr(LLM, "use_policy", change_a_weight)
    assert cli.main(["compare", *live, "--policies", "lru,lfu"]) == 1
    assert "under lfu the model gave other tokens than under lru" in capsys.readouterr().err


def test_live_under_an_unknown_policy_keeps_the_one_there_is(tiny_model: Path):
    from flashmoe import LLM

    with LLM(tiny_model, ram_budget="8G", context=64) as llm:
        with pytest.raises(FlashMoEError, match="unknown policy 'best'"):
            llm.use_policy("best")
        llm.use_policy("fifo")
        assert llm.generate("the expert", max_tokens=3).stats.policy == "fifo"

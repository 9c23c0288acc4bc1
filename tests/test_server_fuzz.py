"""Requests made from the API's own description, allowed ones and others: every answer is a documented one."""

from pathlib import Path

import pytest
import requests
from servers import serving

from flashmoe import LLM
from scripts import fuzz_api
from scripts.fuzz_api import fuzz


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of schemathesis' parts
def test_no_request_makes_a_server_error_or_an_undocumented_answer(tiny_model: Path):
    with LLM(tiny_model, ram_budget="8G", context=64) as llm, serving(llm) as server:
        report = fuzz(server.url, 200)
        assert server.chat(max_tokens=2)[0] == 200, "and the server is well"
    assert report.cases >= 200, "or more, but no fewer"
    assert report.failures == [], report.failures[0]
    assert report.server_errors == 0
    assert {200, 400} <= set(report.statuses["/v1/chat/completions"])


def test_a_server_that_goes_away_is_a_failure_and_the_end(monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise requests.ConnectionError("refused")

    monkeypatch.setattr(fuzz_api, "_send_some", refused)
    with serving(None) as server:
        report = fuzz(server.url, 10)
    assert report.cases == 0 and "refused" in report.failures[0]

"""The page's files, without a browser: a misspelt name would otherwise be found by whoever opens the page."""

import re

from flashmoe.server.app import WEB


def test_all_files_that_the_page_names_are_there() -> None:
    page = (WEB / "index.html").read_text("utf-8")
    named = [WEB / name for name in re.findall(r'(?:src|href)="([^"#]+)"', page)]
    for module in (WEB / "assets").glob("*.js"):
        text = module.read_text("utf-8")
        named += [module.parent / name for name in re.findall(r'from "([^"]+)"', text)]
        assert "http://" not in text and "https://" not in text
    assert len(named) > 30
    assert [str(file) for file in named if not file.is_file()] == []
    ids = set(re.findall(r'id="([^"]+)"', page))
    used = {name for file in named for name in re.findall(r'byId\("([^"]+)"\)', file.read_text("utf-8"))}
    assert used <= ids
    assert len(list((WEB / "assets/vendor").glob("*/LICENSE"))) == 2

"""The page that ``generate`` writes, in a browser."""

import pytest

from llava_cot_jax.generate import main
from tests.browser import DESKTOP, PHONE, open_browser, opened


@pytest.mark.slow
def test_the_page_of_a_single_question(tmp_path, capsys):
    path = tmp_path / "page.html"
    search = ["--search", "majority_vote", "--num_candidates", "2", "--max_new_tokens", "90"]
    main([*search, "--draw", "1", "--draw_to", str(tmp_path), "--page", str(path), "--json"])
    with open_browser() as browser:
        for size in (DESKTOP, PHONE):
            with opened(browser, path, size) as found:
                page = found.page
                assert page.locator(".candidate:visible").count() == 2
                assert page.locator("#filters").count() == page.locator("script").count() == 0
                widths = "all => Promise.all(all.map(async one => (await one.decode(), one.naturalWidth)))"
                assert page.locator("img").evaluate_all(widths) == [48]
                assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
                facts = page.locator("dl.facts").inner_text()
                assert "checkpoint\nshapes" in facts

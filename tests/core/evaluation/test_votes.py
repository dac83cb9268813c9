"""The page for blind votes: what it holds, and what a browser does with it."""

import json
import re

import pytest
import torch

from distill_core.evaluation.votes import MOST_VOTED, SIDE_PX, votes_page

NAMES = ("a </script> teacher", "student")
BRIGHT = {NAMES[0]: 0.9, NAMES[1]: -0.9}


def images(count=3, side=16):
    return {name: torch.full((count, 3, side, side), value) for name, value in BRIGHT.items()}


def labels(count=3):
    return [f"seed {number}" for number in range(count)]


def told(page):
    return json.loads(re.search(r'id="votes-images">(.*?)</script>', page, re.DOTALL)[1])


def test_names_end_no_script_and_nothing_is_loaded():
    page = votes_page("<i>", images(), labels())
    assert told(page)["models"] == [*NAMES] and "<i>" not in page and page.count("</script>") == 2
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|https?:|fetch\(|import\(""", page)


def test_many_and_large_images_leave_a_page_that_can_be_sent():
    found = told(votes_page("t", images(MOST_VOTED + 5, 8), labels(MOST_VOTED + 5)))
    assert found["seeds"] == labels(MOST_VOTED) and [len(of_model) for of_model in found["images"]] == [MOST_VOTED] * 2
    large, small = (votes_page("t", images(1, side), labels(1)) for side in (4 * SIDE_PX, SIDE_PX))
    assert len(large) < 1.1 * len(small)


@pytest.fixture
def page(browser, tmp_path):
    (tmp_path / "votes.html").write_text(votes_page("t", images(), labels()), "utf-8")
    context = browser.new_context()
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto((tmp_path / "votes.html").as_uri())
    yield page
    context.close()
    assert not errors


def is_bright(page, side):
    """Whether the image of a side is the first model's, by its pixels alone."""
    return page.evaluate(
        """side => { const image = document.querySelectorAll("#votes img")[side], canvas = document.createElement("canvas");
        return image.decode().then(() => { const brush = canvas.getContext("2d"); brush.drawImage(image, 0, 0);
        return brush.getImageData(2, 2, 1, 1).data[0] > 128 }) }""",
        side,
    )


def names_shown(page):
    """Names that the page tells in any text or attribute but those of its script and data."""
    told = page.evaluate("() => document.getElementById('votes').outerHTML.replace(/src=\"[^\"]*\"/g, '') + document.title")
    return [name for name in ("teacher", "student") if name in told]


def prefer(page, first):
    page.keyboard.press("ArrowLeft" if is_bright(page, 0) == first else "ArrowRight")


@pytest.mark.parametrize(
    "wins,said",
    [
        # Wilson's interval of 3 of 3 and of 1.5 of 3, by his formula with z = 1.96
        ((False, False, False), "student has 100 % of 3 votes (95 % interval 44 % to 100 %)"),
        ((True, False, None), "no clear difference. student has 50 % of 3 votes (95 % interval 13 % to 87 %)"),
    ],
)
def test_votes_go_to_the_model_that_was_seen(page, wins, said):
    for first in wins:
        assert not names_shown(page) and is_bright(page, 0) != is_bright(page, 1)
        page.keyboard.press("ArrowDown") if first is None else prefer(page, first)
    assert said in page.inner_text("#votes")
    counts = [str(wins.count(kind)) for kind in (False, True, None)]
    assert page.locator("#votes td").all_inner_texts() == ["student", *counts]


def test_votes_outlast_a_reload_and_can_be_taken_back(page):
    prefer(page, True)
    prefer(page, False)
    page.reload()
    assert "Pair 3 of 3" in page.inner_text("#votes")
    page.click("text=Back")
    prefer(page, True)
    page.keyboard.press("Alt+ArrowDown")
    page.click("text=Finish")
    assert page.locator("#votes td").all_inner_texts() == ["student", "0", "2", "0"]
    with page.expect_download() as saved:
        page.click("text=Save the votes")
    found = json.loads(saved.value.path().read_text("utf-8"))
    assert len({one["seed"] for one in found["pairs"]} & {*labels()}) == 2
    assert found["models"][0]["share"] == 0 and found["models"][0]["first"] == 2
    page.reload()  # the next voter sees no result
    assert "Pair 1 of 3" in page.inner_text("#votes") and not names_shown(page)


@pytest.mark.parametrize("models,seeds", [(1, 3), (2, 0)])
def test_a_page_without_pairs_is_refused(models, seeds):
    with pytest.raises(ValueError, match="votes need images by two models or more"):
        votes_page("t", dict(list(images().items())[:models]), labels(seeds))

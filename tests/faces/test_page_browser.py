"""The page in a real browser: what is pointed at, clicked and typed, small and large, light and dark."""

from __future__ import annotations

import math
import random
import re

import browser as browsers
import pytest

from gradwatch import Alert, Finding, LayerInfo, ModelInfo, ParameterInfo, Severity, Snapshot
from gradwatch.sinks.page.data import page_data
from gradwatch.sinks.page.render import page_html
from gradwatch.sinks.reading import Run
from gradwatch.values.sequences import SequenceStats

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(request):
    with browsers.opened(browsers.found(request.config)) as browser:
        yield browser


def model_of(names):
    return ModelInfo(
        tuple(LayerInfo(name, "Linear", i) for i, name in enumerate(names)),
        tuple(ParameterInfo(f"{n}.weight", n, (4, 4), "float32", 0, "weight") for n in names),
    )


def run_of(names, steps=120, *, ill=0, need=None):
    """Return a run in which the first layers get nothing from step 40 on, and a memory of 30 of 100 timesteps."""
    rng, model = random.Random(0), model_of(names)
    snapshots = []
    for step in range(steps):
        norm = tuple(
            rng.uniform(0.5, 2) * (1e-9 if i < ill and step >= 40 else 1e-2 * (i + 1)) for i in range(len(names))
        )
        sequences = None
        if need is not None and step % 10 == 1:
            gain = tuple(math.exp(-lag * 7 / 30) for lag in range(100))
            sequences = (SequenceStats("", "model", 100, 8, lag_gain=gain, need=need, input="x", time=1),)
        probe = {"weight_norm": (4.0,) * len(names), "update_ratio": (1e-3,) * len(names)} if step % 10 == 1 else {}
        snapshots.append(
            Snapshot(step, 1e9 + step, model, loss=1 / (step + 1), norm=norm, sequences=sequences, **probe)
        )
    alerts = []
    if ill:
        finding = Finding(
            "GW101",
            "vanishing-depth",
            Severity.WARNING,
            names[0],
            onset=40,
            evidence={"layers": float(ill)},
            names={"last": names[ill - 1], "worst": names[0]},
        )
        alerts.append(Alert(finding, 40, steps - 1, None, "get next to no gradient", "weak", "ReLU", Severity.WARNING))
    if need is not None:
        finding = Finding(
            "GW301", "vanishing-time", Severity.WARNING, names[0], onset=1, evidence={"need": float(need)}
        )
        alerts.append(Alert(finding, 1, steps - 1, None, "too short", "", "set the bias", Severity.WARNING))
    return Run((model,), tuple(snapshots), tuple(alerts), "/runs/mine/gradwatch/record.jsonl")


def blocks(count):
    return [f"blocks.{i // 4}.part{i % 4}" for i in range(count)]


def written(folder, **runs):
    file = folder / "page.html"
    file.write_text(page_html(page_data(runs, "0"), "runs"), encoding="utf-8")
    return f"file://{file}"


def canvas(page, number=0):
    box = page.locator("figure canvas").nth(number).bounding_box()
    return box["x"], box["y"], box["width"], box["height"] - 24


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 700, 390])
@pytest.mark.parametrize("count", [4, 64, 400])
def test_it_opens_and_fits(browser, tmp_path, count, width, scheme):
    with browsers.page_of(
        browser, written(tmp_path, mine=run_of(blocks(count), ill=3, need=80)), width=width, scheme=scheme
    ) as page:
        assert (
            page.locator(".headline li")
            .nth(0)
            .inner_text()
            .startswith(
                f"▲ 3 of {count} layers (blocks.0.part0 to blocks.0.part2) get next to no gradient since step 40"
            )
        )
        assert "since step 1 too short" in page.locator(".headline").inner_text()
        assert "learns from the last 30 of 100" in page.locator(".details").inner_text()
        wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1]
        assert page.locator("tbody tr").count() == count
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_picture_shows_the_numbers_of_the_record(browser, tmp_path):
    run = run_of(blocks(8), ill=3)
    with browsers.page_of(browser, written(tmp_path, mine=run)) as page:
        x, y, width, height = canvas(page)
        left, inside = 150, width - 150 - 14
        for step, row in ((10, 0), (80, 0), (80, 7), (119, 5)):
            page.mouse.move(x + left + inside * (step + 0.5) / 120, y + height * (row + 0.5) / 8)
            tip = page.locator(".tip").inner_text()
            told = re.search(r"step (\d+): gradient (\S+)", tip)
            assert tip.startswith(f"blocks.{row // 4}.part{row % 4}\n")
            assert int(told[1]) == step
            assert float(told[2]) == pytest.approx(run.snapshots[step].norm[row], rel=6e-3)
        page.mouse.move(1, 1)
        assert page.locator(".tip").is_hidden()


PIXELS = """() => {
    const canvas = document.querySelector('figure canvas'), height = parseFloat(canvas.style.height) - 24;
    const pen = canvas.getContext('2d'), ratio = devicePixelRatio;
    const at = (row) => pen.getImageData(300 * ratio, (row + 0.5) * height / 4 * ratio, 1, 1).data;
    return [0, 1, 2, 3].map((row) => [...at(row)].slice(0, 3));
}"""
NAMELESS = """() => {
    const used = 'button, input, select, canvas[tabindex], svg[role], [role=region], [role=group]';
    const named = (e) => e.getAttribute('aria-label') || e.innerText || e.querySelector('title');
    return [...document.querySelectorAll(used)].filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 80));
}"""


def test_little_is_darker_than_much_and_what_is_not_finite_has_a_colour_of_its_own(browser, tmp_path):
    model = model_of(["a", "b", "c", "d"])
    snapshots = tuple(Snapshot(s, 0.0, model, norm=(1e-6, 1.0, 0.0, math.nan)) for s in range(10))
    with browsers.page_of(browser, written(tmp_path, mine=Run((model,), snapshots, ()))) as page:
        colours = page.evaluate(PIXELS)
        little, much, naught, broken = colours
        assert sum(little) < sum(much)
        assert naught == [0, 0, 0]
        assert broken == [214, 39, 118]


def test_a_click_chooses_step_and_layer_and_shows_the_layer(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, mine=run_of(blocks(8), ill=3, need=80))) as page:
        x, y, width, height = canvas(page)
        page.mouse.click(x + 150 + (width - 164) * 60.5 / 120, y + height * 4.5 / 8)
        assert (
            "The network at step 60" in page.locator("h2").all_inner_texts()[-5:].__str__()
            or page.get_by_text("The network at step 60").count()
        )
        assert page.get_by_text("Layers at step 60").count() == 1
        assert page.locator("tr[aria-selected=true] td").first.inner_text() == "blocks.1.part0"
        assert page.locator("h2", has_text="blocks.1.part0").count() == 1
        history = page.locator(".details svg").all()
        assert any("gradient of blocks.1.part0" in (one.get_attribute("aria-label") or "") for one in history)


def test_the_keyboard_moves_and_is_told(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, mine=run_of(blocks(8), ill=3))) as page:
        page.locator("figure canvas").first.focus()
        for key in ("Home", "ArrowRight", "ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
        assert page.get_by_text("Layers at step 2").count() == 1
        told = page.locator("[aria-live]").inner_text()
        assert told.startswith("blocks.0.part1, step 2: gradient ")
        page.keyboard.press("End")
        assert page.get_by_text("Layers at step 119").count() == 1
        bar = page.locator("svg g[role=button]").first
        bar.focus()
        page.keyboard.press("Enter")
        assert page.get_by_text("Layers at step 40").count() == 1


def test_an_alert_goes_to_its_place_and_step(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, mine=run_of(blocks(8), ill=3))) as page:
        cards = page.locator(".alerts > li")
        assert cards.count() == 1
        text = cards.first.inner_text()
        for part in ("GW101 vanishing-depth", "since step 40", "Why: weak", "Try: ReLU"):
            assert part in text
        cards.first.get_by_role("button", name="show").click()
        assert page.get_by_text("Layers at step 40").count() == 1
        assert page.locator("tr[aria-selected=true] td").first.inner_text() == "blocks.0.part0"


def test_the_table_is_sorted_filtered_and_folded(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, mine=run_of(blocks(12), ill=3))) as page:

        def names():
            return [row.locator("td").first.inner_text() for row in page.locator("tbody tr").all()]

        assert names() == blocks(12)
        page.get_by_role("button", name="gradient", exact=True).click()
        assert set(names()[:3]) == set(blocks(3))
        assert page.locator("th[aria-sort=ascending]").inner_text().startswith("gradient")
        page.get_by_role("button", name="gradient").click()
        assert set(names()[-3:]) == set(blocks(3))
        page.get_by_role("button", name="layer", exact=False).first.click()
        page.get_by_role("searchbox").fill("blocks.1")
        assert names() == [f"blocks.1.part{i}" for i in range(4)]
        page.get_by_role("searchbox").fill("")
        page.get_by_role("button", name="with alerts only").click()
        assert names() == blocks(3)
        page.get_by_role("button", name="with alerts only").click()
        page.get_by_label("Fold by block").select_option("2")
        assert [name.split(":")[0].strip("+ ").strip() for name in names()] == ["blocks.0", "blocks.1", "blocks.2"]
        page.locator("tr.block").first.click()
        assert names()[1:5] == blocks(4)


def test_several_runs_stand_side_by_side_on_one_scale(browser, tmp_path):
    runs = {f"run{i}": run_of(blocks(6), ill=3 if i == 0 else 0) for i in range(8)}
    with browsers.page_of(browser, written(tmp_path, **runs)) as page:
        assert page.locator(".run").count() == 8
        legends = page.locator(".layers + .legend").all_inner_texts()
        assert len(legends) == 8
        assert len(set(legends)) == 1
        boxes = [one.bounding_box() for one in page.locator(".run").all()[:2]]
        assert boxes[0]["y"] == boxes[1]["y"]
        page.get_by_label("Run", exact=True).get_by_role("button", name="run3").click()
        assert page.locator("button[aria-current=true]").inner_text() == "run3"
        assert page.get_by_text("No alert in the whole run.").count() == 1


def test_of_many_runs_the_details_open_below_the_run_that_was_clicked(browser, tmp_path):
    runs = {f"run{i}": run_of(blocks(64), ill=4 * (i % 2), need=200 if i == 5 else None) for i in range(8)}
    with browsers.page_of(browser, written(tmp_path, **runs)) as page:
        told = page.locator(".index li").all_inner_texts()
        assert [one.split("\n")[0].split(" ")[0] for one in told] == [f"run{i}" for i in range(8)]
        assert ["4 of 64 layers" in one for one in told] == [i % 2 == 1 for i in range(8)]
        details = page.get_by_label("Details", exact=True)
        for number in (5, 2, 7):
            picture = page.locator(".run").nth(number).locator("canvas").first
            picture.scroll_into_view_if_needed()
            before = picture.bounding_box()["y"]
            picture.click(position={"x": 300, "y": 20})
            assert abs(picture.bounding_box()["y"] - before) < 2  # what was clicked stays where it is
            row = [page.locator(".run").nth(i).bounding_box() for i in (number - number % 2, number - number % 2 + 1)]
            ends = max(box["y"] + box["height"] for box in row)
            assert 0 < details.bounding_box()["y"] - ends < 40
            assert page.locator("button[aria-current=true]").inner_text() == f"run{number}"
        page.get_by_label("Run", exact=True).scroll_into_view_if_needed()
        before = details.bounding_box()["y"]
        page.get_by_label("Run", exact=True).get_by_role("button", name="run0").click()
        assert abs(details.bounding_box()["y"] - before) < 2
        page.locator(".index button").nth(6).click()
        assert abs(page.locator(".run").nth(6).bounding_box()["y"]) < 2


HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>&`${alert(3)}`"


def test_the_focus_and_the_table_stay_where_they_are(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, mine=run_of(blocks(64), ill=3))) as page:
        table = page.locator(".scroll")
        table.evaluate("(e) => { e.scrollTop = 700; }")
        page.locator("tbody tr").nth(30).focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.getAttribute('data-key')") == "row-30"
        assert table.evaluate("(e) => e.scrollTop") == 700
        page.get_by_role("searchbox").click()
        page.keyboard.type("blocks.1")
        assert page.evaluate("document.activeElement.getAttribute('data-key')") == "search"
        page.locator("figure canvas").first.focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.tagName") == "CANVAS"
        assert page.locator("[aria-live]").inner_text().startswith("blocks.7.part2, step 117")


def test_lags_can_be_read_by_the_keyboard(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, mine=run_of(blocks(4), need=80))) as page:
        page.locator("figure canvas").nth(1).focus()
        for key in ("End", "ArrowDown", "ArrowDown", "ArrowDown"):
            page.keyboard.press(key)
        told = page.locator("[aria-live]").inner_text()
        assert told.startswith("3 timesteps back, step 111")
        assert "horizon 30, need 80" in told


def test_gaps_and_what_is_no_size_break_a_line(browser, tmp_path):
    model = model_of(["a", "b", "c", "d"])
    snapshots = tuple(
        Snapshot(s, 0.0, model, loss=math.nan if 5 <= s < 15 else 1.0 + s, norm=(1.0, 0.0, math.nan, 2.0))
        for s in range(20)
    )
    with browsers.page_of(browser, written(tmp_path, mine=Run((model,), snapshots, ()))) as page:
        path = page.locator("svg[aria-label='Loss by step'] path.series").get_attribute("d")
        assert path.count("M") == 2
        assert "NaN" not in path
        profile = page.locator("svg[aria-label^='Gradient and sensitivity']")
        assert profile.locator("path.series").first.get_attribute("d").count("M") == 2
        assert profile.locator("rect.naught").count() == 1  # b; c is not finite
        assert profile.locator("rect").count() == 2


def painted(page, shares):
    """Tell at which shares of its width the first picture is painted."""
    return page.evaluate(
        """(shares) => {
            const canvas = document.querySelector('figure canvas'), wide = canvas.clientWidth - 150 - 14;
            const pen = canvas.getContext('2d'), ratio = devicePixelRatio;
            return shares.map((share) => pen.getImageData((150 + share * wide) * ratio, 20 * ratio, 1, 1).data[3] > 0);
        }""",
        shares,
    )


def test_a_sparser_cadence_is_no_gap_and_a_gap_is_one(browser, tmp_path):
    model = model_of(["a", "b"])

    def run(steps):
        return Run((model,), tuple(Snapshot(s, 0.0, model, norm=(1.0, 1.0)) for s in steps), ())

    with browsers.page_of(browser, written(tmp_path, mine=run([*range(200), *range(200, 260, 10)]))) as page:
        assert painted(page, [0.1, 0.5, 0.79, 0.81, 0.85, 0.9, 0.95]) == [True] * 7
    with browsers.page_of(browser, written(tmp_path, mine=run([*range(200), *range(10_000, 10_200)]))) as page:
        assert painted(page, [0.005, 0.3, 0.5, 0.9, 0.995]) == [True, False, False, False, True]


def test_a_layer_that_stopped_getting_gradients_has_none(browser, tmp_path):
    model = model_of(["a", "b"])
    snapshots = tuple(Snapshot(s, 0.0, model, norm=(1.0 if s < 10 else None, 1.0)) for s in range(40))
    with browsers.page_of(browser, written(tmp_path, mine=Run((model,), snapshots, ()))) as page:
        assert page.locator("tbody tr").first.locator("td").nth(2).inner_text() == "none"


def test_a_column_of_many_steps_says_so(browser, tmp_path):
    model = model_of(["a", "b"])
    snapshots = tuple(Snapshot(s, 0.0, model, norm=(1.0, 1.0)) for s in range(3000))
    with browsers.page_of(browser, written(tmp_path, mine=Run((model,), snapshots, ()))) as page:
        x, y, _, height = canvas(page)
        page.mouse.move(x + 152, y + height / 4)
        assert "steps 0 to 9, median: gradient 1" in page.locator(".tip").inner_text()
        assert page.get_by_text("Layers at steps 2,990 to 2,999, median").count() == 1


def test_hostile_names_are_shown_as_they_are(browser, tmp_path):
    model = model_of([HOSTILE, "b"])
    snapshots = tuple(Snapshot(s, 0.0, model, norm=(1.0, 1.0)) for s in range(5))
    finding = Finding("GW101", HOSTILE, Severity.ERROR, HOSTILE, onset=0)
    alert = Alert(finding, 0, 4, None, HOSTILE, HOSTILE, HOSTILE, Severity.ERROR)
    address = written(tmp_path, **{HOSTILE: Run((model,), snapshots, (alert,))})
    with browsers.page_of(browser, address) as page:
        assert page.locator("tbody td").first.inner_text() == HOSTILE
        assert HOSTILE in page.locator(".headline").inner_text()
        assert HOSTILE in page.locator("h1").inner_text()
        assert page.locator("img").count() == 0
        page.locator("tbody tr").first.click()
        assert page.locator("img").count() == 0


def test_it_prints_without_what_is_only_for_the_pointer(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, mine=run_of(blocks(8), ill=3)), scheme="dark") as page:
        page.emulate_media(media="print")
        assert not page.locator(".controls").first.is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_everything_that_can_be_used_has_a_name(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, a=run_of(blocks(8), ill=3, need=80), b=run_of(blocks(8)))) as page:
        nameless = page.evaluate(NAMELESS)
        assert nameless == []
        assert page.evaluate("document.documentElement.lang") == "en"


def test_an_empty_run_and_one_step_alone_are_shown(browser, tmp_path):
    with browsers.page_of(browser, written(tmp_path, empty=Run((), (), ()), one=run_of(["a"], steps=1))) as page:
        assert "nothing was recorded" in page.locator(".headline").first.inner_text()
        page.get_by_role("button", name="one", exact=True).click()
        assert page.locator("tbody tr").count() == 1

"""The report as people meet it: opened from disk in Chromium, by eye, by keyboard, on paper, and with hostile names."""

from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
from browser import opened

import registerlens as rl
from registerlens.data.synthetic import synthetic_images
from registerlens.viz.report import write_report
from registerlens.viz.study import explore_few, study_mechanism, study_registers

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("report")]  # what they share is made once

IMAGE = "<img src=x onerror=alert(1)>.png"
MODEL = "</script><script>window.ran = true</script><a href='https://x.example'>model</a>"

DRAWN = "[...document.querySelectorAll('.js-plotly-plot')].every((one) => one.querySelector('.main-svg'))"

CONTRAST = """async () => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => a * top[i] + (1 - a) * below[i]); };
  const ground = (node) => {
    if (!node) return [255, 255, 255];
    const own = rgb(getComputedStyle(node).backgroundColor);
    return (own[3] ?? 1) === 1 && own.length ? own : over(own.length ? own : [0, 0, 0, 0], ground(node.parentElement));
  };
  const maps = [];  // heat maps are pictures, and numbers stand on them; where a value is missing they are transparent
  for (const picture of document.querySelectorAll("svg image")) {
    const copy = new Image(), canvas = document.createElement("canvas");
    copy.src = picture.href.baseVal;
    await copy.decode();
    [canvas.width, canvas.height] = [copy.naturalWidth, copy.naturalHeight];
    const pixels = canvas.getContext("2d");
    pixels.drawImage(copy, 0, 0);
    maps.push([picture.getBoundingClientRect(), canvas, pixels]);
  }
  const under = (node) => {
    const box = node.getBoundingClientRect(), x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
    const below = ground(node.ownerSVGElement.parentElement);
    for (const [rect, canvas, pixels] of maps) {
      if (x < rect.left || x >= rect.right || y < rect.top || y >= rect.bottom) continue;
      const [u, v] = [(x - rect.left) / rect.width * canvas.width, (y - rect.top) / rect.height * canvas.height];
      const [r, g, b, a] = pixels.getImageData(u, v, 1, 1).data;
      return over([r, g, b, a / 255], below);
    }
    return below;
  };
  const poor = [];
  let n = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode, node = text.parentElement;
    if (!text.data.trim() || !node.getClientRects().length || node.closest("script, style")) continue;
    const style = getComputedStyle(node), svg = node.ownerSVGElement;
    const ink = rgb(svg ? style.fill : style.color);
    if (svg) ink[3] = (ink[3] ?? 1) * Number(style.fillOpacity) * Number(style.opacity);
    const below = svg ? under(node) : ground(node);
    const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => x - y);
    const ratio = (b + 0.05) / (a + 0.05);
    n += 1;
    if (ratio >= 4.5 && parseFloat(style.fontSize) > 7.9) continue;
    poor.push([text.data.trim().slice(0, 60), ratio.toFixed(2), svg ? style.fill : style.color, style.fontSize]);
  }
  return [n, poor];
}"""


class Circuit:
    def describe(self):
        return f"A circuit of {MODEL} on 2 images."

    def plot(self):
        return go.Figure(go.Scatter(x=[0, 1], y=[0, 1], name=IMAGE), {"title": f"{MODEL}<br>kept"})


class Two:
    """Two explorers on one page."""

    def __init__(self, *explorers):
        self.explorers = explorers

    def section(self, *, max_bytes):
        return "".join(one.section(max_bytes=max_bytes) for one in self.explorers)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    vit, batch = rl.from_pretrained("registerlens:tiny"), synthetic_images(16, 2)
    vit.source = MODEL
    study = study_registers(vit, synthetic_images(48, 0).images, batch.images, "Found on 48, evaluated on 16.")
    mechanism = study_mechanism(vit, batch.images, study.neurons)
    shown, names, found = batch.images[:2], [IMAGE, "photograph.png"], rl.trace(vit, batch.images)
    display = np.ascontiguousarray(shown.clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).numpy())
    by_hand = explore_few(vit, shown, display, found, study, names=names)
    parts = {"study": study, "mechanism": mechanism, "circuit": Circuit(), "explorer": Two(by_hand, by_hand)}
    path = tmp_path_factory.mktemp("page") / "page.html"
    return write_report(path, vit, shown, display, found, names=names, title=MODEL, note=IMAGE, **parts)


def evaluate(watched, script):
    return watched.page.evaluate(script)


@pytest.fixture(scope="module")
def seen(page):
    """The page at its usual size; tests leave it as they found it."""
    with opened(page.as_uri()) as watched:
        watched.page.wait_for_function(DRAWN)
        yield watched


@contextmanager
def window(seen, width, height=900):
    """The same page at another size."""
    usual = seen.page.viewport_size
    resize(seen, width, height)
    yield
    resize(seen, **usual)


def resize(seen, width, height=900):
    seen.page.set_viewport_size({"width": width, "height": height})
    seen.page.wait_for_function("(width) => innerWidth === width", arg=width)
    settle(seen)


def settle(seen):
    """Wait until figures have their new size."""
    seen.page.wait_for_timeout(300)
    evaluate(seen, "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_it_opens_from_disk_without_errors_or_requests(seen):
    assert seen.errors == [] and seen.requests == []
    assert evaluate(seen, "document.documentElement.lang") == "en"
    for role in ("header", "nav", "main", "footer", "h1"):
        assert seen.page.locator(f"body {role}").count() == 1, role
    levels = evaluate(seen, "[...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    ids = evaluate(seen, "[...document.querySelectorAll('[id]')].map((one) => one.id).filter(Boolean)")
    headings = evaluate(seen, "[...document.querySelectorAll('h2,h3')].map((h) => h.id)")
    assert all(headings) and all(ids.count(one) == 1 for one in headings)


def test_the_contents_lead_to_every_section(seen):
    links = seen.page.locator("nav a")
    targets = [link.get_attribute("href") for link in links.all()]
    assert targets == [f"#{one}" for one in evaluate(seen, "[...document.querySelectorAll('h2')].map((h) => h.id)")]
    assert {"#answers", "#neurons", "#register", "#kernels", "#circuit", "#explorer", "#numbers"} <= set(targets)
    for target in ("#numbers", "#kernels"):
        seen.page.locator(f'nav a[href="{target}"]').click()
        seen.page.wait_for_function(
            "(id) => { const top = document.querySelector(id).getBoundingClientRect().top;"
            " return top < innerHeight && top > -5; }",
            arg=target,
        )
        assert seen.page.locator("nav").bounding_box()["y"] >= 0  # sticky: still in sight
    evaluate(seen, "scrollTo({top: 0, behavior: 'instant'})")


def test_every_picture_says_what_is_seen(seen):
    texts = evaluate(
        seen, "[...document.querySelectorAll('img')].map((one) => one.alt || one.closest('[aria-label]')?.ariaLabel)"
    )
    assert len(texts) > 30 and all(texts)
    vit, images = rl.from_pretrained("registerlens:tiny"), synthetic_images(16, 2).images[:1]
    norms = vit.run_with_cache(images, names_filter="blocks.1.hook_resid_post")[1]["resid_post", 1].norm(dim=-1)[0]
    row, column = divmod(int(norms.argmax()), 6)
    where = f"largest {norms.max():.3g}, at row {row + 1} of 6 and column {column + 1} of 6"
    assert any(text.startswith(f"Norm of each patch, block 1, {IMAGE}: ") and where in text for text in texts)
    figures = evaluate(seen, "[...document.querySelectorAll('.plot [role=group]')].map((one) => one.ariaLabel)")
    assert len(figures) > 10 and all(any(sign.isdigit() for sign in told) for told in figures)
    tables = evaluate(
        seen,
        "[...document.querySelectorAll('table')].map((one) => [!!one.caption, "
        "[...one.querySelectorAll('th')].every((th) => ['col', 'row'].includes(th.scope))])",
    )
    assert tables and all(caption and scope for caption, scope in tables)


def test_all_text_stands_out_from_its_ground(seen):
    n, poor = evaluate(seen, CONTRAST)
    assert n > 500 and poor == []


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(seen):
    stops = "a, summary, button, select, input, [tabindex='0']"
    n = evaluate(
        seen,
        f'[...document.querySelectorAll("{stops}")].filter((one) => one.checkVisibility() && !one.disabled).length',
    )
    evaluate(
        seen,
        """() => {
          window.reached = [];
          window.note = ({ target }) => reached.push([target, getComputedStyle(target).outlineStyle,
            target.getBoundingClientRect().left]);
          addEventListener("focusin", note);
          document.querySelector(".skip").focus();
        }""",
    )
    for key in ("Tab", "Shift+Tab", *["Tab"] * (n - 1)):  # there and back: from now on focus comes by keyboard
        seen.page.keyboard.press(key)
    reached = evaluate(
        seen,
        """() => {
          removeEventListener("focusin", note);
          document.activeElement.blur();
          const every = [...document.querySelectorAll("*")];
          const where = (one) => one.getAttribute("href") || one.className || "";
          return reached.slice(2).map(([one, outline, left]) =>
            [one.tagName, where(one), every.indexOf(one), outline, left]);
        }""",
    )
    order = [place for _, _, place, *_ in reached]
    assert order == sorted(set(order)) and len(order) == n
    assert reached[0][:2] == ["A", "#main"] and reached[0][4] >= 0 and reached[1][0] == "SUMMARY"
    assert [where for tag, where, *_ in reached if tag == "A"][1:4] == ["#answers", "#norms", "#images"]
    assert sum(where == "wide" for _, where, *_ in reached) == seen.page.locator("main .wide").count() > 10
    assert {tag for tag, *_ in reached} >= {"SELECT", "INPUT"}  # the explorer's
    assert {outline for *_, outline, _ in reached} == {"solid"}


def test_hostile_names_are_shown_as_text_and_run_nothing(seen):
    assert evaluate(seen, "window.ran") is None
    assert seen.page.locator("h1").text_content() == MODEL and seen.page.title() == MODEL
    assert seen.page.locator("img[src=x]").count() == 0
    assert IMAGE in seen.page.locator("figcaption").first.text_content()
    assert IMAGE in seen.page.locator(".sub").text_content()
    links = evaluate(
        seen,
        "[...document.querySelectorAll('a')].map((a) => a.getAttribute('href') || "
        "a.getAttributeNS('http://www.w3.org/1999/xlink', 'href')).filter((href) => href && href[0] !== '#')",
    )
    assert links == []
    titles = seen.page.locator("#circuit ~ figure .gtitle").all_text_contents()
    assert titles and MODEL in titles[0] and "kept" in titles[0] and "<br>" not in titles[0]
    assert (
        f"A circuit of {MODEL} on 2 images."
        in seen.page.locator("section[aria-labelledby=circuit] p").all_text_contents()
    )


def test_nothing_sticks_out_at_any_width(seen):
    nothing_sticks_out(seen, 1280)
    assert evaluate(seen, "document.querySelector('nav details').open")
    with window(seen, 800):
        for width in (800, 400):
            resize(seen, width)
            nothing_sticks_out(seen, width)
            assert not evaluate(seen, "document.querySelector('nav details').open")
        seen.page.locator("nav summary").click()
        assert seen.page.locator("nav a").first.is_visible()
    assert seen.errors == []


def nothing_sticks_out(seen, width):
    assert evaluate(seen, "document.documentElement.scrollWidth") <= width
    beyond = evaluate(
        seen,
        "[...document.querySelectorAll('main *, nav, header, footer')].filter((one) => !one.closest('.wide') && "
        "one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.tagName + '.' + one.className)",
    )
    assert beyond == []


def test_on_paper_there_are_no_contents_and_nothing_is_cut(seen):
    with window(seen, 718, 1000):  # A4 within its margins
        seen.page.emulate_media(media="print")
        evaluate(seen, "dispatchEvent(new Event('beforeprint'))")
        assert not seen.page.locator("nav").is_visible() and not seen.page.locator(".skip").is_visible()
        assert evaluate(seen, "[...document.querySelectorAll('main details')].every((one) => one.open)")
        settle(seen)
        cut = evaluate(
            seen,
            "[...document.querySelectorAll('main img, main svg.main-svg, main table')].filter((one) => "
            "one.getBoundingClientRect().right > innerWidth + 1).map((one) => [one.tagName, "
            "one.getBoundingClientRect().right, one.textContent.slice(0, 40)])",
        )
        assert cut == []
        n, poor = evaluate(seen, CONTRAST)
        assert n > 500 and poor == []
        evaluate(seen, "dispatchEvent(new Event('afterprint'))")
        assert not evaluate(seen, "[...document.querySelectorAll('main details')].some((one) => one.open)")
        seen.page.emulate_media(media="screen")


def test_explorers_answer_a_click_each_for_itself(seen):
    first, second = (seen.page.locator(".rl-explorer").nth(i) for i in range(2))
    said = [one.locator(".rlx-status").text_content() for one in (first, second)]
    assert said[0] == said[1] and not said[0].startswith(("(0,0)", "(5,4)"))
    for this, other, (row, column) in ((first, second, (0, 0)), (second, first, (5, 4))):
        before = other.locator(".rlx-status").text_content()
        cells = this.locator(".rlx-cells").first
        cells.scroll_into_view_if_needed()
        box = cells.bounding_box()
        cells.click(position={"x": (column + 0.5) / 6 * box["width"], "y": (row + 0.5) / 6 * box["height"]})
        seen.page.wait_for_function(
            "([at, words]) => { const one = document.querySelectorAll('.rl-explorer')[at];"
            " return one.dataset.asked === one.dataset.answered"
            " && one.querySelector('.rlx-status').textContent.startsWith(words); }",
            arg=[0 if this is first else 1, f"({row},{column}) as "],
        )
        assert other.locator(".rlx-status").text_content() == before
    assert seen.errors == [] and seen.requests == []

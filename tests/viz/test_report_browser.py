"""The report as people meet it: opened from disk in Chromium, by eye, by keyboard, on paper, and with hostile names."""

from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
from browser import Watched, opened

import registerlens as rl
from registerlens.data.synthetic import synthetic_images
from registerlens.viz.mechanism import study_mechanism
from registerlens.viz.report import write_report
from registerlens.viz.study import study_registers

pytestmark = pytest.mark.slow

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
  const maps = [];  // heat maps are pictures, and numbers stand on them
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
    for (const [rect, canvas, pixels] of maps) {
      if (x < rect.left || x >= rect.right || y < rect.top || y >= rect.bottom) continue;
      const [u, v] = [(x - rect.left) / rect.width * canvas.width, (y - rect.top) / rect.height * canvas.height];
      return [[...pixels.getImageData(u, v, 1, 1).data.slice(0, 3)], 3];
    }
    return [ground(node.ownerSVGElement.parentElement), 4.5];
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
    const [below, least] = svg ? under(node) : [ground(node), 4.5];
    const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => x - y);
    const ratio = (b + 0.05) / (a + 0.05);
    n += 1;
    if (ratio < least) poor.push([text.data.trim().slice(0, 60), ratio.toFixed(2), svg ? style.fill : style.color]);
  }
  return [n, poor];
}"""


class Circuit:
    def describe(self):
        return f"A circuit of {MODEL}."

    def plot(self):
        return go.Figure(go.Scatter(x=[0, 1], y=[0, 1], name=IMAGE), {"title": f"{MODEL}<br>kept"})


class Explorer:
    def section(self):
        return '<p id="hands-on">Click a patch.</p>'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    vit, batch = rl.from_pretrained("registerlens:tiny"), synthetic_images(16, 2)
    vit.source = MODEL
    study = study_registers(vit, synthetic_images(48, 0).images, batch.images, "Found on 48, evaluated on 16.")
    mechanism = study_mechanism(vit, batch.images, study.neurons)
    shown = batch.images[:2]
    display = shown.clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    path = tmp_path_factory.mktemp("page") / "page.html"
    about = {"names": [IMAGE, "photograph.png"], "title": MODEL, "note": IMAGE}
    parts = {"study": study, "mechanism": mechanism, "circuit": Circuit(), "explorer": Explorer()}
    return write_report(path, vit, shown, np.ascontiguousarray(display), rl.trace(vit, batch.images), **about, **parts)


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
    """The same page, freshly opened in the same browser at another size."""
    context = seen.page.context.browser.new_context(viewport={"width": width, "height": height})
    other = Watched(context.new_page())
    other.page.set_default_timeout(120_000)
    other.page.on("pageerror", lambda error: other.errors.append(str(error)))
    other.page.goto(seen.page.url.partition("#")[0])
    other.page.wait_for_function(DRAWN)
    yield other
    context.close()


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
    assert seen.page.locator("#hands-on").text_content() == "Click a patch."
    evaluate(seen, "scrollTo({top: 0, behavior: 'instant'})")


def test_every_picture_says_what_is_seen(seen):
    texts = evaluate(seen, "[...document.querySelectorAll('img')].map((one) => one.getAttribute('alt'))")
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
    """4.5 everywhere but on heat maps, where plotly takes black or white by a rule of its own: there 3."""
    n, poor = evaluate(seen, CONTRAST)
    assert n > 500 and poor == []


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(seen):
    focused = (
        "(() => { const a = document.activeElement; if (a === document.body) return null;"
        " return [a.tagName, a.getAttribute('href') || a.className || '',"
        " [...document.querySelectorAll('*')].indexOf(a), getComputedStyle(a).outlineStyle,"
        " a.getBoundingClientRect().left]; })()"
    )
    reached = []
    with window(seen, 1280) as watched:
        while len(reached) < 500:
            watched.page.keyboard.press("Tab")
            if (one := evaluate(watched, focused)) is None:
                break
            reached.append(one)
        wide = watched.page.locator("main .wide").count()
    assert reached[0][:2] == ["A", "#main"] and reached[0][4] >= 0 and reached[1][0] == "SUMMARY"
    assert [where for tag, where, *_ in reached if tag == "A"][1:4] == ["#answers", "#norms", "#images"]
    order = [place for _, _, place, *_ in reached]
    assert order == sorted(order) and len(set(order)) == len(order) < 500
    assert sum(where == "wide" for _, where, *_ in reached) == wide > 10
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
    assert f"A circuit of {MODEL}." in seen.page.locator("section[aria-labelledby=circuit] p").first.text_content()


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_sticks_out_at_any_width(seen, width):
    with window(seen, width) as watched:
        assert evaluate(watched, "document.documentElement.scrollWidth") <= width
        beyond = evaluate(
            watched,
            "[...document.querySelectorAll('main *, nav, header, footer')].filter((one) => !one.closest('.wide') && "
            "one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.tagName + '.' + one.className)",
        )
        assert beyond == []
        assert evaluate(watched, "document.querySelector('nav details').open") == (width >= 1100)
        if width < 1100:
            watched.page.locator("nav summary").click()
            assert watched.page.locator("nav a").first.is_visible()
        assert watched.errors == []


def test_on_paper_there_are_no_contents_and_nothing_is_cut(seen):
    with window(seen, 718, 1000) as watched:  # A4 within its margins
        watched.page.emulate_media(media="print")
        evaluate(watched, "dispatchEvent(new Event('beforeprint'))")
        assert not watched.page.locator("nav").is_visible() and not watched.page.locator(".skip").is_visible()
        assert evaluate(watched, "[...document.querySelectorAll('main details')].every((one) => one.open)")
        watched.page.wait_for_timeout(500)
        cut = evaluate(
            watched,
            "[...document.querySelectorAll('main img, main svg.main-svg, main table')].filter((one) => "
            "one.getBoundingClientRect().right > innerWidth + 1).map((one) => [one.tagName, "
            "one.getBoundingClientRect().right, one.textContent.slice(0, 40)])",
        )
        assert cut == []
        n, poor = evaluate(watched, CONTRAST)
        assert n > 500 and poor == []
        evaluate(watched, "dispatchEvent(new Event('afterprint'))")
        assert not evaluate(watched, "[...document.querySelectorAll('main details')].some((one) => one.open)")

"""The page of a comparison: whole without a network, text stays text, and what is not there is left out with its reason."""

import base64
import copy
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.synthetic_report import HOSTILE, hostile, report
from verify.drift import html as page

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}
ATTRIBUTES = {
    "aria-hidden", "aria-label", "aria-labelledby", "charset", "class", "content", "cx", "cy", "d", "data-label", "fill",
    "height", "href", "http-equiv", "id", "lang", "name", "r", "rel", "role", "scope", "stroke", "style", "text-anchor",
    "type", "value", "viewbox", "width", "x", "y",
}  # fmt: skip


class Page(HTMLParser):
    """A page's elements, texts and scripts. Elements that are not closed, or closed twice, fail."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.inside, self.headings, self.text = [], [], {}, [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        self.inside[tag, attributes.get("type")] = self.inside.get((tag, attributes.get("type")), "") + data
        if tag in ("h1", "h2", "h3"):
            self.headings.append(data)
        section = next((a["id"] for t, a in self.open if t == "section" and "id" in a), None)
        if tag not in ("script", "style"):
            self.text[section] = self.text.get(section, "") + data

    @property
    def data(self):
        return json.loads(self.inside["script", "application/json"])

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def all_text(self):
        return " ".join(self.text.values())


@pytest.fixture(scope="module")
def small():
    return report()


@pytest.fixture(scope="module")
def bare():
    return report(8, 64, diverges=False, full=False)


@pytest.mark.parametrize(
    "made", [report(), report(8, 64, diverges=False, full=False), hostile()], ids=["all", "bare", "hostile"]
)
def test_nothing_from_elsewhere(made):
    """No address but within the page, no element or attribute that loads or runs anything but its one script."""
    html = page.render(made)
    found = Page(html)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
        "image",
        "use",
        "foreignobject",
    }
    for tag, attributes in found.elements:
        assert attributes.keys() <= ATTRIBUTES, (tag, attributes)
        assert attributes.get("href", "#").startswith("#") or (tag, attributes["href"]) == ("link", "data:,")
        assert "url(" not in attributes.get("style", "")
    assert not re.search(r"url\(|@import|@font-face|https?:", found.inside["style", None])
    script = found.inside["script", None]
    assert not re.search(
        r"https?:|innerHTML|outerHTML|insertAdjacent|fetch\(|XMLHttp|eval\(|import|document\.write", script
    )
    assert sum(tag == "script" for tag, _ in found.elements) == 2


def test_its_own_script_alone_may_run(small):
    found = Page(page.render(small))
    (policy,) = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(found.inside["script", None].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(("layers", "tokens", "most"), [(8, 256, 150_000), (78, 512, 300_000)])
def test_size(layers, tokens, most):
    html = page.render(report(layers, tokens))
    assert len(html.encode()) < most


def test_data_comes_back(small):
    """Every number that the charts are drawn from, to the digits that are kept."""
    data = Page(page.render(small)).data
    names = {"stage": data["stages"], "run": data["runs"], "verdict": data["verdicts"]}
    for row, given in zip(data["comparisons"], small["comparisons"], strict=True):
        got = dict(zip(page.COMPARISON, row, strict=True))
        got |= {key: values[got[key]] for key, values in names.items()}
        close = {key: pytest.approx(given[key], rel=1e-3) for key in ("error", "bound") if given[key] is not None}
        assert got == given | close
    for name, keys in (("growth", page.GROWTH), ("choices", page.CHOICES), ("tokens", page.TOKEN), ("mass", page.MASS)):
        for row, given in zip(data[name], small[name], strict=True):
            for key, value in zip(keys, row, strict=True):
                assert value == (pytest.approx(given[key], rel=1e-3) if isinstance(given[key], float) else given[key])
    assert data["layers"] == [[kind[key] for key in page.LAYER] for kind in small["layers"]]
    assert data["index_topk"] == 64


def test_what_is_no_number_comes_back(small):
    made = copy.deepcopy(small)
    made["growth"][1] |= {"local": "inf", "own": "nan", "gain": float("inf")}
    assert Page(page.render(made)).data["growth"][1] == [1, "inf", "nan", "inf"]


def test_sections_in_order(small):
    found = Page(page.render(small))
    places = [found.ids.index(name.replace(" ", "-")) for name in page.SECTIONS]
    assert places == sorted(places)
    for chart in ("heat-map", "selection", "routing", "growth", "gain", "tokens", "mass"):
        assert f"{chart}-chart" in found.ids
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"Left out|Besides", found.all_text())
    for name, text in small["how"].items():
        assert text in found.text[name.replace(" ", "-")]


def test_of_other_weights_the_map_is_shaded_by_relative_error(small):
    """Beyond its bound is every cell there: that would say nothing, and would call the bits a fault."""
    assert Page(page.render(small)).data["relative"] is False
    found, same = Page(page.render(small | {"same_weights": False})), Page(page.render(small | {"same_weights": True}))
    assert found.data["relative"] is True
    assert same.data["relative"] is False
    for made, shown, hidden in (
        (found, "relative error", "in units of the bound"),
        (same, "in units of the bound", "relative error"),
    ):
        text = made.text["heat-map"].replace(small["how"]["heat map"], "")
        assert shown in text
        assert hidden not in text
    assert "FAULT" not in found.text["heat-map"]
    assert "FAULT" in same.text["heat-map"]
    classes = {a.get("class") for tag, a in found.elements if tag == "rect"}
    assert {f"r{i}" for i in range(8)} <= classes


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's own code")
@pytest.mark.parametrize("is_same", [True, False])
def test_tones(small, is_same):
    """The page's own function: by decades of the bound, or by half decades of the error; what is no number is the last."""
    script = Page(page.render(small | {"same_weights": is_same})).inside["script", None]
    body = re.search(r"function tone\(.*?\n}", script, re.DOTALL)[0]
    rows = [[0.0009, 1e-6], [0.5, 1e-6], [20, 1e-6], [0, 1e-6], [1e-6, 1e-5], [0.2, 0], ["nan", 1.0], ["inf", 1.0]]
    code = f"""
      const data = {{relative: {str(not is_same).lower()}}}, value = v => v === "nan" ? NaN : v === "inf" ? Infinity : v;
      const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
      {body}
      console.log(JSON.stringify({json.dumps(rows)}.map(row => tone(...row))));"""
    out = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout
    due = (
        ["e6", "e7", "e7", "e0", "e2", "e8", "e7", "e7"]
        if is_same
        else ["r0", "r6", "r7", "r0", "r0", "r5", "r7", "r7"]
    )
    assert json.loads(out) == due


def test_findings_first_one_first(small):
    found = Page(page.render(small))
    titles = [finding["title"] for finding in small["findings"]]
    text = found.text["findings"]
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    assert all(line in text for finding in small["findings"] for line in finding["lines"])


def test_left_out_with_its_reason(bare):
    found = Page(page.render(bare))
    for name, reason in bare["reasons"].items():
        assert f"Left out: {reason}" in found.text[name]
        assert bare["how"][name] not in found.all_text()
    assert not {"selection-chart", "routing-chart", "tokens-chart", "mass-chart"} & set(found.ids)
    assert "heat-map-chart" in found.ids


def test_left_out_without_a_reason(bare):
    found = Page(page.render(bare | {"reasons": {}}))
    assert not {"divergence", "causes", "choices", "tokens", "sensitivity", "mass"} & set(found.ids)
    assert "Left out" not in found.all_text()


def test_choices_of_one_kind_or_none(small):
    made = copy.deepcopy(small)
    for row in made["choices"]:
        row |= {"routing": None, "routing_own": None}
    found = Page(page.render(made))
    assert "selection-chart" in found.ids
    assert "routing-chart" not in found.ids
    for row in made["choices"]:
        row |= {"selection": None, "selection_own": None}
    assert "choices" not in Page(page.render(made)).ids


def test_what_has_no_section_is_told_at_the_end(small):
    made = small | {"reasons": {"logits in float64": "too large"}, "how": {"KL": "in float64"}}
    found = Page(page.render(made))
    assert "Besides" in found.headings
    assert "Left out: too large" in found.all_text()


def test_sensitivity_by_what_each_costs_alone(small):
    made = copy.deepcopy(small)
    made["sensitivity"]["rows"][2] |= {"component": "the unknown", "alone": "nan"}
    made["sensitivity"]["rows"][3] |= {"component": "the harmful", "alone": 0.0, "recovered": -0.25}
    text = Page(page.render(made)).text["sensitivity"]
    rest = [row for row in made["sensitivity"]["rows"] if row["component"] not in ("the unknown", "the harmful")]
    ranked = [row["component"] for row in sorted(rest, key=lambda row: -row["alone"])]
    places = [text.index(component) for component in (*ranked, "the harmful", "the unknown")]
    assert places == sorted(places)
    assert "-25.0 %" in text
    for missing in ({"rows": []}, {"recipe": None}, {"next": None}):
        Page(page.render(made | {"sensitivity": made["sensitivity"] | missing}))


def test_hostile_text_stays_text():
    """The same elements as with harmless text; each string is there to be read, what is not printable spelled out."""
    made = hostile()
    html = page.render(made)
    found = Page(html)
    assert html.count("</script") == 2
    assert "<!--" not in html
    assert {tag for tag, _ in found.elements} == {tag for tag, _ in Page(page.render(report(6, 96))).elements}
    assert made["candidate"]["text"] == HOSTILE[0]
    assert HOSTILE[0] in "".join(found.inside["title", None])
    assert "{{ 7 * 7 }}{% raw %}" in found.all_text()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", html)
    html.encode("utf-8")
    shown = {row[2] for row in found.data["tokens"]}
    assert shown == {token["text"] for token in made["tokens"]}
    assert HOSTILE[0] in found.data["stages"]


def test_without_anything():
    made = report() | {
        "findings": [],
        "comparisons": [],
        "layers": [],
        "stages": [],
        "growth": [],
        "causes": [],
        "versions": {},
    }
    made |= dict.fromkeys(("divergence", "distributions", "sensitivity", "mass"))
    made |= {"choices": [], "tokens": [], "reasons": {}, "how": {}}
    assert Page(page.render(made)).headings[-3:] == [
        "Versions, command, conventions", "Conventions of the candidate", "Conventions of the reference",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.1234, "0.123"), (1.0, "1"), (12.345, "12.3"), (999.9, "1000"), (1234.5, "1234"), (26129.0, "2.61e4"),
     (1.2e-7, "1.2e-7"), (-4e-10, "-4e-10"), (9.9999e-4, "1e-3"), (float("inf"), "inf"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers(value, text):
    assert page.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (562, "562 B"), (1437, "1.44 kB"), (1.5e12, "1.5 TB"), ("nan", "nan")]
)
def test_sizes(value, text):
    assert page.size(value) == text


def test_times():
    assert page.times({"error": 0.12, "bound": 3e-6}) == pytest.approx(4e4)
    assert page.times({"error": "inf", "bound": 1.0}) == float("inf")
    assert page.times({"error": 0.1, "bound": None}) is None
    assert page.times({"error": 0.1, "bound": 0.0}) is None

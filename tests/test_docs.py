"""The documentation: it builds, leads nowhere in vain, needs no network, and says what code, card and runs say."""

import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from io import BytesIO
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import yaml
from helpers import ROOT

if importlib.util.find_spec("furo") is None and not os.environ.get("CI"):
    needed = "requirements-docs.txt -r requirements-operations.txt"
    pytest.skip(f"needs pip install -r {needed}", allow_module_level=True)

from bs4 import BeautifulSoup
from PIL import Image

pytestmark = pytest.mark.docs
NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb"))
PACKAGES = ("engine", "operations")
BUILD = (
    sys.executable,
    "-m",
    "sphinx",
    "--fail-on-warning",
    "--nitpicky",
    "--quiet",
    "--fresh-env",
    "--conf-dir",
    "docs",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built from nothing."""
    folder = tmp_path_factory.mktemp("docs")
    command = [*BUILD, "--doctree-dir", str(folder / "doctrees"), ".", str(folder / "site")]
    # To import a module tests nothing of it, so that does not count as coverage.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site):
    """The pages of the site, by their paths."""
    paths = site.rglob("*.html")
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in paths}


@pytest.fixture(scope="module")
def page(site, pages):
    """A function that returns a page of the site by its name."""
    return lambda name: pages[site / f"{name}.html"]


def words(element):
    """Return the text of a part of a page, with single spaces."""
    return " ".join(element.get_text(" ").split())


# Links


def test_first_page_leads_on(page):
    assert page("index").meta.find_next("meta")["content"].endswith("url=docs/index.html")
    assert words(page("docs/index").h1).startswith("SMS spam filter")


def test_links_lead_somewhere(pages):
    ids = {path: {element["id"] for element in page.find_all(id=True)} for path, page in pages.items()}
    for path, page in pages.items():
        for link in page.find_all(["a", "link", "script", "img"]):
            address = link.get("href") or link.get("src") or ""
            if re.match(r"[a-z]+:", address):
                continue
            file, _, anchor = unquote(address).partition("#")
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            assert target.exists(), f"{path}: {address}"
            assert not anchor or target.suffix != ".html" or anchor in ids[target], f"{path}: {address}"


def test_pages_can_be_reached(site, pages):
    start = site / "docs/index.html"
    reached, to_see = set(), [start]
    while to_see:
        path = to_see.pop()
        reached.add(path)
        links = [
            (path.parent / unquote(a["href"]).partition("#")[0]).resolve() for a in pages[path].find_all("a", href=True)
        ]
        to_see += [link for link in set(links) if link in pages and link not in reached]
    names = {path.stem for path in (ROOT / "docs").glob("*.md")} | {name.removesuffix(".ipynb") for name in NOTEBOOKS}
    assert names <= {path.stem for path in reached}


def test_readme_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


# Without a network


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        for element in page.find_all(
            ["script", "img", "iframe", "source", "link", "object", "embed", "video", "audio"]
        ):
            if element.name != "link" or {"stylesheet", "icon", "preload", "modulepreload"} & set(element["rel"]):
                for address in map(element.get, ("src", "href", "data", "srcset")):
                    assert not re.match(r"\s*(https?:)?//", address or ""), f"{path}: {address}"
    for path in site.rglob("*.css"):
        style = path.read_text(encoding="utf-8")
        assert not re.search(r"""(@import|url\()\s*["']?(https?:)?//""", style), path


@pytest.mark.browser
def test_pages_open_from_files(site, pages, browser):
    """No page lacks what it asks for, complains, or is wider than a phone."""
    context = browser.new_context(offline=True, viewport={"width": 390, "height": 800})
    tab, wrong = context.new_page(), []

    def note_failure(request):
        if "ABORTED" not in request.failure:  # by going to the next page
            wrong.append(request.url)

    tab.on("requestfailed", note_failure)
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto((site / "index.html").as_uri())
    tab.wait_for_url("**/docs/index.html")
    for path in pages:
        if path != site / "index.html" and "_modules" not in path.parts:
            tab.goto(path.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    context.close()
    assert not wrong


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_diagrams_can_be_seen(site, pages, browser, scheme):
    context = browser.new_context(offline=True, color_scheme=scheme)
    tab = context.new_page()
    for path in (path for path, page in pages.items() if page.select(".diagram")):
        tab.goto(path.as_uri())
        for diagram in tab.locator(".diagram").all():
            picture = Image.open(BytesIO(diagram.screenshot())).convert("L")
            darkest, lightest = picture.getextrema()
            assert (picture.getpixel((0, 0)) < 60) == (scheme == "dark"), path
            assert lightest - darkest > 150, path
            assert picture.height > 100, path
    context.close()


# What it says


def test_model_is_the_one_of_the_card(page):
    text = words(page("docs/production-models"))
    card = json.loads((ROOT / "models/best_model.json").read_text(encoding="utf-8"))
    values = [card["name"], card["sha256"], card["seed"], *card["parameters"].values(), *card["versions"].values()]
    values += [*card["data"].values(), *(value for value in card["thresholds"].values())]
    values += [value for figures in card["metrics"]["test"].values() for value in figures.values()]
    assert [value for value in values if str(value) not in text] == []
    assert str(card["threshold"]) in words(page("docs/experiment-design"))


def test_data_is_the_committed_version(page):
    text = words(page("docs/data-model"))
    for pointer in (ROOT / "data").glob("*.dvc"):
        [file] = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"]
        assert f"data/{file['path']} {file['size']:,} {file['md5']}" in text
    locked = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]["profile"]
    assert [file["path"] for file in locked["deps"] + locked["outs"] if file["md5"] not in text] == []


def test_store_has_the_tables_of_its_metadata(page):
    from operations import store

    of_store = [*store.metadata.tables.values(), *store.day_tables("YYYYMMDD")]
    sections = {
        words(title).removesuffix("\N{PILCROW SIGN}").strip(): title.parent for title in page("docs/data-model")("h3")
    }
    for of in of_store:
        shown = [words(cell) for cell in sections[of.name].select("tbody td:first-child")]
        assert shown == list(of.columns.keys()), of.name
    assert len(sections) == len(of_store)
    diagram = words(page("docs/data-model").select_one(".diagram"))
    drawn = {"models", "labels", "drift", "messages_YYYYMMDD", "scores_YYYYMMDD"}
    for of in of_store:
        assert (of.name in diagram) == (of.name in drawn)
        assert of.name not in drawn or all(column.name in diagram for column in of.columns)


def test_interface_has_every_route(page):
    from operations.web import create_operations_app
    from score import load_card, load_model

    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]
    app = create_operations_app(None, load_model(), load_card(), SimpleNamespace(params=params), "a token")
    routes = {
        f"{method} " + re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule.rule)
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if "static" not in rule.endpoint
    }
    shown = {code.text for code in page("docs/interface").select("h3 code")}
    assert routes - shown == {"GET /operations", "GET /operations/openapi.json"}
    assert shown <= routes


def test_runbook_has_every_alarm(page):
    text = words(page("docs/runbook"))
    groups = yaml.safe_load((ROOT / "operations/alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["alert"] in text
        assert " ".join(rule["annotations"]["action"].split()) in text


def test_benchmarks_are_those_of_the_readme_files(page):
    text = words(page("docs/benchmarks"))
    cells = set()
    for file in ("README.md", "operations/README.md"):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        cells |= {
            cell for line in lines if line.startswith("| ") for cell in re.findall(r"(?<=\| )[\d,.]+(?= \|)", line)
        }
    assert len(cells) > 100
    assert [cell for cell in cells if cell not in text] == []


def test_code_has_every_module(page):
    names = {"score", "app"} | {
        f"{package}.{module.name}" for package in PACKAGES for module in pkgutil.iter_modules([str(ROOT / package)])
    }
    pages = [page(name) for name in ("docs/code", "docs/code-engine", "docs/code-operations")]
    assert names <= {title.text for of in pages for title in of.select("h2 code")}
    assert pages[0].find(id="score.score")
    assert pages[1].find(id="engine.folding.find_folded")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_show_what_is_stored(page, name):
    """They are not executed: times and dates are those of the committed outputs."""
    text = words(page(name.removesuffix(".ipynb")))
    notebook = json.loads((ROOT / name).read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    printed = [line for output in outputs for line in "".join(output.get("text", "")).splitlines()]
    assert printed
    assert [line for line in printed if " ".join(line.split()) not in text] == []


# What it names


def test_targets_exist(pages):
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    named = {
        name
        for path, page in pages.items()
        for code in page.find_all(["code", "pre"])
        for name in re.findall(r"(?m)^\W*make ([a-z][a-z-]*)", code.text)
        if "_modules" not in path.parts
    }
    assert {"serve", "run", "docs", "restore"} <= named
    assert named <= targets


def test_programs_exist(pages):
    named = {
        name
        for page in pages.values()
        for name in re.findall(r"python -m ((?:operations|benchmarks)[\w.]*\w)", page.text)
    }
    assert "operations.jobs" in named
    for name in named:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_no_figure_is_typed(path):
    """Figures come from code and runs; those that a page may have are bars of the case and levels of confidence."""
    text = re.sub(
        r"(?s)```.*?```|\{\{.*?\}\}|\{%.*?%\}|`.*?`|\]\(.*?\)|<https?:.*?>", "", path.read_text(encoding="utf-8")
    )
    figures = re.findall(r"\d+(?:\.\d+)?%|(?<![\d.])\d+\.\d+(?![\d.])|\d{1,3}(?:,\d{3})+", text)
    assert set(figures) <= {"90%", "95%", "99%"} | ({"3.11"} if path.stem == "index" else set())

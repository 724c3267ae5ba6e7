"""What the pages of docs/ are filled with, taken from code, card, files and what notebooks print.

Each function returns Markdown. `conf.py` gives all names of this module to the pages.
"""

import pkgutil
import re
from functools import cache, reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
import sqlalchemy as sa
import yaml
from markdown_it import MarkdownIt
from sqlalchemy.dialects import postgresql, sqlite

from engine.answers import HEADERS
from operations import store
from operations.schemas import LARGEST_ID
from operations.web import create_operations_app
from score import load_card, load_model

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("score", "app", "engine", "operations")
DAY = "YYYYMMDD"  # stands for any day in the names of tables

card = load_card()
params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def table(rows: Any, **options: Any) -> str:
    """Return a table.

    Args:
        rows: a dictionary for each row, or a DataFrame.
        **options: of `DataFrame.to_markdown`.
    """
    cells = pd.DataFrame(rows).map(lambda value: str(value).replace("|", r"\|").replace("\n", " "))
    return cells.to_markdown(**{"index": False, "disable_numparse": True, **options})


def fence(text: str, kind: str = "text") -> str:
    """Return a text as a block of code."""
    return f"````{kind}\n{text.strip(chr(10))}\n````"


# The model


def facts() -> str:
    """Return what the card says of the model, but for figures."""
    rows = {
        "name": f"`{card['name']}`",
        "sha256": f"`{card['sha256']}`",
        "seed": card["seed"],
        "threshold that is used": f"{card['threshold']}, by the rule *{card['thresholds']['used']}*",
        **{f"threshold by {rule}": card["thresholds"][rule] for rule in ("cost", "precision")},
        **card["parameters"],
        **{f"made with {library}": version for library, version in card["versions"].items()},
        **{f"md5 of `{file}`": f"`{md5}`" for file, md5 in card["data"].items()},
    }
    return table([{"": name, "value": value} for name, value in rows.items()])


def algorithm() -> str:
    """Return the steps of the saved pipeline, as scikit-learn prints them."""
    steps = re.sub(r"<function (\w+) at 0x\w+>", r"\1", repr(load_model()))
    return fence(steps, "python")


def test_metrics() -> str:
    """Return the figures of the card on the test messages of each source."""
    return table(pd.DataFrame(card["metrics"]["test"]), index=True)


def operating_points(step: int = 10) -> str:
    """Return what each of some thresholds catches and blocks.

    Args:
        step: every which of the card's points is shown.
    """
    rows = []
    for point in card["operating_points"][::step]:
        shares = {
            f"{name}: {source}": f"{point[source][share]:.1%}"
            for share, name in (("recall", "spam caught"), ("ham_blocked", "ham blocked"))
            for source in ("collection", "today")
        }
        rows.append({"threshold": f"{point['threshold']:.2f}", **shares})
    return table(rows)


# The data


def data_files() -> str:
    """Return the files that DVC tracks, as their pointers have them."""
    pointers = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "data").glob("*.dvc"))]
    files = [file for pointer in pointers for file in pointer["outs"]]
    return table([{"file": f"`data/{f['path']}`", "bytes": f"{f['size']:,}", "md5": f"`{f['md5']}`"} for f in files])


def stages() -> str:
    """Return the stages of dvc.yaml, with the states of their files in dvc.lock."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    locked = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    rows = [
        {"stage": name, "what it does": stages[name]["desc"], "file": f"`{file['path']}`", "md5": f"`{file['md5']}`"}
        for name, stage in locked.items()
        for file in [*stage["deps"], *stage["outs"]]
    ]
    return table(rows)


@cache
def store_tables() -> dict[str, sa.Table]:
    """Return the tables of the store by name, those too that are made each day."""
    return {of.name: of for of in [*store.metadata.tables.values(), *store.day_tables(DAY)]}


def store_table(name: str) -> str:
    """Return the columns of a table of the store."""
    of = store_tables()[name]
    unique = {key.name for it in of.constraints if isinstance(it, sa.UniqueConstraint) for key in it.columns}
    indexed = {key.name for index in of.indexes for key in index.columns}
    rows = []
    for column in of.columns:
        roles = {
            "primary key": column.primary_key,
            "unique": column.name in unique,
            "indexed": column.name in indexed,
        }
        types = {
            dialect.name: f"`{column.type.compile(dialect())}`" for dialect in (sqlite.dialect, postgresql.dialect)
        }
        null = "yes" if column.nullable else "no"
        rows.append({"column": f"`{column.name}`", **types, "null": null, "": ", ".join(filter(roles.get, roles))})
    return table(rows)


def store_diagram() -> str:
    """Return a diagram of the tables that hold keys: a large number `model` is a key of `models`, and so on."""
    named = {name.removesuffix(f"_{DAY}"): of for name, of in store_tables().items()}
    keys = [
        (named[f"{column.name}s"], of, column.name)
        for of in named.values()
        for column in of.columns
        if isinstance(column.type, sa.BigInteger) and f"{column.name}s" in named
    ]
    lines = ["erDiagram"]
    for of in dict.fromkeys(table for *pair, _ in keys for table in pair):
        kinds = [str(column.type.compile(sqlite.dialect())).partition("(")[0] for column in of.columns]
        columns = [
            f"        {kind} {column.name}{' PK' if column.primary_key else ''}"
            for kind, column in zip(kinds, of.columns, strict=True)
        ]
        lines += [f"    {of.name} {{", *columns, "    }"]
    lines += [f"    {other.name} ||--o{{ {of.name} : {name}" for other, of, name in keys]
    return fence("\n".join(lines), "mermaid")


# The interface


@cache
def specifications() -> dict[str, dict[str, Any]]:
    """Return the descriptions in OpenAPI of the service and of the operator's routes, references replaced."""
    recorder = SimpleNamespace(params=params["operations"])
    client = create_operations_app(None, load_model(), card, recorder, "a token").test_client()
    paths = {"service": "/openapi.json", "operator": "/operations/openapi.json"}
    return {name: resolve(found := client.get(path).json, found) for name, path in paths.items()}


def resolve(part: Any, whole: dict[str, Any]) -> Any:
    """Return a part of a description with what its references name in their place."""
    if isinstance(part, list):
        return [resolve(each, whole) for each in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return resolve(reduce(getitem, part["$ref"].split("/")[1:], whole), whole)
    return {key: resolve(value, whole) for key, value in part.items()}


def fields(schema: dict[str, Any]) -> str:
    """Return the fields of an object that a request holds, or that an answer is a list of."""
    schema = schema.get("items", schema)
    rows = []
    for name, of in schema.get("properties", {}).items():
        needed = "yes" if name in schema.get("required", ()) else "no"
        rows.append({"field": f"`{name}`", "type": kind(of), "required": needed, "": limits(of)})
    return table(rows)


def answered(answer: dict[str, Any]) -> str:
    """Return the names of the fields of an answer, or of each object in it."""
    schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
    names = schema.get("items", schema).get("properties", {})
    return ", ".join(f"`{name}`" for name in names)


def parameters(given: list[dict[str, Any]]) -> str:
    """Return the parameters of a path or a query."""
    rows = [
        {"name": f"`{of['name']}`", "in": of["in"], "type": kind(of["schema"]), "": limits(of["schema"])}
        for of in given
    ]
    return table(rows)


def kind(schema: dict[str, Any]) -> str:
    """Return the types that a value may have."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(kind, schema["anyOf"])))
    if "const" in schema:
        return f"`{schema['const']}`"
    found = schema.get("type", "any")
    found = " or ".join([found] if isinstance(found, str) else found)
    return f"{found} of {kind(schema['items'])}" if "items" in schema else found


def limits(schema: dict[str, Any]) -> str:
    """Return what else a value must be, and what it means."""
    words = {
        **{"enum": "one of {}", "minimum": "at least {:,}", "maximum": "at most {:,}", "default": "{} by default"},
        **{"maxLength": "at most {:,} characters", "maxItems": "at most {:,} of them", "format": "{}"},
    }
    said = [words[key].format(value) for key, value in schema.items() if key in words and value != LARGEST_ID]
    return "; ".join([*([schema["description"]] if "description" in schema else []), *said])


# The code


@cache
def modules() -> list[str]:
    """Return the names of the modules that are documented."""
    names = []
    for package in PACKAGES:
        names.append(package)
        names += [f"{package}.{module.name}" for module in pkgutil.iter_modules([str(ROOT / package)])]
    return names


def api(*packages: str) -> str:
    """Return the documentation of the modules of packages, a section each."""
    names = [name for name in modules() if name.partition(".")[0] in packages]
    return "\n\n".join(f"## `{name}`\n\n" + fence(f".. automodule:: {name}", "{eval-rst}") for name in names)


def constant(name: str) -> Any:
    """Return what a module has under a name, such as `engine.work.DEADLINE`."""
    return pkgutil.resolve_name(name)


# What notebooks print, alarms, targets


def output(notebook: str, fragment: str) -> str:
    """Return what a cell of a committed notebook shows, first what it prints.

    Args:
        notebook: its file.
        fragment: of the code of one cell that shows something.

    Raises:
        ValueError: there is no such cell, or more than one.
    """
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    found = [cell for cell in cells if fragment in cell.source and cell.get("outputs")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} cells of {notebook} that show something hold {fragment!r}")
    parts, printed = [], "".join(shown.get("text", "") for shown in found[0].outputs)
    if printed:
        parts.append(fence(printed))
    for data in (shown.data for shown in found[0].outputs if "data" in shown):
        if "text/html" in data:
            parts.append(fence(f'<div class="output text_html">{data["text/html"]}</div>', "{raw} html"))
        elif "image/png" in data:
            image = f'<img alt="Plot of {notebook}" src="data:image/png;base64,{data["image/png"].strip()}">'
            parts.append(fence(image, "{raw} html"))
        else:
            parts.append(fence(data["text/plain"]))
    return "\n\n".join(parts)


def alarms() -> str:
    """Return the alarms of Prometheus, and what to do about each, a section each."""
    groups = yaml.safe_load((ROOT / "operations" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    when = {"page": "At once", "ticket": "In the morning"}
    parts = []
    for rule in (rule for group in groups for rule in group["rules"]):
        summary = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"*\1*", rule["annotations"]["summary"])
        action = f"**{when[rule['labels']['severity']]}**: {rule['annotations']['action']}"
        parts.append(f"### `{rule['alert']}`\n\n{summary} {action}")
    return "\n\n".join(parts)


def targets() -> str:
    """Return the targets of the Makefile."""
    found = re.findall(r"(?m)^([a-z-]+):.*## (.+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    return table([{"target": f"`make {name}`", "what it does": text} for name, text in found])


def coverage() -> str:
    """Return in words how many tests passed and what they cover."""
    report = (ROOT / "coverage.txt").read_text(encoding="utf-8")
    covered, passed = re.search(r"Total coverage: ([\d.]+%)", report)[1], re.search(r"= (\d+) passed", report)[1]
    return f"{int(passed):,} tests passed, which cover {covered} of lines and branches"


def section(page: str, title: str, after: str = "", before: str = "") -> str:
    """Return what a page of the repository says under a title, up to the next title.

    Args:
        page: its file.
        title: of the section.
        after: a text of the section; what stands up to its end is left out.
        before: a text of the section; what stands from its beginning on is left out.

    Raises:
        ValueError: there is no such title or text.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    tokens = MarkdownIt().parse(text)
    titles = [(of.content, *token.map) for token, of in pairwise(tokens) if token.type == "heading_open"]
    ends = [start for _, start, _ in titles[1:]] + [None]
    [(start, end)] = [(start, end) for (name, _, start), end in zip(titles, ends, strict=True) if name == title]
    lines = "".join(text.splitlines(keepends=True)[start:end])
    found = lines[lines.index(after) + len(after) : lines.index(before) if before else None]
    return re.sub(r"\]\((?!https?:|#)", f"](../{Path(page).parent}/", found).strip()


def schedule() -> list[dict[str, str]]:
    """Return the jobs that are due by themselves."""
    return [{"job": f"`{job}`", "when": f"`{when}`"} for job, when in params["operations"]["schedule"].items()]


def closed_day() -> list[dict[str, str]]:
    """Return the columns of the file of a closed day."""
    return [{"column": f"`{field.name}`", "type": f"`{field.type}`"} for field in store.SCHEMA]


def headers() -> list[dict[str, str]]:
    """Return the headers of all answers; one without a value keeps the server from naming itself."""
    return [{"header": f"`{name}`", "value": f"`{value}`" if value else "(none)"} for name, value in HEADERS.items()]


def split_columns() -> str:
    """Return the names of the columns of a split, as prepare.ipynb gives them."""
    cells = nbformat.read(ROOT / "prepare.ipynb", as_version=4).cells
    [names] = [found[1] for cell in cells if (found := re.search(r"(?m)^COLUMNS = \[(.+)\]", cell.source))]
    return names.replace('"', "`")

"""Configuration of the documentation, which `make docs` builds to build/docs/index.html.

Its source folder is the whole repository, so that notebooks and README files are pages where they lie, and a link that
works on a page of the repository works on the site. The pages in docs/ are templates of Jinja: what stands there
between double braces is called in `generated.py`, at each build.
"""

import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import mermaidx
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import generated  # noqa: E402

project = html_title = "SMS spam filter"
root_doc = "docs/index"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
include_patterns = ["docs/**.md", "*.ipynb", "data/today.md", "*/README.md"]
exclude_patterns = [".*", "backups", "build", "mlruns", "state"]

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3
default_role = "code"
smartquotes = False
autodoc_default_options = {"members": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
# What belongs to other projects is not linked: the site works without a network.
nitpick_ignore_regex = [("py:.*", rf"(?!({'|'.join(generated.PACKAGES)})\b).*")]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "first.html"}
html_copy_source = False
html_show_copyright = False
html_favicon = "../static/icon.svg"
html_math_renderer = "mathml"
templates_path = ["_templates"]


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Fill in what a page of docs/ takes out of the project, at each build anew."""
    if page.startswith("docs/"):
        app.env.note_reread()
        template = jinja2.Template(source[0], undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        source[0] = template.render(vars(generated))


def link_files(app: Sphinx, tree: nodes.document) -> None:
    """Link the documentation of a module where a page links its file; a folder has no page, and remains as text."""
    links = [*tree.findall(addnodes.download_reference), *tree.findall(addnodes.pending_xref)]
    for link in [link for link in links if link["reftype"] == "myst"]:
        path, full_path = app.env.relfn2path(link["reftarget"])
        name = path.removesuffix(".py").replace("/", ".")
        if name in generated.modules():
            link.replace_self(addnodes.pending_xref("", *link.children, refdomain="py", reftype="mod", reftarget=name))
        elif Path(full_path).is_dir():
            link.replace_self(link.children)


class Mermaid(SphinxDirective):
    """A diagram, drawn when the site is built, so that a page that shows it needs no program."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the drawing, with names of its own."""
        drawn = mermaidx.render("\n".join(self.content), theme="neutral").svg()
        name = f"diagram-{self.env.new_serialno('mermaid')}"
        width = float(re.search("max-width: ([0-9.]+)px", drawn)[1])
        style = f"--width: {width}px"  # a wide one is made smaller as far as it can still be read, then it scrolls
        drawn = drawn.replace("my-svg", name)
        return [nodes.raw("", f'<div class="diagram" style="{style}">{drawn}</div>', format="html")]


def write_formula(translator: Any, node: nodes.math) -> None:
    """Write a formula of a line as MathML, which browsers show by themselves."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the above to Sphinx; pages can be read and written by several processes."""
    app.connect("source-read", fill_in)
    app.connect("doctree-read", link_files)
    app.add_directive("mermaid", Mermaid)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""A bundle as one HTML file that needs no server and no network.

    Path("page.html").write_text(render(bundle.open("dump/rank0")))

Nothing of a bundle can run there. Its data stands in the file as compressed base64, which has no character that means
something in HTML; the page writes it as text, never as markup; and the page's policy allows this file's own script
and style, by their hashes, and no other, no network, and no text turned into markup (trusted types).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from npu_compiler.inspect.bundle import Bundle, StoredGraph
from npu_compiler.inspect.page.data import page_data

LIBRARY = "vendor/dagre.min.js"
SCRIPTS = (
    *("dom.js", "model.js", "state.js", "list.js", "stages.js", "modules.js", "detail.js"),
    *("pass.js", "layout.js", "canvas.js", "graph.js", "source.js", "streams.js", "memory.js", "tables.js"),
    *("keys.js", "main.js"),
)
"""The page's modules, each behind those that it imports from."""
_IMPORT = re.compile(r"""^import (\{[^}]*\}) from "\./([\w.]+)";$""", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:const|function|class|async function) (\w+))", re.MULTILINE)


def render(bundle: Bundle, graphs: Sequence[StoredGraph] | None = None) -> str:
    """The page of a bundle; `graphs`: only of these.

    Raises:
        BundleError: a file of the bundle is damaged.
    """
    data = data_of(bundle, graphs)
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(errors="backslashreplace"), 6, mtime=0)
    script, style = _script(), _asset("page.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    parts = {
        "policy": html.escape(policy, quote=True).replace("&#x27;", "'"),
        "title": html.escape(str(bundle)),
        "style": style,
        "data": base64.b64encode(packed).decode(),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def data_of(bundle: Bundle, graphs: Sequence[StoredGraph] | None = None) -> dict[str, Any]:
    """What the page of a bundle shows, as JSON has it.

    Raises:
        BundleError: a file of the bundle is damaged.
    """
    return page_data(bundle, bundle.graphs if graphs is None else graphs)


def _script() -> str:
    """The modules as one script, each in a function of its own: a file opened from disk can't import another."""
    parts = [re.sub(r"^//# sourceMappingURL.*$", "", _asset(LIBRARY), flags=re.MULTILINE), "const modules = {};"]
    for name in SCRIPTS:
        text = _asset(name)
        given = ", ".join(_EXPORT.findall(text))
        text = _IMPORT.sub(r'const \1 = modules["\2"];', _EXPORT.sub("", text))
        parts.append(f'modules["{name}"] = (() => {{\n{text}return {{ {given} }};\n}})();')
    return '"use strict";\n' + "\n".join(parts)


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath("static", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

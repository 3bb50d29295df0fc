"""Settings of the site, which ``make docs`` builds.

Pages are Markdown that reads well on GitHub, too. What only a site can do is done here: a page includes a file from
outside docs/ in place of a block ``include``, links to code lead to the reference, and a page of code becomes a
notebook.
"""

import ast
import contextlib
import importlib
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import mmwsl.registry  # noqa: F401  readies the stack
from mmwsl.version import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LOG = logging.getLogger(__name__)

project, author, release = 'mmwsl', 'The mmwsl authors', __version__
copyright = author
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode', 'sphinx_copybutton']
html_theme = 'furo'
html_title = f'mmwsl {release}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sphinx = False
html_theme_options = {'top_of_page_buttons': []}
pygments_style, pygments_dark_style = 'default', 'github-dark'
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
html_math_renderer = 'mathml'  # browsers draw it themselves: no script from elsewhere
copybutton_prompt_text = '>>> '
copybutton_only_copy_prompt_lines = False

# `make docs` turns warnings into errors: a link that leads nowhere, a reference to a name that does not exist. Names of
# other packages have their own sites, which a build without network cannot ask
nitpicky = True
nitpick_ignore_regex = [('py:(class|exc|data|obj)', r'(?!mmwsl).+')]
autodoc_default_options = {'members': True, 'member-order': 'bysource', 'show-inheritance': True}
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_typehints_format = 'short'
napoleon_google_docstring, napoleon_numpy_docstring = True, False

# a room of the package, and the page that documents it; the longest name that fits counts
API = {
    'functional': 'functional',
    'models/losses': 'losses',
    'models/weightings': 'weightings',
    'models': 'models',
    'datasets': 'data',
    'cache': 'data',
    'analysis': 'analysis',
    'engine': 'engine',
    '': 'utils',
}
ELSEWHERE = {
    'README.md': 'index',
    'CHANGELOG.md': 'changelog',
    'CONTRIBUTING.md': 'contributing',
    'configs/README.md': 'configs',
    'results/README.md': 'runs',
    'results/QUEUE.md': 'runs',
    'results': 'results',
}
INCLUDE = re.compile(r'<!-- include: (\S+) -->.*?<!-- end -->', re.DOTALL)
COLON = '\ue000'  # a character that nobody writes
LINK = re.compile(r'(?<=\]\()(?!https?:|#)([^)#\s]+)(#[^)\s]+)?')


# -------------------------------------------------------------------------------------------------- pages and links


def page_of(path: Path) -> str | None:
    """The page, without suffix, that shows what is at a path of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith('mmwsl/'):
        rooms = [room for room in API if name.removeprefix('mmwsl/').startswith(room)]
        return f'api/{API[max(rooms, key=len)]}'
    return ELSEWHERE.get(name) or (ELSEWHERE['results'] if name.startswith('results/') and path.is_dir() else None)


def relinked(text: str, origin: Path, page: Path) -> str:
    """Markdown of a file as a page holds it: links are relative to that page, and stay on the site if they can."""

    def relink(link: re.Match) -> str:
        target, anchor = (origin.parent / link[1]).resolve(), link[2] or ''
        if not target.exists() or DOCS in target.parents:
            return os.path.relpath(target, page.parent) + anchor
        shown = page_of(target)
        return os.path.relpath(DOCS / f'{shown}.md' if shown else target, page.parent) + anchor

    return LINK.sub(relink, text)


def included(comment: re.Match, page: Path) -> str:
    origin = (page.parent / comment[1]).resolve()
    return relinked(origin.read_text().split('\n', 1)[1], origin, page)  # the page has a title of its own


def read_page(app: Any, docname: str, content: list[str]) -> None:
    page = DOCS / f'{docname}.md'
    text = relinked(content[0], page, page)
    text = INCLUDE.sub(lambda comment: included(comment, page), text)
    text = text.replace('<!-- notebook -->', '<a href="digits.ipynb" download>Download it for Jupyter.</a>')
    content[0] = text.replace('<!-- tools -->', table_of_tools())


def table_of_tools() -> str:
    """Each tool with the first paragraph of its docstring."""
    rows = ['| | |', '|---|---|']
    for path in sorted((ROOT / 'tools').rglob('*.py')):
        tree = ast.parse(path.read_text())
        purpose = (ast.get_docstring(tree) or '').split('\n\n')[0].replace('\n', ' ').replace('|', r'\|')
        if 'main' in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            rows.append(f'| `{path.relative_to(ROOT)}` | {purpose} |')
    return '\n'.join(rows)


# --------------------------------------------------------------------------------------------------------- docstrings


def origin_of(item: Any) -> str:
    """Name of the module that defines an object, or nothing."""
    return getattr(getattr(item, 'fget', item), '__module__', None) or ''


def is_inherited(item: Any) -> bool:
    """Whether a method has its meaning from a class that its own is derived from."""
    function = getattr(item, 'fget', item)
    *path, attribute = getattr(function, '__qualname__', '').split('.')
    owner = sys.modules.get(origin_of(item))
    for part in path:
        owner = getattr(owner, part, None)
    return inspect.isclass(owner) and any(attribute in vars(base) for base in owner.__mro__[1:])


def read_docstring(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Refuse a public name without docstring; read a star, a bar and a colon as plain characters."""
    ours = name if what == 'module' else origin_of(item)
    if not any(lines) and ours.startswith('mmwsl') and not is_inherited(item):
        LOG.warning('%s %s is public and has no docstring', what, name)
    text = re.sub(r', \*(?=[,)])', r', \\*', '\n'.join(lines))  # a shape
    text = re.sub(r'(`[^`]*`)|\|(\w)\|', lambda found: found[1] or rf'\|{found[2]}\|', text)  # a size
    # napoleon reads what is before a colon as a type, in a first line, too
    if what in ('attribute', 'property'):
        text = text.replace(': ', f'{COLON} ')
    lines[:] = re.sub(r'^Returns:\n    ', ':returns: ', text, flags=re.MULTILINE).split('\n')


def restore_colons(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ':') for line in lines]


def skip(app: Any, what: str, name: str, item: Any, is_skipped: bool, options: Any) -> bool | None:
    """Leave out what has no docstring: methods that do again what a base class documents (hooks' moments), attributes.

    Other functions and classes stay, for :func:`read_docstring` to refuse.
    """
    is_code = inspect.isroutine(item) or inspect.isclass(item) or isinstance(item, property)
    if not is_code or name.startswith('_') or getattr(item, '__doc__', None):
        return None
    return is_inherited(item)


def found(name: str) -> Any:
    """What a whole name stands for, or None."""
    *path, last = name.split('.')
    owner = found('.'.join(path)) if path else None
    with contextlib.suppress(ImportError):
        return getattr(owner, last, None) or sys.modules.get(name) or importlib.import_module(name)
    return None


def place_of(item: Any, env: Any) -> Any:
    """Return where the site documents an object, by whichever of its names."""
    return next((place for name, place in env.domains.python_domain.objects.items() if found(name) is item), None)


def meant(target: str, owner: str) -> Any:
    """What a name in a docstring stands for: a whole one, one of its class, or one of any module of the package."""
    modules = [name for name in sys.modules if name.split('.')[0] == 'mmwsl']
    names = (target, f'{owner}.{target}', *(f'{module}.{target}' for module in modules))
    return next((item for name in names if (item := found(name)) is not None), None)


def resolve(app: Any, env: Any, node: Any, shown: Any) -> Any:
    """Lead a name that is exported twice, or shortened, to its place; one that only the code has stays plain text."""
    target = node['reftarget']
    if node['refdomain'] != 'py' or not target.replace('.', '_').isidentifier():
        return None
    item = meant(target, f'{node.get("py:module")}.{node.get("py:class")}')
    if item is None:
        return None
    place = place_of(item, env)
    return make_refnode(app.builder, node['refdoc'], place.docname, place.node_id, shown) if place else shown


def check_names(app: Any, env: Any) -> None:
    """Refuse a name in an ``__all__`` that no page documents."""
    for room in sorted((ROOT / 'mmwsl').rglob('__init__.py')):
        if room.read_text().startswith('"""Moved to'):  # an old name
            continue
        module = importlib.import_module('.'.join(room.parent.relative_to(ROOT).parts))
        for name in getattr(module, '__all__', []):
            item = getattr(module, name)
            if callable(item) and not place_of(item, env):
                LOG.warning('%s.%s is public and on no page of docs/api', module.__name__, name)


# -------------------------------------------------------------------------------------------------- math and notebook


def write_math(writer: Any, node: Any) -> None:
    writer.body.append(tex2mathml(node.astext(), as_block=node.tagname == 'math_block'))
    raise SkipNode


def notebook(text: str) -> dict:
    """A page of Markdown with blocks of Python as a notebook of Jupyter's format 4, without what it draws itself."""
    text = re.sub(r'<!--.*?-->|!\[.*?\]\(.*?\)\n', '', text)
    text = re.sub(r'\[(.*?)\]\((?!http).*?\)', r'\1', text)  # the notebook has no other pages next to it
    cells = []
    for number, part in enumerate(re.split(r'```python\n(.*?)```\n', text, flags=re.DOTALL)):
        kind = dict(cell_type='code', execution_count=None, outputs=[]) if number % 2 else dict(cell_type='markdown')
        if part.strip():
            cells.append(dict(id=f'cell-{number}', metadata={}, source=part.strip(), **kind))
    return dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)


def write_notebook(app: Any, error: Exception | None) -> None:
    if not error and app.builder.format == 'html':
        (Path(app.outdir) / 'digits.ipynb').write_text(json.dumps(notebook((DOCS / 'digits.md').read_text()), indent=1))


def setup(app: Any) -> None:
    app.add_html_math_renderer('mathml', (write_math, None), (write_math, None))
    app.connect('source-read', read_page)
    app.connect('autodoc-process-docstring', read_docstring, priority=400)  # napoleon's is 500
    app.connect('autodoc-process-docstring', restore_colons, priority=600)
    app.connect('autodoc-skip-member', skip)
    app.connect('missing-reference', resolve)
    app.connect('env-check-consistency', check_names)
    app.connect('build-finished', write_notebook)

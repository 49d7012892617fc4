"""The house is as it is drawn: floors, lengths, widths, numbers. Each test lists all that is wrong at once.

The floors stand in one place, the table under "How it is built" on the front page; these tests read them there.
"""
import ast
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from common import NOTEBOOKS, ROOT
from waiting import HOUR

LIB = ROOT / 'solar_repro'
FILES = [p for p in sorted(LIB.rglob('*.py')) if p.name not in ('__init__.py', '_modidx.py')]
MODULES = {'.'.join(p.relative_to(ROOT).with_suffix('').parts): p for p in FILES}
WIDTH, LENGTH, SHARE, INSIDE, BY_NAME = 120, 450, 1/8, 12, 52
COMMANDS = {'reports.cli', 'reports.commands', 'reports.weights'}      # what `solar-repro` is made of


def floors() -> dict[str, int]:
    "Folder or module -> its floor, from the front page: `| 5 | `eval`, `merge` | ... |`."
    rows = re.findall(r'^\| *(\d+) *\|([^|]*)\|', (ROOT / 'README.md').read_text(encoding='utf-8'), flags=re.M)
    table = {name: int(n) for n, cell in rows for name in re.findall(r'`(\w+)`', cell)}
    return table | dict(__main__=99)     # the command stands on everything


def part(module: str) -> str:
    "What the front page names: a folder of the library, or a module beside the folders."
    return module.split('.')[1]


@cache
def imports(module: str) -> list[tuple[str, int, bool, str]]:
    "What a module imports, functions included: module, line, inside a function?, text; and by `library('a.b')`."
    tree, found = ast.parse(MODULES[module].read_text(encoding='utf-8')), []
    functions = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split('.')[:-node.level] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            targets = [t if (t := f'{base}.{a.name}') in MODULES else base for a in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'library': # a command's, of what it needs
            found.append((f'solar_repro.{ast.literal_eval(node.args[0])}', node.lineno, False, ast.unparse(node)))
            continue
        else: continue
        found += [(t, node.lineno, id(node) in inside, ast.unparse(node)) for t in dict.fromkeys(targets)]
    return found


def ours(module: str) -> list[tuple[str, int]]:
    return [(t, line) for t, line, *_ in imports(module) if t in MODULES and t != module]


def test_every_part_of_the_library_stands_on_a_floor():
    assert {part(m) for m in MODULES} == set(floors()), 'the table of floors on the front page, and the folders'


def numbers() -> dict[str, str]:
    "Module -> number and name of its notebook."
    texts = {p: p.read_text(encoding='utf-8') for p in NOTEBOOKS}
    return {f'solar_repro.{m[1]}': p.name for p, t in texts.items() if (m := re.search(r'default_exp ([\w.]+)', t))}


def test_every_import_goes_down():
    """To a lower floor, or inside a folder to a notebook of a lower number, so that a folder can be read from its
    first; what a function imports when it is called counts, too."""
    on, of, wrong = floors(), numbers(), []
    for m in MODULES:
        for target, line in ours(m):
            a, b = part(m), part(target)
            down = of[m] > of[target] if a == b and LIB.joinpath(a).is_dir() else on.get(a, 0) > on.get(b, 0)
            if not down: wrong.append(f'{m}:{line} (floor {on.get(a)}) imports {target} (floor {on.get(b)})')
    assert not wrong, '\n'.join(wrong)


def test_no_import_goes_in_a_circle():
    below, left = {m: {t for t, _ in ours(m)} for m in MODULES}, set(MODULES)
    while free := {m for m in left if not below[m] & left}: left -= free
    assert not left, f'in a circle, or above one: {sorted(left)}'


def by_name() -> list[tuple[str, str]]:
    "Imports that commands make by name: module, and what it imports."
    return [(m, t) for m in MODULES for t, *_, text in imports(m) if text.startswith('library(')]


def test_what_commands_import_by_name_is_there():
    named = {t for _, t in by_name()}
    assert len(named) > 10 and not named - set(MODULES), named - set(MODULES)


def test_only_commands_import_by_name():
    "So that `--help`, and a mistyped command, take a fifth of a second and not ten: no other module hides an import."
    found = Counter(m.removeprefix('solar_repro.') for m, _ in by_name())
    assert set(found) <= COMMANDS and found.total() <= BY_NAME, dict(found)


def test_imports_stand_at_the_top():
    "A dozen may be inside functions, each with its reason in a comment: on its line, or on the one above."
    lines = {m: MODULES[m].read_text(encoding='utf-8').splitlines() for m in MODULES}
    inside = sorted({(m, n, text) for m in MODULES for _, n, within, text in imports(m) if within})
    said = lambda m, n: '#' in lines[m][n - 1] or lines[m][n - 2].strip().startswith('#')
    silent = [f'{m}:{n} {text}' for m, n, text in inside if not said(m, n)]
    assert len(inside) <= INSIDE, f'{len(inside)}:\n' + '\n'.join(f'{m}:{n} {text}' for m, n, text in inside)
    assert not silent, 'without a reason:\n' + '\n'.join(silent)


def test_what_only_linux_has_stands_in_one_place():
    "A laptop's Python has no `sched_getaffinity`: merging and comparing failed there, for a count of processors."
    only = re.compile(r'sched_|memfd_|pidfd_|posix_fadvise|copy_file_range|fdatasync|eventfd|splice|prctl')
    assert [m for m, p in MODULES.items() if only.search(p.read_text(encoding='utf-8'))] == ['solar_repro.core.files']


def test_no_folder_outgrows_the_others():
    lines = Counter()
    for m, p in MODULES.items(): lines[part(m)] += len(p.read_text(encoding='utf-8').splitlines())
    wide = {f: f'{n/lines.total():.0%}' for f, n in lines.items() if n > SHARE*lines.total()}
    assert not wide, f'of the lines of the library; expected at most {SHARE:.0%} in one folder'


def test_modules_are_short_and_say_what_they_are_for():
    wrong = []
    for m, p in MODULES.items():
        text = p.read_text(encoding='utf-8')
        said, n = ast.get_docstring(ast.parse(text)) or '', len(text.splitlines())
        if n > LENGTH: wrong.append(f'{m}: {n} lines; at most {LENGTH}')
        if 'TODO' in said or len(said.split()) < 4: wrong.append(f'{m}: its docstring is {said!r}; expected a sentence')
    assert not wrong, '\n'.join(wrong)


def written(p: Path) -> list[tuple[int, str]]:
    "The lines of a file, less the list of names that nbdev puts at the head of a module."
    lines = list(enumerate(p.read_text(encoding='utf-8').splitlines(), 1))
    head = [n for n, s in lines if s.startswith('# %% ')][:2]
    if len(head) < 2 or lines[head[0] - 1][1] != '# %% auto #0': return lines
    return [x for x in lines if not head[0] <= x[0] < head[1]]


def cells(p: Path) -> list[dict]:
    "The code cells of a notebook."
    return [c for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def code() -> list[tuple[str, int, str]]:
    "Every line of code that people write: library, profiles, tests, tools, benchmarks, and notebooks' cells."
    folders = 'solar_repro', 'tests', 'tools', 'benchmarks'
    of = '.py', '.toml'
    files = [p for d in folders for p in sorted((ROOT / d).rglob('*')) if p.suffix in of and p.name != '_modidx.py']
    named = [(p, str(p.relative_to(ROOT))) for p in [*files, ROOT / 'setup.py']]
    lines = [(name, n, s) for p, name in named for n, s in written(p)]
    for p in NOTEBOOKS:
        for c in cells(p):
            where = f"{p.relative_to(ROOT)}#{c['id']}"
            lines += [(where, n, s) for n, s in enumerate(''.join(c['source']).splitlines(), 1)]
    return lines


def test_no_line_of_code_is_wide():
    wide = [f'{where}:{n} {len(s)}' for where, n, s in code() if len(s) > WIDTH]
    count = Counter(re.split('[:#]', w)[0] for w in wide)
    assert not wide, f'{len(wide)} lines over {WIDTH} columns: {dict(count)}\n' + '\n'.join(wide)


def exported(p: Path) -> str | None:
    "The module that a notebook says it makes."
    text = '\n'.join(''.join(c['source']) for c in cells(p))
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', text, flags=re.M)
    return found and f'solar_repro.{found[1]}'


def test_notebooks_mirror_the_modules():
    "nbs/core/02_store.ipynb makes solar_repro/core/store.py; the story makes the modules beside the folders."
    made = {p: m for p in NOTEBOOKS if (m := exported(p))}
    named = lambda p: [*p.relative_to(ROOT / 'nbs').parent.parts, re.sub(r'^\d+_', '', p.stem)]
    want = {p: '.'.join(['solar_repro', *named(p)]) for p in made}
    wrong = [f'{p.relative_to(ROOT)} makes {m}; expected {want[p]}' for p, m in made.items() if m != want[p]]
    without = set(MODULES) - set(made.values()) - {'solar_repro.__main__'}
    wrong += [f'{m} comes from no notebook' for m in sorted(without)]
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('folder', sorted({p.parent for p in NOTEBOOKS}), ids=lambda p: p.name)
def test_numbers_have_no_gaps_and_no_twins(folder):
    numbers = [p.name[:2] for p in NOTEBOOKS if p.parent == folder and p.name != 'index.ipynb']
    assert numbers == [f'{k:02}' for k in range(len(numbers))], sorted(p.name for p in NOTEBOOKS if p.parent == folder)


def test_checks_that_an_error_comes_are_entered():
    "`expect_fail(f)` and `pytest.raises(X)` by themselves check nothing: both are for `with`, or are given a function."
    texts = [(str(p.relative_to(ROOT)), ''.join(c['source'])) for p in NOTEBOOKS for c in cells(p)]
    texts += [(p.name, p.read_text(encoding='utf-8')) for p in sorted((ROOT / 'tests').glob('*.py'))]
    wrong, seen = [], 0
    for where, text in texts:
        plain = re.sub(r'^[%!].*', '', text, flags=re.M)
        for node in ast.walk(ast.parse(plain)):
            seen += isinstance(node, ast.With)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                name = ast.unparse(node.value.func)
                if name in ('expect_fail', 'expect_warns') or name == 'pytest.raises' and len(node.value.args) < 2:
                    wrong.append(f'{where}: {ast.unparse(node)}')
    assert seen > 100 and not wrong, '\n'.join(wrong)


def test_every_figure_has_the_one_style():
    "A function that makes axes calls `style()` first: else a figure looks as the cells before it left matplotlib."
    wrong = []
    for m, p in MODULES.items():
        for f in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            if not isinstance(f, ast.FunctionDef): continue
            called = [ast.unparse(n.func) for n in ast.walk(f) if isinstance(n, ast.Call)]
            if {'plt.subplots', 'plt.figure'} & set(called) and 'style' not in called: wrong.append(f'{m}: {f.name}')
    assert not wrong, wrong


def test_figures_are_drawn_by_functions():
    "What a cell draws by itself, to be seen and not closed, can be tried by nobody."
    wrong = [f"{p.relative_to(ROOT)}#{c['id']}" for p in NOTEBOOKS for c in cells(p)
             if 'plt.subplots(' in (text := ''.join(c['source'])) and not text.startswith('#| export')
             and 'plt.close(' not in text]
    assert not wrong, wrong


def test_no_merge_was_left_half_done():
    "Marks of a conflict went into the changelog once, where nothing else reads them."
    folders = [ROOT / d for d in ('nbs', 'solar_repro', 'tests', 'tools', 'benchmarks')]
    texts = [*ROOT.glob('*.*'), *(p for d in folders for p in d.rglob('*'))]
    read = '.md', '.py', '.ipynb', '.toml', '.yml', '.yaml', '.ini', '.cff', '.sh', '.css'
    texts = [p for p in texts if p.suffix in read]
    mark = re.compile(rb'^[ "]*(<{7}|>{7}) ', re.M)
    assert [str(p.relative_to(ROOT)) for p in texts if mark.search(p.read_bytes())] == []


def test_no_limit_that_a_slow_machine_would_meet():
    "In a test and in a notebook what is waited for comes when it comes: limits are of an hour, loops count nothing."
    def limits(name, code):
        try: tree = ast.parse(code)
        except SyntaxError: return              # a cell with a magic
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == 'timeout' and isinstance(node.value, ast.Constant):
                if node.value.value < HOUR: yield f'{name}: timeout={node.value.value}'
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith('LIMIT_S'):
                if ast.unparse(node.value) != 'HOUR': yield f'{name}: {ast.unparse(node)}'
            if isinstance(node, ast.For) and 'sleep(' in ast.unparse(node):
                ends = any(isinstance(n, ast.Break) for n in ast.walk(node))
                if ends and ast.unparse(node.iter).startswith('range('): yield f'{name}: a counted wait'
    sources = [(f.name, f.read_text(encoding='utf-8')) for f in sorted((ROOT / 'tests').glob('*.py'))]
    for nb in NOTEBOOKS:
        cells = [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        sources += [(nb.name, code) for c in cells if not (code := ''.join(c['source'])).startswith('#| export')]
    assert not [x for name, code in sources for x in limits(name, code)]

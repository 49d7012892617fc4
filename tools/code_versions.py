"""Has the code that makes a kind of stage changed since its code version was recorded?

    python tools/code_versions.py             which kinds have changed, and where
    python tools/code_versions.py unchanged   run smoke by the recorded code and by that of now; if all is equal, record
    python tools/code_versions.py raise KIND  raise the code versions of kinds, so that stores build them again; record
"""
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path('nbs/stages/code_versions.json') # beside the notebook that holds CODE_VERSIONS
PACKAGE = 'solar_repro'
ALWAYS = ('pipeline.builder.Builder._prepare',) # what every stage is built under
OF_CONTEXT = {'materialize': 'models.resident.Resident'} # what a builder calls through its context
DATA = {'tiny.world.shipped_base': 'tiny/base', 'eval.build_requests': 'tasks'} # files that a function reads


def text_of(name:str)->str: # name of a module below the package
    file = ROOT/PACKAGE/f'{name.replace(".", "/")}.py'
    if not file.is_file(): file = file.with_suffix('')/'__init__.py'
    return _text(file, file.stat().st_mtime_ns)


@cache
def _text(file:Path, written:int)->str: return file.read_text()


def module(name:str)->tuple[dict[str,list[ast.AST]],dict[str,tuple[str,str|None]],list]:
    "What a module defines, what it imports from the package, and its patches of classes as (class, function)."
    return _module(name, text_of(name))


@cache
def _module(name:str, text:str):
    tree = _Bare().visit(ast.parse(text))
    defined, patches = {}, []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef|ast.ClassDef) and (of := _patched(node)): patches.append((of, node))
        for n in _names(node): defined.setdefault(n, []).append(node)
        if isinstance(node, ast.ClassDef):
            for m in node.body:
                if isinstance(m, ast.FunctionDef): defined[f'{node.name}.{m.name}'] = [m]
    for call in (n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)):
        for n in {n.id for n in ast.walk(call) if isinstance(n, ast.Name)} & set(defined): # as of register(NAME, f)
            defined[n].append(call)
    return defined, dict(_imports(tree, name)), patches


def _names(node:ast.AST)->list[str]:
    "What a statement at a module's top defines."
    if isinstance(node, ast.FunctionDef|ast.ClassDef): return [] if _patched(node) else [node.name]
    targets = getattr(node, 'targets', [getattr(node, 'target', None)]) if isinstance(
        node, ast.Assign|ast.AnnAssign|ast.AugAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def _patched(node:ast.AST)->str|None:
    "The class that a function with @patch belongs to."
    if isinstance(node, ast.FunctionDef) and any('patch' in ast.unparse(d) for d in node.decorator_list):
        return ast.unparse(node.args.args[0].annotation)


def _imports(tree:ast.AST, name:str)->Iterator[tuple[str,tuple[str,str|None]]]: # alias -> module, name in it
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level:
            above = [PACKAGE, *name.split('.')][:-node.level]
            source = '.'.join([*above, *([node.module] if node.module else [])])
        else: source = node.module
        if source.split('.')[0] != PACKAGE: continue
        source = source.removeprefix(PACKAGE).removeprefix('.')
        for a in node.names:
            whole = f'{source}.{a.name}'.removeprefix('.')
            yield a.asname or a.name, (whole, None) if _is_module(whole) else (source, a.name)


def _is_module(name:str)->bool:
    path = ROOT/PACKAGE/name.replace('.', '/')
    return path.with_suffix('.py').is_file() or (path/'__init__.py').is_file()


class _Bare(ast.NodeTransformer):
    "Code without what changes no result: annotations of functions, docstrings, the words of errors."
    def visit_FunctionDef(self, node):
        if not _patched(node):
            for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]: a.annotation = None
        node.returns = None
        return self.generic_visit(node)

    def visit_Raise(self, node): return ast.Raise(ast.Name('error', ast.Load()), None)
    def visit_Expr(self, node):
        return ast.Pass() if isinstance(node.value, ast.Constant) else self.generic_visit(node)


def _used(where:str, nodes:list[ast.AST])->Iterator[tuple[str,str]]: # module, name
    "The names of the package that a definition mentions."
    defined, imports, _ = module(where)
    for node in (n for top in nodes for n in ast.walk(top)):
        if isinstance(node, ast.Name):
            if node.id in defined: yield where, node.id
            elif node.id in imports and imports[node.id][1]: yield imports[node.id]
        if isinstance(node, ast.Attribute):
            of = node.value.id if isinstance(node.value, ast.Name) else None
            if of in imports and imports[of][1] is None: yield imports[of][0], node.attr
            if of == 'context' and node.attr in OF_CONTEXT: yield _split(OF_CONTEXT[node.attr])


def _split(name:str)->tuple[str,str]: # 'models.resident.Resident' -> its module, its name there
    parts = name.split('.')
    n = next(k for k in range(len(parts), 0, -1) if _is_module('.'.join(parts[:k])))
    return '.'.join(parts[:n]), '.'.join(parts[n:])


def _found(where:str, name:str)->tuple[str,str]|None: # module, name; None: no definition of ours
    "Where a name is defined that a module has or imports."
    defined, imports, _ = module(where)
    if name in defined: return where, name
    return _found(*imports[name]) if name in imports and imports[name][1] else None


@cache
def _definition(where:str, name:str, text:str)->tuple[str,list[tuple[str,str]]]: # hash, names that it mentions
    "A definition, with what is patched into it in its module."
    defined, _, patches = _module(where, text)
    nodes = [*defined[name], *(node for of, node in patches if of == name)]
    return _hash('\n'.join(ast.dump(n) for n in nodes).encode()), list(_used(where, nodes))


def reached(
    roots:list[str], # names below the package
)->dict[str,str]: # every definition that they lead to -> hash of its code
    "A function and what it calls in the library, by the hash of each."
    found, todo = {}, [_split(r) for r in roots]
    while todo:
        at = _found(*todo.pop())
        if at is None or '.'.join(at) in found: continue
        found['.'.join(at)], more = _definition(*at, text_of(at[0]))
        todo += more
        for f in _files({'.'.join(at)}):
            named = re.findall(rf'!function {PACKAGE}\.(\S+)', f.read_text()) if f.suffix == '.yaml' else []
            todo += [_split(n) for n in named]
    return dict(sorted(found.items())) | {f.relative_to(ROOT/PACKAGE).as_posix(): _hash(f.read_bytes())
                                          for f in _files(found)}


def _files(found:set[str]|dict[str,str])->list[Path]:
    "What functions read."
    folders = [ROOT/PACKAGE/folder for name, folder in DATA.items() if name in found]
    return [f for folder in folders for f in sorted(folder.rglob('*')) if f.is_file() and f.suffix[:3] != '.py']


def _hash(data:bytes)->str: return hashlib.sha256(data).hexdigest()[:8]


def now()->dict[str,dict]: # kind -> version, code
    "The code versions, and the code of each kind."
    nodes = module('stages.graph')[0]['CODE_VERSIONS']
    versions = {k.arg: k.value.value for k in nodes[0].value.keywords}
    builders = {k.arg: k.value.id for k in module('stages.builders')[0]['BUILDERS'][0].value.keywords}
    if set(versions) != set(builders): sys.exit(f'CODE_VERSIONS has {set(versions)}, BUILDERS {set(builders)}')
    return {k: dict(version=v, code=reached([f'stages.builders.{builders[k]}', *ALWAYS])) for k, v in versions.items()}


def changed(
    recorded:dict[str,dict],
    today:dict[str,dict], # of `now`
)->dict[str,list[str]]: # kind -> names of what changed, with + or - if new or gone
    "The kinds whose code is another than recorded."
    out = {}
    for kind in sorted(recorded.keys() | today.keys()):
        was, code = (x.get(kind, {}).get('code', {}) for x in (recorded, today))
        out[kind] = [f'{"" if n in was and n in code else "+" if n in code else "-"}{n}'
                     for n in sorted(was.keys() | code.keys()) if was.get(n) != code.get(n)]
        if not out[kind] and recorded[kind]['version'] == today[kind]['version']: del out[kind]
    return out


def complaint(recorded:dict[str,dict], today:dict[str,dict])->str: # empty: nothing to say
    "What has changed without being recorded, and what to do."
    lines = []
    for kind, where in changed(recorded, today).items():
        a, b = recorded.get(kind, {}).get('version'), today.get(kind, {}).get('version')
        version = f'code version {b}' if a == b else f'code version {a} -> {b}, not recorded'
        more = f' and {len(where)-8} more' if len(where) > 8 else ''
        lines.append(f'{kind} ({version}): {", ".join(where[:8])}{more}')
    if not lines: return ''
    return '\n'.join(['the code of these kinds of stages has changed since their code versions were recorded:', *lines,
                      'If every result stays the same: python tools/code_versions.py unchanged',
                      'If not, so that stores build them again: python tools/code_versions.py raise KIND ...'])


def read_record()->dict[str,dict]: return json.loads((ROOT/RECORD).read_text()) if (ROOT/RECORD).exists() else {}


def write_record(today:dict[str,dict])->None: # a kind a line
    lines = [f'{json.dumps(kind)}: {json.dumps(today[kind])}' for kind in sorted(today)]
    (ROOT/RECORD).write_text('{' + ',\n '.join(lines) + '}\n')


SMOKE = '''
import json, sys
from solar_repro.pipeline.experiment import Experiment
exp = Experiment('smoke', store=sys.argv[1])
exp.run()
made = {n: exp.find(n).content for n in exp.graph}
made |= {f'Table {n}': exp.table(n).to_csv() for n in range(3, 8)}
json.dump(made, open(sys.argv[2], 'w'))
'''


def smoke(code:Path, folder:Path)->dict[str,str]: # stage -> hash of its files; table -> its text
    "All of smoke, built by the code in a folder."
    env = dict(os.environ, PYTHONPATH=str(code))
    subprocess.run([sys.executable, '-c', SMOKE, folder/'store', folder/'made.json'], env=env, cwd=code, check=True)
    return json.loads((folder/'made.json').read_text())


def git(*args:str)->str:
    return subprocess.run(['git', *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def prove_unchanged(where:dict[str,list[str]])->None:
    "Stop unless smoke's results are those of the code that was recorded."
    data = sorted({n for names in where.values() for n in names if '/' in n})
    if data: sys.exit(f'{", ".join(data)}: data, which smoke does not read; raise the kinds instead')
    commit = git('log', '-1', '--format=%H', '--', str(RECORD))
    if not commit: sys.exit('no record yet is committed, so there is nothing to compare with')
    with tempfile.TemporaryDirectory() as d:
        for name in ('was', 'is'): (Path(d)/name).mkdir()
        git('worktree', 'add', '--detach', f'{d}/code', commit)
        try: was = smoke(Path(d)/'code', Path(d)/'was')
        finally: git('worktree', 'remove', '--force', f'{d}/code')
        made = smoke(ROOT, Path(d)/'is')
    other = [n for n in was if made.get(n) != was[n]]
    if other: sys.exit(f'results have changed: {", ".join(other)}. Raise the kinds that changed, or mend the code')
    print(f'{len(was)} stages and tables of smoke are those of {commit[:10]}, byte for byte')


def raise_kinds(kinds:list[str], today:dict[str,dict])->None:
    "Raise code versions, in the notebook and in the module made from it."
    for kind in kinds:
        if kind not in today: sys.exit(f'no kind {kind!r}; expected some of {sorted(today)}')
        for file in (ROOT/'nbs/stages/01_graph.ipynb', ROOT/PACKAGE/'stages/graph.py'):
            old, n = today[kind]['version'], rf'(CODE_VERSIONS = dict\((?:[^)]|\n)*?\b{kind}=)(\d+)'
            text, times = re.subn(n, rf'\g<1>{old + 1}', file.read_text())
            if times != 1: sys.exit(f'{file}: CODE_VERSIONS is not as expected; raise {kind} by hand')
            file.write_text(text)


def main(what:str='', *kinds:str)->None:
    recorded, today = read_record(), now()
    where = changed(recorded, today)
    if what == 'unchanged':
        if recorded: prove_unchanged(where)
    elif what == 'raise' and kinds:
        raise_kinds(list(kinds), today)
        raised = now()
        today = recorded | {k: raised[k] for k in kinds}
    else: sys.exit((__doc__ if what else complaint(recorded, today)) or 0)
    write_record(today)


if __name__ == '__main__': main(*sys.argv[1:])

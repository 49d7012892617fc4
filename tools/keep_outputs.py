"""Take the outputs of a run into nbs/: `keep_outputs.py [--profile tiny]` reads what `make notebooks` executed.

What differs between two executions on one store, or between two machines, is left out or named alike: what was said on
standard error (warnings, progress), paths of the project, names of temporary folders. Pictures keep 64 colours, which
makes them a third as large and looks the same.
"""

import argparse
import base64
import hashlib
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WIDGET = 'application/vnd.jupyter.widget-view+json'     # a progress bar
STYLED = re.compile(r'\bT_[0-9a-f]{5}(?=[_"\s])')
TEMPORARY = re.compile(rf'{re.escape(tempfile.gettempdir())}/[\w.-]+')


def small(png: bytes) -> bytes:
    "A picture on white in at most 64 colours."
    image = Image.open(io.BytesIO(png)).convert('RGBA')
    page, out = Image.new('RGB', image.size, 'white'), io.BytesIO()
    page.paste(image, mask=image.getchannel('A'))
    page.quantize(64, dither=Image.Dither.NONE).save(out, 'PNG', optimize=True)
    return out.getvalue()


def plain(text: str) -> str:
    "Text without what only this execution has: paths, and the random names that pandas gives to styled tables."
    text = TEMPORARY.sub('TEMPORARY', text.replace(f'{ROOT}/', '').replace(str(ROOT), '.'))
    return STYLED.sub(f'T_{hashlib.sha256(STYLED.sub("", text).encode()).hexdigest()[:5]}', text)


def tidy(outputs: list) -> list:
    "Outputs as they are kept; what was printed in one go is one, however it was cut on its way."
    kept = []
    for o in outputs:
        if o.output_type == 'stream' and o.name == 'stderr' or WIDGET in o.get('data', {}): continue
        if kept and o.output_type == kept[-1].output_type == 'stream': kept[-1].text += o.text
        else: kept.append(o)
    for o in kept:
        if o.output_type == 'stream':
            o.text = plain(o.text)
        for kind, value in o.get('data', {}).items():
            if kind == 'image/png':
                o.data[kind] = base64.b64encode(small(base64.b64decode(value))).decode()
            elif kind.startswith('text/'):
                o.data[kind] = plain(value)
    return kept


def take_outputs(nb, executed: Path) -> bool:
    "Copy outputs by cell id; False, and nothing copied, if the cells are not those that ran."
    if not executed.is_file():
        return False
    done = {c.id: c for c in nbformat.read(executed, 4).cells}
    if any(c.id not in done or done[c.id].source != c.source for c in nb.cells):
        return False
    for c in nb.cells:
        if c.cell_type == 'code':
            c.outputs = tidy(done[c.id].outputs)
    return True


def main() -> None:
    from solar_repro.reports.notebooks import notebooks
    from solar_repro.pipeline.experiment import Experiment
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--profile', default='tiny', help='the run whose executed notebooks are taken (default: tiny)')
    ap.add_argument('--seed', type=int, help="in place of the profile's")
    args = ap.parse_args()
    run, nbs = Experiment(args.profile, args.seed).folder / 'notebooks', ROOT / 'nbs'
    other = []
    for p in notebooks(nbs):
        nb, name = nbformat.read(p, 4), p.relative_to(nbs)
        if take_outputs(nb, run / name):
            nbformat.write(nb, p)
        else:
            other.append(name.as_posix())
    subprocess.run([str(Path(sys.executable).parent / 'nbdev_clean')], check=True, cwd=ROOT)
    if other:
        sys.exit(
            f'keep_outputs: {", ".join(other)}: not as executed for {args.profile}; expected every notebook as it ran.'
            f' Run `make notebooks PROFILE={args.profile}`.'
        )


if __name__ == '__main__':
    main()

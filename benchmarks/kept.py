"What a benchmark has found, kept: results/NAME.md for people, results/NAME.json for programs."
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent/'results'


def keep(name: str, page: str | None = None, found: dict | None = None) -> None:
    "Write the page, what was found, or both."
    RESULTS.mkdir(exist_ok=True)
    if page is not None: (RESULTS/f'{name}.md').write_text(page, encoding='utf-8')
    if found is not None: (RESULTS/f'{name}.json').write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


def command() -> str:
    "What one types to repeat it."
    return ' '.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])

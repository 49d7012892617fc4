"Packaging metadata, all of it read from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages
from setuptools.command.build_py import build_py
import shlex
import shutil

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
c = cfg['DEFAULT']
lib = c['lib_path']


class BuildWithNotebooks(build_py):
    "Notebooks, and the pictures on the front page, travel in the package, from where `solar-repro init` lays them out."

    def run(self):
        super().run()
        for nb in sorted(p for p in Path('nbs').rglob('*') if p.suffix in ('.ipynb', '.png')):
            target = Path(self.build_lib, lib, 'notebooks', nb.relative_to('nbs'))
            if not self.editable_mode and not any(p.startswith(('.', '_')) for p in nb.parts):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(nb, target)


setup(
    cmdclass={'build_py': BuildWithNotebooks},
    name=c['lib_name'], version=c['version'], description=c['description'],
    author=c['author'], author_email=c['author_email'], keywords=c['keywords'].split(), url=c['git_url'],
    license={'apache2': 'Apache-2.0', 'mit': 'MIT', 'bsd3': 'BSD-3-Clause'}[c['license']],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['profiles/*.toml', 'tasks/*.yaml', 'tiny/base/*', 'recorded/*/*/*.json.gz']},
    python_requires=f">={c['min_python']}",
    install_requires=shlex.split(c['requirements']),
    extras_require={'dev': shlex.split(c['dev_requirements']), 'ray': shlex.split(c['ray_requirements'])},
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else c['description'],
    long_description_content_type='text/markdown',
    classifiers=[f'Programming Language :: Python :: {v}' for v in ('3', *c['python_versions'].split())],
    entry_points={
        'console_scripts': shlex.split(c['console_scripts']),
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
)

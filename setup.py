"Packaging metadata, all of it read from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages
import shlex

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
c = cfg['DEFAULT']
lib = c['lib_path']

setup(
    name=c['lib_name'], version=c['version'], description=c['description'],
    author=c['author'], author_email=c['author_email'], keywords=c['keywords'].split(), url=c['git_url'],
    license={'apache2': 'Apache-2.0', 'mit': 'MIT', 'bsd3': 'BSD-3-Clause'}[c['license']],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['profiles/*.toml', 'tasks/*.yaml', 'tiny/base/*']},
    python_requires=f">={c['min_python']}",
    install_requires=shlex.split(c['requirements']),
    extras_require={'dev': shlex.split(c['dev_requirements'])},
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else c['description'],
    long_description_content_type='text/markdown',
    classifiers=['Programming Language :: Python :: 3', 'Programming Language :: Python :: 3.11'],
    entry_points={
        'console_scripts': shlex.split(c['console_scripts']),
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
)

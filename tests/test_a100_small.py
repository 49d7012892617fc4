"""The profile `a100` on a CPU: a random fp16 base in shards, NF4, bfloat16 under autocast, token budgets; and once more
with the base in bfloat16, as `a100-bf16` has it.

bfloat16 is what this run has and no other test has; sizes are toy, all other settings are the profile's.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from solar_repro.core.config import load_profile
from solar_repro.paper import MADE, models
from solar_repro.pipeline.experiment import Experiment
from solar_repro.reports.workspace import make_workspace

pytestmark = pytest.mark.slow

PROFILE = """
extends = "a100"
name = "a100-small"
label = "a100 on a CPU, random weights"
[machine]
device = "cpu"
threads = 1
[base]
source = "./base"
[data]
source = "tiny"
[data.rows]
alpaca_gpt4 = 96
openorca = 16
synth_math_instruct = 24
ultrafeedback_clean = 12
synth_math_alignment = 12
[sft]
lora_r = 8
batch_size = 4
max_length = 256
max_tokens_per_microbatch = 256
save_steps = 2
[dpo]
batch_size = 4
max_length = 256
max_tokens_per_microbatch = 512
save_steps = 2
[eval]
n_items = 12
[eval.num_fewshot]
arc = 4
hellaswag = 0
mmlu = 5
truthfulqa = 0
winogrande = 0
gsm8k = 2
"""

BENCHMARKS = Path(__file__).resolve().parents[1]/'benchmarks'

# a base with the shipped tokenizer, in a process of its own: torch's threads and seeds stay as they are here
MAKE_BASE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gpu_check import fp16_base
fp16_base(Path(sys.argv[2]))
"""

RUN = """
import sys
from solar_repro.pipeline.experiment import Experiment
Experiment(sys.argv[1], store=sys.argv[2]).run(sys.argv[3:])
"""


def python(code, *words):
    said = subprocess.run([sys.executable, '-c', code, *map(str, words)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Folder of the profile, its base and its store, in which SLERP and all that it stands on is built."
    folder = tmp_path_factory.mktemp('a100')
    (folder/'small.toml').write_text(PROFILE)
    python(MAKE_BASE, BENCHMARKS, folder/'base')
    assert len(list((folder/'base').glob('*.safetensors'))) > 1, 'shards'
    python(RUN, folder/'small.toml', folder/'store', 'Merge v4')
    return folder


@pytest.fixture(scope='module')
def exp(small): return Experiment(small/'small.toml', store=small/'store')


def test_it_is_a100_but_for_its_sizes(exp):
    ours, theirs = exp.profile, load_profile('a100')
    for section in ('sft', 'dpo'):
        sizes = {'lora_r', 'batch_size', 'max_length', 'max_tokens_per_microbatch', 'save_steps', 'rows'}
        a, b = (getattr(p, section).model_dump(exclude=sizes) for p in (ours, theirs))
        assert a == b and a['nf4'] and a['compute_dtype'] == 'bfloat16' and a['optimizer'] == 'adamw_torch_fused'
    assert ours.eval.protocol == theirs.eval.protocol and ours.merge == theirs.merge


def test_every_training_up_to_slerp_runs_and_changes_something(exp):
    built = exp.status().set_index('stage')
    for name in ('SFT v3', 'SFT v4', 'Cand. 1', 'Cand. 2', 'Merge v4'): assert built.loc[name, 'state'] == 'built', name
    assert exp.graph['Merge v4'].settings['method'] == 'slerp'
    for name in ('SFT v3', 'Cand. 1'):
        log = exp.log(name)
        assert len(log) >= 3 and log['loss'].between(.01, 20).all(), name


def test_slerp_is_written_in_the_bases_dtype(exp):
    from safetensors import safe_open
    folder = exp.find('Merge v4').path/'checkpoint'
    kinds = set()
    for file in folder.glob('*.safetensors'):
        with safe_open(file, 'pt') as f: kinds |= {str(f.get_slice(n).get_dtype()) for n in f.keys()}
    assert kinds == {'F16'}


def test_a_merged_model_answers_gsm8k(small, exp):
    python(RUN, small/'small.toml', small/'store', 'eval/Merge v4/gsm8k')
    score = json.loads((exp.find('eval/Merge v4/gsm8k').path/'score.json').read_text())
    assert score['n'] == 12 and 0 <= score['score'] <= 1


AUTOCAST = """
import json, sys
from collections import Counter
from pathlib import Path
import peft.tuners.lora.bnb as quantized
import torch
from solar_repro.core.config import load_profile
from solar_repro.dpo import reference_logps, train_dpo
from solar_repro.models.adapters import AdaptedModel
from solar_repro.sft import train_sft
seen, forward = Counter(), quantized.Linear4bit.forward
def spy(self, x, *args, **kwargs):
    seen[self.training, torch.is_autocast_enabled('cpu')] += 1
    return forward(self, x, *args, **kwargs)
quantized.Linear4bit.forward = spy
folder, out, counts = Path(sys.argv[1]), Path(sys.argv[2]), {}
p = load_profile(folder/'small.toml')
def note(stage):
    counts[stage] = [seen[True, True], seen[True, False]]
    seen.clear()
rows = [dict(prompt=f'what is {i}', completion=f'{i} and {i} is {2*i}') for i in range(96)]
train_sft(folder/'base', rows, out/'sft', p.sft, p.template, 0)
note('sft')
start = AdaptedModel(folder/'base', ((out/'sft'/'adapter', 1.),))
pairs = [dict(prompt=f'what is {i}', chosen=f'{2*i}', rejected=f'{3*i}') for i in range(96)]
ref = reference_logps(start, pairs, p.dpo, p.template)
train_dpo(start, pairs, ref, out/'dpo', p.dpo, p.template, 0)
note('dpo')
Path(sys.argv[2], 'seen.json').write_text(json.dumps(counts))
"""


def test_every_microbatch_runs_under_autocast(small, tmp_path):
    python(AUTOCAST, small, tmp_path)
    for stage, (under, outside) in json.loads((tmp_path/'seen.json').read_text()).items():
        assert under and not outside, f'{stage}: {outside} LoRA layers ran outside autocast, {under} under it'


@pytest.mark.parametrize('extends', ['a100', 'a100-bf16'])
def test_the_story_runs_on_it(small, tmp_path, extends):
    "`make tables` in a folder of its own: all stages, the checks of all notebooks, every row of the five tables."
    make_workspace(tmp_path/'project')
    profile = small/f'{extends}.toml'
    profile.write_text(PROFILE.replace('"a100"', f'"{extends}"'))
    command = [sys.executable, '-m', 'solar_repro.reports.notebooks', '--profile', str(profile)]
    said = subprocess.run(command, cwd=tmp_path/'project', env=dict(os.environ, SOLAR_STORE=str(small/'store')),
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    run = tmp_path/'project'/'runs'/'a100-small'
    story = ['00_paper', '01_data', '02_sft', '03_dpo', '04_merge', '05_eval', '06_tables']
    assert sorted(p.stem for p in (run/'notebooks').glob('*.ipynb')) == story
    for n in MADE:
        table = pd.read_csv(run/'tables'/f'table{n}.csv')
        assert tuple(table['model']) == models(n)
        assert table.drop(columns='model').apply(lambda column: column.between(0, 100).all()).all(), n

"""The profile `a100` on a CPU: a random fp16 base in shards, NF4, bfloat16 under autocast, token budgets; and once more
with the base in bfloat16, as `a100-bf16` has it.

bfloat16 is what this run has and no other test has; sizes are toy, all other settings are the profile's. A short form
trains once of each kind, averages and scores; all else, and the notebooks, are slow.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from forked import forked
from safetensors import safe_open
from safetensors.torch import load_file

from solar_repro.core.config import load_profile
from solar_repro.paper import MADE, models
from solar_repro.pipeline.experiment import Experiment
from solar_repro.reports.workspace import make_workspace

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

# a base with the shipped tokenizer
MAKE_BASE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gpu_check import fp16_base
fp16_base(Path(sys.argv[2]))
"""

# Builds stages, and says of each through how many LoRA layers it went under autocast, and outside of it.
RUN = """
import json, sys
from collections import Counter
import peft.tuners.lora.bnb as quantized
import torch
from solar_repro.pipeline.experiment import Experiment
seen, counts, forward = Counter(), {}, quantized.Linear4bit.forward
def spy(self, x, *args, **kwargs):
    seen[torch.is_autocast_enabled('cpu')] += 1
    return forward(self, x, *args, **kwargs)
quantized.Linear4bit.forward = spy
exp = Experiment(sys.argv[1], store=sys.argv[2])
exp.build_with(workers=1)                 # in this process, where they are counted
for name in sys.argv[3:]:
    exp.run([name])
    counts[name] = [seen.pop(True, 0), seen.pop(False, 0)]
print(json.dumps(counts))
"""

REFS = [f'ref/SFT v3/ultrafeedback_clean {k} of 4' for k in range(1, 5)]
SHORT = ['SFT v3', 'SFT v3 + v4', *REFS, 'DPO v1', 'eval/SFT v3 + v4/hellaswag']


def python(code, *words):
    "In a process of its own: torch's threads and seeds stay as they are here."
    said = forked(code, *words)
    assert said.returncode == 0, said.stderr[-3000:]
    return said.stdout


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Folder of the profile and its base."
    d = tmp_path_factory.mktemp('a100')
    (d/'small.toml').write_text(PROFILE)
    python(MAKE_BASE, BENCHMARKS, d/'base')
    assert len(list((d/'base').glob('*.safetensors'))) > 1, 'shards'
    return d


@pytest.fixture(scope='module')
def passes(folder):
    "The short form, built: stage -> LoRA layers that it went through under autocast, and outside of it."
    return json.loads(python(RUN, folder/'small.toml', folder/'store', *SHORT).splitlines()[-1])


@pytest.fixture(scope='module')
def small(folder, passes):
    "Folder whose store holds SLERP, too, and all that it stands on."
    python(RUN, folder/'small.toml', folder/'store', 'Merge v4')
    return folder


@pytest.fixture(scope='module')
def exp(folder): return Experiment(folder/'small.toml', store=folder/'store')


def test_it_is_a100_but_for_its_sizes(exp):
    ours, theirs = exp.profile, load_profile('a100')
    for section in ('sft', 'dpo'):
        sizes = {'lora_r', 'batch_size', 'max_length', 'max_tokens_per_microbatch', 'save_steps', 'rows'}
        a, b = (getattr(p, section).model_dump(exclude=sizes) for p in (ours, theirs))
        assert a == b and a['nf4'] and a['compute_dtype'] == 'bfloat16' and a['optimizer'] == 'adamw_torch_fused'
    assert ours.eval.protocol == theirs.eval.protocol and ours.merge == theirs.merge


def test_a_training_of_each_kind_an_average_and_a_benchmark(exp, passes):
    "SFT, its reference, DPO after it, in four bits and bfloat16, under budgets of tokens: finite, adapters in float32."
    assert list(passes) == SHORT
    assert all(exp.status().set_index('stage').loc[SHORT, 'state'] == 'built')
    sft, dpo = exp.log('SFT v3'), exp.log('DPO v1')
    assert len(sft) >= 3 and sft['loss'].between(.01, 20).all()
    assert len(dpo) >= 3 and abs(dpo['loss'][0] - math.log(2)) < .02 and dpo['loss'].between(.01, 20).all()
    for name in ('SFT v3', 'DPO v1'):
        factors = load_file(exp.find(name).path/'adapter'/'adapter_model.safetensors')
        assert all(x.dtype == torch.float32 and x.any() for x in factors.values())
    assert [w for _, w in exp.model('SFT v3 + v4').adapters] == [.5, .5]
    score = json.loads((exp.find(SHORT[-1]).path/'score.json').read_text())
    assert score['n'] == 12 and 0 <= score['score'] <= 1


def test_every_microbatch_runs_under_autocast(passes):
    for name in ('SFT v3', SHORT[2], 'DPO v1'):
        under, outside = passes[name]
        assert under and not outside, f'{name}: {outside} LoRA layers ran outside autocast, {under} under it'


@pytest.mark.slow
def test_every_training_up_to_slerp_runs_and_changes_something(small, exp):
    built = exp.status().set_index('stage')
    for name in ('SFT v3', 'SFT v4', 'Cand. 1', 'Cand. 2', 'Merge v4'): assert built.loc[name, 'state'] == 'built', name
    assert exp.graph['Merge v4'].settings['method'] == 'slerp'
    for name in ('SFT v3', 'Cand. 1'):
        log = exp.log(name)
        assert len(log) >= 3 and log['loss'].between(.01, 20).all(), name


@pytest.mark.slow
def test_slerp_is_written_in_the_bases_dtype(small, exp):
    folder = exp.find('Merge v4').path/'checkpoint'
    kinds = set()
    for file in folder.glob('*.safetensors'):
        with safe_open(file, 'pt') as f: kinds |= {str(f.get_slice(n).get_dtype()) for n in f.keys()}
    assert kinds == {'F16'}


@pytest.mark.slow
def test_a_merged_model_answers_gsm8k(small, exp):
    python(RUN, small/'small.toml', small/'store', 'eval/Merge v4/gsm8k')
    score = json.loads((exp.find('eval/Merge v4/gsm8k').path/'score.json').read_text())
    assert score['n'] == 12 and 0 <= score['score'] <= 1


@pytest.mark.slow
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

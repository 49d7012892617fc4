"The campaign of faults: its short form here, all of it in `make test-all`."
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize('form', [['--short'], pytest.param([], marks=pytest.mark.slow)])
def test_no_fault_leaves_anything_stuck_or_wrong(form, full):
    done = subprocess.run([sys.executable, Path(__file__).with_name('campaign.py'), '--store', full, *form],
                          capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(' tries, 0 faults')

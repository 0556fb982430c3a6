"""What is not needed is not imported: the first image should not wait for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "triton", "diffusers", "transformers", "huggingface_hub", "pyarrow", "sklearn", "matplotlib")
WORK = {
    "import": "import sign_fast, sign_fast.models, sign_fast.functional, sign_fast.sampling, sign_fast.metrics",
    "generate": "from sign_fast import ImageGenerator; ImageGenerator.from_pretrained('digits-uncond', 'cpu')([0, 1])",
    "integrations": "import sign_fast.integrations.diffusers.loading, sign_fast.integrations.diffusers.prompts",
    "command line": "from sign_fast.cli.main import cli; cli.main(['--help'], standalone_mode=False)",
}


@pytest.mark.parametrize("what", WORK)
def test_nothing_heavy_is_imported(what):
    program = f"{WORK[what]}\nimport sys\nprint('heavy:', *[n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "heavy:"

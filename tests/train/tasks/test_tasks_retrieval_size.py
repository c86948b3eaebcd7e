"""Retrieval at the size of COCO's test split: 5,000 images x 25,000 captions of 512 dimensions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BAR_S, BAR_MIB = 20, 1024
CODE = """
import json, resource, time
import torch
from train.evaluation import retrieval_ranks
torch.manual_seed(0)
images, texts = (torch.nn.functional.normalize(torch.randn(n, 512), dim=1) for n in (5_000, 25_000))
owner = torch.arange(25_000) // 5
texts += 2 * images[owner]
started = time.perf_counter()
to_text, to_image = retrieval_ranks(images, texts, owner)
seconds = time.perf_counter() - started
peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([seconds, peak_mib, to_text.double().mean().item(), to_image.double().mean().item()]))
"""


@pytest.mark.full
def test_coco_sized_retrieval_needs_no_full_matrix():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, peak_mib, to_text, to_image = json.loads(done.stdout)
    print(f"{seconds:.1f} s, {peak_mib:.0f} MiB in the whole process")
    assert seconds <= BAR_S and peak_mib <= BAR_MIB
    assert to_text < 1 and to_image < 1

"""Two pools that share no memory: torchrun over loopback, tokens equal the judge."""

import json
import subprocess
import sys
from pathlib import Path

import judges
import pytest

from crosspool.across_hosts import main

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


def test_tokens_equal_the_judge_over_torch_distributed(tiny_checkpoints):
    chosen = [tiny_checkpoints["mixtral"], tiny_checkpoints["deepseek_v2"]]
    prompts = [(1, 2, 3), tuple(range(10, 50))]
    models = [word for directory in chosen for word in ("--model", str(directory))]
    ids = [word for prompt in prompts for word in ("--prompt-ids", ",".join(map(str, prompt)))]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, "-m", "crosspool.across_hosts", *models, *ids, "--max-new-tokens", "6"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes_crossed"] > 0
    by_name = {directory.name: directory for directory in chosen}
    assert len(found["results"]) == 4
    for result in found["results"]:
        prompt = tuple(result["prompt_ids"])
        assert result["token_ids"] == judges.greedy_reference(by_name[result["model"]], prompt, 6)


def test_one_process_is_told_how_to_start(capsys):
    assert main(["--model", "none", "--prompt-ids", "1"]) == 2
    assert "start this with torchrun" in capsys.readouterr().err

"""The SLURM script of the docs: told to end, it has the run saved first, and is queued again; one that ends is not."""

import os
import signal
import subprocess
import time
from pathlib import Path

import goldens
import pytest

# Each writes down that it was called. srun is what is told to end, as scancel does with the steps of a job.
COMMANDS = {
    "scontrol": 'echo "scontrol $*" >> calls; [ "$1" = show ] && printf "first\\nsecond\\n"; true',
    "srun": 'echo $$ > srun.pid; shift; exec "$@"',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM "$(cat srun.pid)"',
    "torchrun": 'echo "torchrun $*" >> calls; trap "echo saved >> calls; exit 143" TERM; '
    'for _ in $(seq "$STEPS"); do sleep 0.1; done; echo ended >> calls',
}


@pytest.fixture
def job(tmp_path):
    page = (goldens.ROOT / "docs" / "several-gpus.md").read_text()
    (script,) = [block for block in page.split("```bash\n") if block.startswith("#!/bin/bash\n#SBATCH")]
    (tmp_path / "job.sh").write_text(script.split("```")[0])
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def start(steps: int) -> subprocess.Popen:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "STEPS": str(steps)}
        environment = {**os.environ, **slurm, "SLURM_RESTART_COUNT": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)

    return start, tmp_path / "calls"


def lines(calls: Path) -> list[str]:
    return calls.read_text().splitlines() if calls.exists() else []


def test_it_is_saved_and_queued_again(job):
    start, calls = job
    process = start(600)
    end = time.monotonic() + 30
    while not any(line.startswith("torchrun") for line in lines(calls)):
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)  # until it has set up what it does when it is told to end
    process.send_signal(signal.SIGUSR1)
    process.wait(30)
    shown, training, *rest = lines(calls)
    assert shown.startswith("scontrol show hostnames n[1-2]")
    assert "--nnodes 2 " in training and "--rdzv-endpoint first:29500" in training and "--resume auto" in training
    assert rest == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]


def test_a_run_that_ends_is_not(job):
    start, calls = job
    assert start(1).wait(30) == 0
    assert lines(calls)[-1] == "ended" and not any("requeue" in line for line in lines(calls))

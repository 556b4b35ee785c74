"""What a CUDA device does with this project, in one JSON file to attach to an issue: invariants, probe, benchmark.

None of it has been run on an RTX 4070 yet; the first report of one is worth more than any estimate in the documents.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
REPORT = Path("gpu-check.json")
INVARIANTS = ("tests/invariants/test_one_function.py", "tests/invariants/test_one_graph.py")
CHECKS = {
    "invariants": ["-m", "pytest", "-q", *INVARIANTS, "--device", "cuda"],
    "probe": ["recipes/plan.py", "recipes/fineweb_edu_40m.yaml", "--probe", "--json", "{folder}/probe.json"],
    "training step": ["-W", "ignore", "benchmarks/training_step.py", "--device", "cuda"],
}


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no CUDA device here; `make doctor` says what is missing", file=sys.stderr)
        return 2
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    report: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    failed = False
    for name, words in CHECKS.items():
        print(f"== {name}", flush=True)
        started = time.monotonic()
        command = [sys.executable, *(word.format(folder=build) for word in words)]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(done.stdout, flush=True)
        report[name] = {"exit": done.returncode, "seconds": time.monotonic() - started, "output": done.stdout}
        failed = failed or done.returncode != 0
    if (build / "probe.json").exists():
        report["measured"] = json.loads((build / "probe.json").read_text(encoding="utf-8"))
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{REPORT}: {'something failed, which is worth an issue too' if failed else 'please attach it to an issue'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

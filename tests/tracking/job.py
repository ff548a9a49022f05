"""One job with a tracker, as a process of its own: `python job.py FIELDS_AS_JSON RESULT_AS_JSON HOW_IT_ENDS`."""

import json
import os
import signal
import sys

from runner.tracking.base import RunIdentity
from runner.tracking.wandb import WandbTracker

fields, result, end = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
tracker = WandbTracker(**fields)
try:
    tracker.start(RunIdentity(task="diagnose", run_name="run7", step=result["step"]), {"seed": 0})
    tracker.log({"train/step": 1, "train/loss": 0.5})
    tracker.record(result)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    code = 0
except KeyboardInterrupt:
    code = 130
tracker.finish(code)
if end == "told":
    print(json.dumps(tracker.warnings))
sys.exit(code)

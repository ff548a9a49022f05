"""A stand-in for Slurm's `sacct` on a cluster without accounting: the states of jobs as `scontrol` knows them.

submitit asks `sacct -o JobID,State,NodeList --parsable2 -j 12 -j 13`. scontrol forgets a job some minutes after its
end (MinJobAge); one that is asked for and forgotten is said to be COMPLETED, so that nobody waits for it. This file is
run as a program, many times in a sweep: it imports nothing but the standard library.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise


def table(wanted: Sequence[str], listing: str) -> str:
    """The answer for the job ids `wanted`, from what `scontrol show job --oneliner` prints."""
    rows, seen = [], set()
    for line in listing.splitlines():
        values = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line))
        job = values.get("ArrayJobId") or values.get("JobId")
        if job not in wanted:
            continue
        task = values.get("ArrayTaskId")
        name = job if task is None else f"{job}_{task}" if task.isdigit() else f"{job}_[{task}]"
        rows.append(f"{name}|{values.get('JobState', 'UNKNOWN')}|{values.get('NodeList', '')}")
        seen.add(job)
    rows += [f"{job}|COMPLETED|" for job in wanted if job not in seen]
    return "\n".join(["JobID|State|NodeList", *rows])


def main(words: Sequence[str]) -> int:
    """Print the table for the ids that follow each -j."""
    wanted = [word for before, word in pairwise(words) if before == "-j"]
    asked = subprocess.run(
        ["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True, check=False, timeout=60
    )
    if asked.returncode:
        print(asked.stderr.strip() or "scontrol failed", file=sys.stderr)
        return asked.returncode
    print(table(wanted, asked.stdout))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

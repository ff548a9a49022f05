"""`task=verify`: is a checkpoint still what was written, at any later time."""

from runner.checkpoints.detect import open_checkpoint
from runner.config import VerifyConfig
from runner.errors import CheckpointError
from runner.merge.soundness import check_checkpoint
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.tasks.naming import check_family, checkpoint_path


def run(config: VerifyConfig, context: Context) -> Result:
    """Every check with what it found; exit code 1 where one failed, or with `strict` where there is no manifest.

    `verified` is null where no check failed and no manifest is there to prove anything. Raises CheckpointError for a
    path that is none.
    """
    path = checkpoint_path(config, context)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    checks = []
    with context.timed("verify"):
        for check in context.track(check_checkpoint(path, config.format.name, config.format.module), "verifying"):
            checks.append(check)
    failed = any(check["status"] == "fail" for check in checks)
    proved = checks[0]["status"] == "pass"
    result = Result(
        task="verify",
        ckpt=str(path),
        checks=checks,
        timing=context.timing,
        versions=versions(),
        exit_code=int(failed or (config.strict and not proved)),
    )
    if checks[1]["status"] == "pass":
        checkpoint = open_checkpoint(path, config.format.name, config.format.module)
        check_family(config, checkpoint)
        result.step, result.family, result.format = checkpoint.step, checkpoint.family, checkpoint.format
        result.findings = list(checkpoint.findings)
    result.details = {"verified": False if failed else True if proved else None, "strict": config.strict}
    return result

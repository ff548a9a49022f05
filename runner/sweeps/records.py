"""The jobs of a sweep in the tracker: each is told as its result arrives, in a thread, while the next one measures.

Whichever process ran a job, it is recorded here, from what lies in its directory: all of them share one wandb process.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import yaml
from omegaconf import DictConfig, OmegaConf

from runner.errors import printable
from runner.run import LOG_NAME, identity, is_tracked, plain_config, tracker_of
from runner.sweeps.plan import good_result
from runner.tracking.base import Tracker

# In the directory of a job that the tracker knows.
MARK = ".tracked"
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Records:
    """What is still to be told of the sweep in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._waiting: SimpleQueue[Path | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sweep-records", daemon=True)

    def add(self, job: Path) -> None:
        """The job in the directory `job` has ended."""
        self._waiting.put(job)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Tell what is added within the block; all of it is told at its end, but after an error, what is in hand."""
        self._thread.start()
        try:
            yield
        except BaseException:
            self._stopped.set()
            raise
        finally:
            self._waiting.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            if not self._stopped.is_set() and not (job / MARK).exists():
                self._record(job)

    def _record(self, job: Path) -> None:
        """Whatever goes wrong is a warning: it costs no job."""
        warnings: list[str] = []
        try:
            if (result := good_result(job)) is None:
                return
            config = yaml.load((job / ".hydra" / "config.yaml").read_text(encoding="utf-8"), Loader=_LOADER)
            cfg = OmegaConf.create(config)
            assert isinstance(cfg, DictConfig), "Hydra wrote it"
            if not is_tracked(cfg):
                return
            tracker = tracker_of(cfg)
            if type(tracker) is Tracker:  # tracker=none
                return
            warnings = tracker.warnings
            tracker.start(identity(cfg, result, self._directory.name), plain_config(cfg))
            tracker.record(result)
            tracker.finish(int(result.get("passed") is False or result.get("verified") is False))
            (job / MARK).touch()
            if tracker.location:
                with (job / LOG_NAME).open("a", encoding="utf-8") as file:
                    file.write(f"W&B: {printable(tracker.location)}\n")
        except Exception as error:  # also of a library that is not ours
            warnings.append(f"W&B: {job.name} is not all there ({type(error).__name__}: {error})")
        for warning in warnings:
            print(f"runner: warning: {printable(warning)}", file=sys.stderr)

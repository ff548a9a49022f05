"""Which jobs a sweep has, how its directory tells what became of each, and how it goes on."""

import json
from pathlib import Path

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from runner.checkpoints.runs import find_run
from runner.errors import ConfigError
from runner.expand import expand, steps_of
from runner.files.atomic import write_json
from runner.installation import config_directory
from runner.overrides import parse
from runner.run import _unexpected, setup
from runner.sweeps.launchers import check_launcher, use_own_configs
from runner.sweeps.plan import PlannedJob, SweepPlan, good_result, read_plan, write_plan
from runner.sweeps.sacct import table
from runner.sweeps.sweeper import Sweep, run_jobs, write_reasons
from tests.conftest import MIXED, npt_tensors, write_npt


@pytest.fixture
def empty_run(tmp_path: Path) -> Path:
    """A run whose checkpoints are empty directories: enough for what only looks at names."""
    for step in (1000, 200, 3000, 500):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture
def training(checkpoint: Path, base: Path) -> Path:
    """A run of three checkpoints, the second of them damaged."""
    for step in (200, 300):
        tensors = npt_tensors(base, MIXED, seed=step)
        write_npt(checkpoint.parent / f"checkpoint-{step}", tensors, base=base, step=step)
    (checkpoint.parent / "checkpoint-200" / "npt_weights.pt").write_bytes(b"PK\x03\x04 nonsense")
    return checkpoint.parent


def sweep_directory() -> Path:
    (found,) = Path("sweeps").iterdir()
    return found


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        ("all", [200, 500, 1000, 3000]),
        ("1000,200", [200, 1000]),
        ("[3000,-1,500]", [500, 3000]),
        ("-1", [3000]),
        ("-1,-2", [1000, 3000]),
        ("range(500,1001,500)", [500, 1000]),
        ("every(1000)", [1000, 3000]),
        ("every(2000)", [3000]),
    ],
)
def test_steps(empty_run, value, steps):
    assert steps_of(value, find_run(empty_run)) == steps


@pytest.mark.parametrize("value", ["some", "every(0)", "every(x)", "range(1)x", "7", "range(200,900,100)"])
def test_steps_that_are_not_there(empty_run, value):
    with pytest.raises(ConfigError, match=r"200, 500, 1000, 3000|every"):
        steps_of(value, find_run(empty_run))


def expanded(*words: str) -> dict[str, str | None]:
    return dict(expand(parse(words), demo_run=lambda: Path("nowhere")).overrides)


def test_several_runs_are_written_out_each_with_its_own_steps(empty_run, tmp_path):
    (tmp_path / "other" / "checkpoint-700").mkdir(parents=True)
    given = expanded("-m", f"ckpt={empty_run},{tmp_path / 'other'}", "step=all", "tier=quick,full")
    names = [Path(part.strip("'")).relative_to(tmp_path) for part in given["ckpt"].split(",")]
    assert [str(name) for name in names] == [
        *(f"run/checkpoint-{step}" for step in (200, 500, 1000, 3000)),
        "other/checkpoint-700",
    ]
    assert "step" not in given
    assert expanded("-m", f"ckpt={empty_run},{tmp_path / 'other'}", "tier=quick,full") == given  # no step: all
    last = expanded("-m", f"ckpt={empty_run},{tmp_path / 'other'}", "step=-1")
    assert [Path(part.strip("'")).name for part in last["ckpt"].split(",")] == ["checkpoint-3000", "checkpoint-700"]


def test_the_names_of_jobs_tell_them_apart(run, training, base, tmp_path):
    write_npt(tmp_path / "a b=c" / "checkpoint-100", npt_tensors(base, MIXED), base=base)
    run("-m", f"ckpt={training},{tmp_path / 'a b=c'}", "step=100", "tier=quick", "seed=1,2")
    (directory,) = (path for path in Path("sweeps").iterdir() if (path / "sweep.json").exists())
    assert [job.directory for job in read_plan(directory).jobs] == [
        "0_run@100_1", "1_run@100_2", "2_a_b_c@100_1", "3_a_b_c@100_2",
    ]  # fmt: skip


def test_patterns_in_a_list(empty_run, tmp_path):
    (tmp_path / "other" / "checkpoint-700").mkdir(parents=True)
    given = expanded("-m", f"ckpt={empty_run}/checkpoint-*00,{tmp_path}/oth*/checkpoint-*,{empty_run}/checkpoint-200")
    names = [Path(part.strip("'")).name for part in given["ckpt"].split(",")]
    assert names == [f"checkpoint-{step}" for step in (200, 500, 1000, 3000, 700, 200)]
    with pytest.raises(ConfigError, match="as a pattern it matches nothing"):
        expanded("-m", f"ckpt={empty_run}/checkpoint-*,{tmp_path}/none*")


def test_the_demonstration_is_one_run_of_several(empty_run, tmp_path):
    (tmp_path / "demonstration" / "checkpoint-9").mkdir(parents=True)
    line = expand(parse(["-m", f"ckpt=demo,{empty_run}", "step=-1"]), demo_run=lambda: tmp_path / "demonstration")
    assert [Path(part.strip("'")).name for part in (line.get("ckpt") or "").split(",")] == [
        "checkpoint-9",
        "checkpoint-3000",
    ]


def test_a_directory_s_own_brackets_are_no_pattern(tmp_path):
    run = tmp_path / "lr=[1e-4], é"
    for step in (70, 8):
        (run / f"checkpoint-{step}").mkdir(parents=True)
    found = [str(run / "checkpoint-8"), str(run / "checkpoint-70")]
    spelled = ",".join(f"'{path}'" for path in found)
    assert expanded("-m", f"ckpt={run}/checkpoint-*")["ckpt"] == spelled
    assert expanded("-m", f"ckpt={spelled}")["ckpt"] == spelled


def test_all_steps_mean_each_file_of_a_step_that_has_two(tmp_path):
    names = ["best_state_step000300_val4.1.pt", "state_step000200.pt", "state_step000300.pt"]
    for name in names:
        (tmp_path / name).touch()
    given = expanded(f"ckpt={tmp_path}")
    assert sorted(Path(part.strip("'")).name for part in given["ckpt"].split(",")) == names
    assert "step" not in given
    with pytest.raises(ConfigError, match="several files of step 300"):
        expanded(f"ckpt={tmp_path}", "step=200,300")


def test_a_step_that_is_not_there_ends_a_sweep_before_it_starts(run, empty_run, tmp_path):
    for words, message in {
        (f"ckpt={empty_run}", "step=7"): "no step 7; its steps are 200, 500, 1000, 3000",
        (f"ckpt={empty_run}", "step=-9"): "no step -9",
        (f"ckpt={tmp_path / 'none'}", "step=all"): "none: no such file or directory",
    }.items():
        outcome = run("-m", *words)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert message in outcome.err
    assert not Path("sweeps").exists()


def test_every_task_goes_over_steps(empty_run):
    assert expanded("-m", "task=inspect", f"ckpt={empty_run}", "step=all")["step"] == "200,500,1000,3000"
    assert expanded("-m", f"ckpt={empty_run}", "step=-1")["step"] == "3000"
    assert expanded("task=inspect", f"ckpt={empty_run}")["ckpt"] == str(empty_run)


def test_the_plan_is_written_before_the_jobs_and_tells_what_became_of_each(run, training):
    outcome = run("-m", f"ckpt={training}", "step=all")
    assert outcome.code == 3
    directory = sweep_directory()
    plan = read_plan(directory)
    assert [job.number for job in plan.jobs] == [0, 1, 2]
    assert [sorted(set(job.overrides) - {f"ckpt='{training}'"}) for job in plan.jobs] == [
        [f"step={step}", "tracker=none"] for step in (100, 200, 300)
    ]
    assert plan.task == "diagnose"
    assert plan.launcher == "basic"
    assert (directory / "sweep.json").stat().st_mtime_ns < min(
        (directory / job.directory / "result.json").stat().st_mtime_ns for job in plan.jobs
    )
    assert [good_result(directory / job.directory) is not None for job in plan.jobs] == [True, False, True]
    assert f"-m resume={directory}" in outcome.err
    assert [line.split(":")[0].split()[0] for line in outcome.out.splitlines() if line.startswith("#")] == [
        "#1",
        "#2",
        "#3",
    ]


def test_resume_runs_what_has_no_good_result_in_the_same_directory(run, training, base):
    run("-m", f"ckpt={training}", "step=all")
    directory = sweep_directory()
    first = json.loads(next(directory.glob("0_*/result.json")).read_text())
    mended = training / "checkpoint-200"
    for file in mended.iterdir():
        file.unlink()
    mended.rmdir()
    write_npt(mended, npt_tensors(base, MIXED, seed=200), base=base, step=200)
    again = run("-m", f"resume={directory}")
    assert again.code == 0, again.err
    assert [line.split()[0] for line in again.out.splitlines() if line.startswith("#")] == ["#2"]
    assert sweep_directory() == directory
    results = [json.loads((directory / job.directory / "result.json").read_text()) for job in read_plan(directory).jobs]
    assert [result["step"] for result in results] == [100, 200, 300]
    assert results[0] == first
    nothing = run("-m", f"resume={directory}")
    assert nothing.code == 0
    assert "\n#" not in "\n" + nothing.out


def test_what_does_not_fit_a_sweep_that_goes_on(run, training, tmp_path):
    run("-m", f"ckpt={training}", "step=100,300")
    directory = sweep_directory()
    for words, message in {
        ("-m", f"resume={directory}", "seed=3"): "seed=3 does not fit: the sweep was started without it; leave it out",
        ("-m", f"resume={directory}", "step=100"): "step=100 does not fit: the sweep was started with step=100,300",
        (f"resume={directory}",): "add -m",
        ("-m", "resume=nowhere"): "no such directory",
        ("-m", f"resume={training}"): "holds no sweep.json",
        ("-m", f"resume={directory}", "hydra/launcher=jobli"): "did you mean 'joblib'?",
    }.items():
        outcome = run(*words)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert message in outcome.err
    for content in ("", "[]", "{}", '{"jobs": [{"number": 0, "directory": "../x", "overrides": []}]}'):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "sweep.json").write_text(content)
        outcome = run("-m", f"resume={tmp_path / 'bad'}")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err


def test_a_new_sweep_does_not_take_over_another_s_results(run, training):
    words = ("-m", f"ckpt={training}", "step=100", "hydra.sweep.dir=sweeps/mine")
    assert run(*words).code == 0
    before = (Path("sweeps/mine") / "sweep.json").read_bytes()
    outcome = run(*words, "dtype=bfloat16")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "sweeps/mine: holds a sweep; go on with it: resume=sweeps/mine" in outcome.err
    assert (Path("sweeps/mine") / "sweep.json").read_bytes() == before


@pytest.mark.parametrize("words", [["step=100,300", "output=o.json"], ["step=100,300", "seed=1,2", "output=a,b"]])
def test_jobs_do_not_overwrite_one_another_s_output(run, training, words):
    outcome = run("-m", f"ckpt={training}", *words)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "jobs would overwrite each other there; leave it out" in outcome.err
    assert not list(Path.cwd().glob("[oab]*.json"))


@pytest.mark.parametrize("words", [("-m", "--cfg", "job"), ("--cfg", "job", "--info", "all")])
def test_hydra_shows_one_thing_at_a_time(run, words):
    outcome = run(*words)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "do not go together" in outcome.err


def test_a_sweep_that_another_process_runs_is_left_alone(run, training):
    run("-m", f"ckpt={training}", "step=100")
    with FileLock(sweep_directory() / ".lock"):
        outcome = run("-m", f"resume={sweep_directory()}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "another runner is at work on this sweep" in outcome.err


class Fragile(Launcher):
    """Starts two jobs, the second of which takes it down; as often as there are jobs. `starts` says what it started."""

    def __init__(self, directory: Path, *, starts: int = 2) -> None:
        self.directory, self.starts, self.asked = directory, starts, []

    def setup(self, **options) -> None:
        raise AssertionError("it is set up already")

    def launch(self, job_overrides, initial_job_idx):
        names = [words[-1].partition("=")[2].strip("'") for words in job_overrides]
        self.asked.append(names)
        for name in names[: self.starts]:
            job = self.directory / name
            (job / ".hydra").mkdir(parents=True)
            (job / ".hydra" / "overrides.yaml").write_text("")
            if name == names[0]:
                write_json(job / "result.json", {"task": "x", "status": "ok", "metrics": {}})
        if len(names) > 1:
            raise RuntimeError("a worker died\nof something")
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=None)]


@pytest.mark.parametrize(
    ("starts", "asked", "lost"),
    [(2, [[0, 1, 2, 3, 4], [2, 3, 4], [4]], {1, 3}), (0, [[0, 1, 2, 3, 4]], {0, 1, 2, 3, 4})],
    ids=["breaks twice", "never starts"],
)
def test_a_launcher_that_breaks_starts_the_rest_again(tmp_path, capfd, starts, asked, lost):
    jobs = tuple(PlannedJob(number=i, directory=f"{i}_x", overrides=(f"step={i}",)) for i in range(5))
    plan = SweepPlan(task="x", command=("-m",), cwd=str(tmp_path), launcher="fragile", jobs=jobs)
    sweep = Sweep(line=parse(["-m"]), plan=plan, directory=tmp_path)
    inner = Fragile(tmp_path, starts=starts)
    run_jobs(sweep, inner, jobs)
    assert [[int(name[0]) for name in names] for names in inner.asked] == asked
    assert capfd.readouterr().out.splitlines() == [f"#{n + 1} {n}_x: done" for n in sorted({*range(5)} - lost)]
    write_reasons(sweep)
    assert {
        job.number for job in read_plan(tmp_path).jobs if job.reason == "RuntimeError: a worker died of something"
    } == lost


class UncompletedJobError(Exception):
    """What submitit raises in a job whose time is up, wherever that job is."""


def test_the_end_of_a_job_s_time_is_known_under_what_it_became(tmp_path):
    for error in (ImportError("x"), ValueError("y")):
        assert "internal error" in str(_unexpected(error, tmp_path))
        error.__context__ = UncompletedJobError("not requeued")
        outer = RuntimeError("z")
        outer.__cause__ = error
        assert "out of time" in str(_unexpected(outer, tmp_path))
    assert "out of time" in str(_unexpected(UncompletedJobError("not requeued"), tmp_path))


def test_a_plan_is_read_as_it_was_written(tmp_path):
    jobs = tuple(PlannedJob(number=i, directory=f"{i}_x@{i}", overrides=(f"step={i}", "ckpt='a, b'")) for i in range(3))
    plan = SweepPlan(task="diagnose", command=("-m", "ckpt=a, b"), cwd=str(tmp_path), launcher="basic", jobs=jobs)
    write_plan(plan.with_reasons({1: "killed"}), tmp_path)
    read = read_plan(tmp_path)
    assert [job.reason for job in read.jobs] == [None, "killed", None]
    assert read.with_reasons({}) == plan


@pytest.mark.parametrize(
    ("launcher", "value"),
    [
        ("joblib", "n_jobs=0"),
        ("joblib", "n_jobs=abc"),
        ("submitit_local", "jobs_at_once=0"),
        ("submitit_local", "timeout_min=0"),
    ],
)
def test_a_launcher_with_which_no_job_would_run(run, empty_run, launcher, value):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    outcome = run("-m", f"ckpt={empty_run}", "step=200", f"hydra/launcher={launcher}", f"hydra.launcher.{value}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert f"hydra.launcher.{value}: give a whole number of at least 1" in outcome.err


@pytest.mark.parametrize(
    "word", ["hydra.sweeper.params={step:500}", "+hydra.sweeper.params.step=500", "hydra/sweeper=foo"]
)
def test_another_sweeper_is_refused_before_anything_starts(run, empty_run, word):
    outcome = run("-m", f"ckpt={empty_run}", "step=200", word)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "give the values as key=a,b,c" in outcome.err


def test_a_key_that_the_launcher_does_not_have(run, empty_run):
    outcome = run("-m", f"ckpt={empty_run}", "step=200", "hydra.launcher.n_jobs=2")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "'hydra.launcher.n_jobs' of the launcher that is chosen; conf/hydra/launcher/ lists" in outcome.err


def test_a_job_without_a_checkpoint_has_a_name(run):
    outcome = run("-m", "task=compare", "sweep=nowhere")
    assert outcome.out.splitlines()[0] == "#1 0_compare: FAILED"


def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setattr("runner.sweeps.launchers.find_spec", lambda name: None)
    for name, extra in {"joblib": "launchers", "submitit_slurm": "launchers", "ray": "ray"}.items():
        with pytest.raises(ConfigError, match=rf"pip install -e '.\[{extra}\]'"):
            check_launcher(parse([f"hydra/launcher={name}"]), config_directory())


@pytest.mark.parametrize(
    "file", sorted((config_directory() / "hydra" / "launcher").glob("*.yaml")), ids=lambda f: f.stem
)
def test_each_launcher_composes_as_it_stands(file, recwarn):
    setup()
    use_own_configs(config_directory())
    with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
        cfg = compose("config", overrides=[f"hydra/launcher={file.stem}"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.startswith("hydra_plugins.")
    assert not [w for w in recwarn if "schema" in str(w.message)]


SCONTROL = """\
JobId=12 ArrayJobId=12 ArrayTaskId=1-3%2 JobName=runner JobState=PENDING Reason=None NodeList= Command=x
JobId=13 ArrayJobId=12 ArrayTaskId=0 JobName=runner JobState=RUNNING Reason=None NodeList=n1 BatchHost=n1
JobId=14 JobName=a=b JobState=TIMEOUT NodeList=n1
JobId=15 JobName=other JobState=RUNNING NodeList=n1
"""


def test_the_stand_in_for_sacct_answers_what_submitit_reads():
    slurm = pytest.importorskip("submitit.slurm.slurm", reason="submitit (extra launchers) is not installed")
    info = slurm.SlurmInfoWatcher().read_info(table(["12", "14", "99"], SCONTROL))
    assert {job: values["State"] for job, values in info.items()} == {
        "12_0": "RUNNING", "12_1": "PENDING", "12_2": "PENDING", "12_3": "PENDING", "14": "TIMEOUT", "99": "COMPLETED",
    }  # fmt: skip

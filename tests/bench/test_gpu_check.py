"""gpu-check fails when it must, and leaves what it measured whatever happens; without a GPU."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from ngd_fast.bench import hot

from ngd_fast.student.config import load_student_config, packaged_configs


@pytest.fixture
def gpu_check(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "bench"))
    spec = importlib.util.spec_from_file_location("gpu_check", repository / "bench" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_check(gpu_check, tmp_path, monkeypatch):
    """A check of the project in ``tmp_path``, which has no tests yet."""
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n")
    for folder in gpu_check.CORE:
        (tmp_path / "tests" / folder).mkdir(parents=True)

    def make(*arguments):
        return gpu_check.Check(gpu_check.parse([*arguments, "--out", str(tmp_path / "results"), "--minutes", "3"]))

    return make


@pytest.fixture
def check(make_check):
    return make_check()


def write_test(check, file, body, mark="@pytest.mark.gpu"):
    path = check.options.out.parent / "tests" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import pytest\n\n{mark}\ndef test_one():\n    {body}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(gpu_check, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "results")])
    assert gpu_check.main() == 2
    assert len(capsys.readouterr().out.splitlines()) == 1 and not (tmp_path / "results").exists()


# -- the call ----------------------------------------------------------------------------------------------------------


def test_parts_asked_for(gpu_check, capsys):
    assert tuple(gpu_check.parse([]).parts) == gpu_check.PARTS and gpu_check.parse([]).minutes == 8.5 * 8
    options = gpu_check.parse(["--parts", "build,step:B0", "--no-build"])
    assert options.parts == ["step:B0"] and options.minutes == 8.5
    with pytest.raises(SystemExit):
        gpu_check.parse(["--parts", "step"])
    assert "no such part: step" in capsys.readouterr().err


def test_the_calls_of_the_first_half_hour(gpu_check, repository):
    """They are calls that there are, cover every part and leave time for starting the machine."""
    text = (repository / "bench" / "FIRST_HALF_HOUR.md").read_text()
    calls = [gpu_check.parse(call.split()) for call in re.findall(r"^    python bench/gpu_check.py (.+)$", text, re.M)]
    assert [part for call in calls for part in call.parts] == list(gpu_check.PARTS)
    assert all(call.minutes < 9 for call in calls) and sum(call.minutes for call in calls) <= 30
    for file in re.findall(r"`((?:csrc|bench|tests)/[\w./]+)`", text):
        assert (repository / file).exists() or file == "bench/RESULTS.md"
    for switch in re.findall(r"NGD_FAST_CUDA_[A-Z]+", text):
        assert any(switch in file.read_text() for file in (repository / "csrc" / "cuda").iterdir())


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "ok", "passed"),
    [
        ("assert True", True, 1),
        ("assert 'two' == 'too'", False, 0),
        ("pytest.skip('why')", True, 0),
        ("import os; os._exit(3)", False, 0),
    ],
)
def test_one_part(check, body, ok, passed):
    write_test(check, "cuda/test_one.py", body)
    assert check.pytest("one", ["tests/cuda/test_one.py"]) is ok
    report = json.loads((check.folder / "report.json").read_text())
    assert report["tests"].keys() == {"one"} and report["tests"]["one"]["passed"] == passed
    assert report["tests"]["one"]["skipped because"] == ({"why": 1} if "skip" in body else {})
    if "two" in body:
        (failing,) = report["failing"]
        assert failing["test"] == "one: test_one" and len(failing["lines"]) <= 40
        assert any("assert 'two' == 'too'" in line for line in failing["lines"])
    assert [row["part"] for row in check.all_rows()] == ["tests"]


def test_all_parts(check, gpu_check):
    for folder in gpu_check.CORE:
        write_test(check, f"{folder}/test_one.py", "assert True")
    write_test(check, "objective/test_parity.py", "assert True", mark="")
    write_test(check, "student/test_other.py", "assert True")
    assert check.tests()
    assert {title for title, part in check.report["tests"].items() if part["passed"] == 1} == {
        *(f"tests/{folder}/test_one.py" for folder in gpu_check.CORE),
        "tests/student/test_other.py",
        "parity of the C++ objective",
    }


def test_a_core_folder_whose_tests_are_all_skipped_fails(check):
    write_test(check, "objective/test_one.py", "assert True")
    write_test(check, "kernels/test_one.py", "assert True")
    write_test(check, "cuda/test_one.py", "pytest.skip('no backend')")
    assert not check.tests()
    assert check.report["problems"] == ["tests/cuda: none of its GPU tests ran"]


def test_each_backend_is_a_part_and_the_sanitizer_is_asked_for(check):
    write_test(check, "objective/test_fused.py", "assert True", mark="BACKENDS = []")
    write_test(check, "cuda/test_one.py", "assert True")
    assert {name: part[1:] for name, part in check.test_parts().items()} == {
        "tests/objective/test_fused.py triton": ["-m", "gpu", "-k", "triton and not sanitizer"],
        "tests/objective/test_fused.py not triton": ["-m", "gpu", "-k", "not triton and not sanitizer"],
        "tests/cuda/test_one.py": ["-m", "gpu", "-k", "not sanitizer"],
        "parity of the C++ objective": ["-m", "not gpu", "-k", "not sanitizer"],
    }
    check.options.sanitize = True
    assert check.test_parts()["tests/cuda/test_one.py"] == ["tests/cuda/test_one.py", "-m", "gpu"]


def test_parts_to_share_out_are_there(check, gpu_check, monkeypatch, repository):
    monkeypatch.setattr(gpu_check, "ROOT", repository)
    assert set(gpu_check.LONG) <= set(check.test_parts())


# -- processes ---------------------------------------------------------------------------------------------------------


def wait_until_gone(child):
    """Until a process has ended, or has been killed and may not know it yet."""
    begin = time.monotonic()
    stat = Path("/proc") / str(child) / "stat"
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() - begin < 60
        time.sleep(0.02)


def first_line(log):
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.02)
    return log.read_text().strip()


def test_a_part_that_hangs_ends_with_all_that_it_started(check):
    begin = time.monotonic()
    process = check.start("hangs", ["sh", "-c", "sleep 61 & echo $!; sleep 61"])
    child = first_line(process.log)
    assert check.finish("hangs", process, limit=0.1) is None
    wait_until_gone(child)
    assert time.monotonic() - begin < 50
    assert check.report["problems"][0].startswith("hangs: ended after 0 s")


def test_what_a_part_left_behind_ends_with_it(check):
    process = check.start("leaves", ["sh", "-c", "sleep 61 & echo $!"])
    assert check.finish("leaves", process, limit=30) == 0
    wait_until_gone(first_line(process.log))


def test_nothing_outlives_a_check_that_is_killed(tmp_path, repository):
    script = (
        "import os, sys, time; from pathlib import Path; from _processes import Process\n"
        "log, command = Path(sys.argv[1]), ['sh', '-c', 'sleep 61 & echo $!; sleep 61']\n"
        "Process(command, log.parent, log, dict(os.environ)); time.sleep(61)"
    )
    log = tmp_path / "log"
    killed = subprocess.Popen([sys.executable, "-c", script, str(log)], cwd=repository / "bench")
    child = first_line(log)
    killed.kill()
    killed.wait()
    wait_until_gone(child)


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [False, True])
def test_jobs_are_called_as_they_are_written(gpu_check, tiny):
    """Arguments and names of implementations that no machine without a GPU would ever try."""
    device = torch.device("cpu" if tiny else "cuda")
    for part in gpu_check.MEASURED:
        jobs = list(gpu_check.jobs(part, tiny=tiny))
        assert jobs and len({gpu_check.plain(job.title) for job in jobs}) == len(jobs)
        assert tiny or "ngd_fast" in jobs[0].title or part != "objective" or jobs[0].title == "objective cuda"
        for job in jobs:
            for name, arguments in job.calls:
                module = importlib.import_module(f"ngd_fast.bench.{name}")
                inspect.signature(module.measure).bind(device=device, **arguments)
                assert name != "hot" or arguments["kernel"] in hot.KERNELS
                if name == "step":
                    assert set(arguments["implementations"]) <= set(module.names(device))


def test_rows_come_one_by_one_and_an_error_ends_its_call_alone(make_check, gpu_check, monkeypatch, repository):
    check = make_check("--rehearse")
    monkeypatch.setattr(gpu_check, "ROOT", repository)
    call = {"B": 8, "dtype_name": "float32", "names": ["eager"], "whats": ["both"], "seconds": 0.01}
    calls = [("objective", call), ("objective", {**call, "names": ["no such"]}), ("objective", call)]
    job = gpu_check.Job("three", calls, {"SWITCH": "8", "inductor.combo_kernels": "1"})
    monkeypatch.setattr(gpu_check, "jobs", lambda part, tiny: [job, gpu_check.Job("stem", [], under=("no-such",))])
    check.measure("objective")
    copy, first, broken, last = check.all_rows()
    assert copy["what"] == "copy" and copy["GB/s"] > 0
    assert first["us"] > 0 and last["us"] > 0 and first["switches"] == {"SWITCH": "8", "inductor.combo_kernels": "1"}
    assert first["share of copy"] == pytest.approx(first["GB/s"] / copy["GB/s"], abs=1e-3)
    assert broken["error"] and broken["names"] == ["no such"]
    assert check.report["problems"] == ["three: failed (exit status 1)"]
    assert check.report["left_out"] == ["stem (not installed: no-such)"]
    lines = gpu_check.table({**check.report, "rows": check.all_rows()})
    assert sum("eager" in line and "SWITCH=8" in line for line in lines) == 2
    # A later call adds to what is there, and knows the rate of a copy.
    monkeypatch.setattr(gpu_check, "jobs", lambda part, tiny: [])
    again = make_check("--rehearse")
    again.measure("stem")
    assert len(again.all_rows()) == 4 and again.report["problems"] == check.report["problems"]


def test_what_cannot_run_is_named(check, gpu_check, monkeypatch):
    monkeypatch.setitem(gpu_check.MORE, "student", ("no_such_package",))
    write_test(check, "student/test_one.py", "assert True")
    assert list(check.test_parts()) == ["parity of the C++ objective"]
    assert check.report["left_out"] == ["tests/student/test_one.py (not installed: no_such_package)"]
    assert gpu_check.absent(["torch", "no_such_package", "no_such.package"]) == ["no_such_package", "no_such.package"]
    assert "nvidia.dali" in gpu_check.Job("feed dali", []).needs and gpu_check.Job("objective cuda", []).needs == ()


def test_no_time_left_for_a_job(check, gpu_check, monkeypatch):
    check.options.minutes = 0.1
    check.rows.write_text('{"what": "copy", "GB/s": 1.0}\n')
    check.measure("stem")
    titles = [job.title for job in gpu_check.jobs("stem") if not job.under]
    assert [f"{title}: no time left" for title in titles] == [
        text for text in check.report["left_out"] if text.endswith("left")
    ]


def test_ncu_table(gpu_check):
    text = (
        "== Profiling\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","rows_mma(Args)","gpu__time_duration.sum","us","131.2"\n'
        '"0","rows_mma(Args)","launch__registers_per_thread","register/thread","168"\n'
    )
    assert gpu_check.ncu_row(text) == {
        "gpu__time_duration.sum [us]": "131.2",
        "launch__registers_per_thread [register/thread]": "168",
    }
    assert gpu_check.ncu_row("==ERROR== ERR_NVGPUCTRPERM\n") == {"error": "==ERROR== ERR_NVGPUCTRPERM"}


def test_a_build_is_used_again_until_its_sources_change(check, gpu_check, monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    for name in ("setup.py", "pyproject.toml", "csrc/one.cu"):
        (tmp_path / name).touch()
    commands = []
    monkeypatch.setattr(check, "start", lambda title, command, **environment: commands.append(environment))
    monkeypatch.setattr(check, "finish", lambda *_, **__: 0)
    monkeypatch.setattr(gpu_check, "absent", lambda names: [])
    for _ in range(2):
        assert check.build("9.0")
    assert [environment["TORCH_CUDA_ARCH_LIST"] for environment in commands] == ["9.0"]
    (tmp_path / "csrc" / "one.cu").write_text("//")
    assert check.build("9.0") and len(commands) == 2
    assert check.build("8.0") and len(commands) == 3


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_main(gpu_check, monkeypatch, tmp_path):
    """(what stands for everything) -> main()'s exit status and the report."""
    import _timing

    def run(everything):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(_timing, "machine", lambda device: {"gpu": "none"})
        monkeypatch.setattr(gpu_check.Check, "everything", everything)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "results")])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = gpu_check.main()
        except ZeroDivisionError:
            status = None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return status, json.loads((tmp_path / "results" / "report.json").read_text())

    return run


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_exit_status(run_main, ok, status):
    assert run_main(lambda check, capability: ok)[0] == status
    assert run_main(lambda check, capability: ok)[1]["ok"] is ok


def test_the_report_survives_an_error(run_main):
    status, report = run_main(lambda check, capability: 1 // 0)
    assert status is None and report["ok"] is False and report["machine"] == {"gpu": "none"}


def test_sigterm_ends_what_runs_and_leaves_the_report(run_main, tmp_path):
    def everything(check, capability):
        process = check.start("long", ["sleep", "61"])
        os.kill(os.getpid(), signal.SIGTERM)
        return check.finish("long", process, limit=60) == 0

    begin = time.monotonic()
    status, report = run_main(everything)
    assert status == 1 and report["ok"] is False and report["finished"] is False
    assert time.monotonic() - begin < 50
    with tarfile.open(tmp_path / "results" / "logs.tar.gz") as tar:
        assert "logs/long.log" in tar.getnames()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_rehearsed_in_a_copy_without_our_environment(gpu_check, repository, tmp_path):
    """Each part a call of its own, as on a lent machine: a copy of the sources, and a Python that has PyTorch and what
    else is installed here, but not this package."""
    if not (repository / ".git").exists():
        pytest.skip("no checkout: only git knows what belongs to the sources")
    tree, out = tmp_path / "tree", tmp_path / "out"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (repository / name).exists() and not name.startswith("tests/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, tree / name)
    for folder in ("objective", "kernels", "cuda"):  # in place of the tests: one that runs
        (tree / "tests" / folder).mkdir(parents=True)
        (tree / "tests" / folder / "test_one.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_one(): pass\n")
    (tree / "tests" / "objective" / "test_parity.py").write_text("def test_one(): pass\n")
    # In place of the build, which the test of the wheel makes: what it made here, and the package's folders in it.
    for file in [*(repository / "ngd_fast").glob("*.so"), repository / "ngd_fast" / "_build_info.py"]:
        shutil.copy(file, tree / "ngd_fast")
    for folder in ("bench", "kernels", "configs"):
        (tree / "ngd_fast" / folder).symlink_to(tree / folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    # As names of folders alone: what an editable installation leaves there does not count.
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site / "packages.pth").write_text("\n".join([str(tree), *packages]) + "\n")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    parts = [part for part in gpu_check.PARTS if part != "build"]
    script = [tmp_path / "env" / "bin" / "python", "bench/gpu_check.py", "--rehearse", "--minutes", "60", "--out", out]
    for part in parts:
        command = [*script, "--parts", part]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["problems"] == report["failing"] == report["left_out"] == [] and len(report["commands"]) == len(parts)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    assert {row["part"] for row in rows} == {"device", *parts}
    assert sum("kernel" in row for row in rows if row["part"] == "step:B0") == 40
    files = sorted(file.name for file in out.iterdir())
    assert files == ["logs.tar.gz", "report.json", "rows.jsonl", "table.md"]


def test_stand_in_for_pydantic_gives_the_same_configurations(repository):
    script = (
        "import json, pydantic; from ngd_fast.student.config import *\n"
        "assert 'standins' in pydantic.__file__\n"
        "configs = {n: load_student_config(n, ['train.clip_grad=0.5']) for n in packaged_configs()}\n"
        "print(json.dumps({n: c.model_dump(mode='json', exclude=('name',)) for n, c in configs.items()}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "bench" / "standins")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, config in json.loads(done.stdout).items():
        real = load_student_config(name, ["train.clip_grad=0.5"])
        assert config == real.model_dump(mode="json", exclude=("name",))
    assert set(json.loads(done.stdout)) == set(packaged_configs())

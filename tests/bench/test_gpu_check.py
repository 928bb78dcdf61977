"""gpu-check fails when it must, and leaves its report whatever happens; without a GPU."""

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ngd_fast.student.config import load_student_config, packaged_configs


@pytest.fixture
def gpu_check(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "bench"))
    spec = importlib.util.spec_from_file_location("gpu_check", repository / "bench" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(gpu_check, tmp_path, monkeypatch):
    """A check of the project in ``tmp_path``, which has no tests yet."""

    class Options:
        out = tmp_path / "report.json"
        minutes = 2.0
        sanitize = no_bench = False

    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n")
    for folder in gpu_check.CORE:
        (tmp_path / "tests" / folder).mkdir(parents=True)
    return gpu_check.Check(Options)


def write_test(check, file, body, mark="@pytest.mark.gpu"):
    path = check.options.out.parent / "tests" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import pytest\n\n{mark}\ndef test_one():\n    {body}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(gpu_check, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "report.json")])
    assert gpu_check.main() == 2
    assert len(capsys.readouterr().out.splitlines()) == 1 and not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("body", "ok", "passed"),
    [
        ("assert True", True, 1),
        ("assert False", False, 0),
        ("pytest.skip('why')", True, 0),
        ("import os; os._exit(3)", False, 0),
    ],
)
def test_one_part(check, body, ok, passed):
    write_test(check, "cuda/test_one.py", body)
    assert check.pytest("one", ["tests/cuda/test_one.py"]) is ok
    assert check.report["tests"]["one"]["passed"] == passed
    assert json.loads(check.options.out.read_text())["tests"].keys() == {"one"}


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
        "parity of the C++ objective": ["-m", "not gpu"],
    }
    check.options.sanitize = True
    assert check.test_parts()["tests/cuda/test_one.py"] == ["tests/cuda/test_one.py", "-m", "gpu"]


def test_benches_are_called_as_they_are_written(gpu_check):
    """Arguments and names of implementations that no machine without a GPU would ever try."""
    device = torch.device("cuda")
    for bench in gpu_check.benches():
        module = importlib.import_module(f"ngd_fast.bench.{bench.module}")
        inspect.signature(module.measure).bind(device=device, **bench.arguments)
        if bench.module == "step":
            assert set(bench.arguments["implementations"]) <= set(module.names(device))


def test_parts_to_share_out_are_there(check, gpu_check, monkeypatch, repository):
    monkeypatch.setattr(gpu_check, "ROOT", repository)
    assert set(gpu_check.LONG) <= set(check.test_parts())


def test_what_cannot_run_is_named(check, gpu_check, monkeypatch):
    monkeypatch.setitem(gpu_check.MORE, "student", ("no_such_package",))
    monkeypatch.setattr(gpu_check, "benches", lambda: [gpu_check.Bench("step", "B0", {})])
    write_test(check, "student/test_one.py", "assert True")
    assert list(check.test_parts()) == ["parity of the C++ objective"]
    assert check.start_benches() == []
    assert check.report["left_out"][:2] == [
        "tests/student/test_one.py (not installed: no_such_package)",
        "bench step B0 (not installed: no_such_package)",
    ]
    assert gpu_check.absent(["torch", "no_such_package", "no_such.package"]) == ["no_such_package", "no_such.package"]


def test_a_part_that_hangs_ends_with_all_that_it_started(check):
    begin = time.monotonic()
    process = check.start("hangs", ["sh", "-c", "sleep 61 & echo $!; sleep 61"])
    while not process.log.read_text():
        time.sleep(0.02)
    assert check.finish("hangs", process, limit=0.1) is None
    assert time.monotonic() - begin < 20
    child = Path("/proc") / process.log.read_text().strip() / "stat"
    while child.exists() and child.read_text().split()[2] != "Z":  # it has been killed, but may not know it yet
        assert time.monotonic() - begin < 20
        time.sleep(0.02)
    assert check.report["problems"][0].startswith("hangs: ended after 0 s")


def test_benches_wait_for_their_turns(check, gpu_check, monkeypatch, repository):
    monkeypatch.setattr(gpu_check, "ROOT", repository)
    check.device = "cpu"
    tiny = {"B": 8, "dtype_name": "float32", "names": ["eager"], "whats": ["both"], "seconds": 0.01}
    benches = [
        gpu_check.Bench("objective", "early", tiny),
        gpu_check.Bench("objective", "broken", {**tiny, "names": ["no such"]}),
        gpu_check.Bench("objective", "late", tiny, early=False),
    ]
    monkeypatch.setattr(gpu_check, "benches", lambda: benches)
    chosen = check.start_benches()
    deadline = time.monotonic() + 60
    while not all(check._is_settled(bench) for bench in chosen[:2]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert chosen[0].process.popen.poll() is None and not check._result(chosen[0]).exists()
    assert chosen[2].process is None
    check.run_benches(chosen)
    rows = check.report["benches"]["objective"]
    assert [row["what"] for row in rows] == ["both", "both"]
    assert check.report["problems"] == ["bench objective broken: failed (exit status 1)"]
    assert sum("eager float32" in line for line in gpu_check.table(check.report)) == 2


def test_no_time_left_for_a_bench(check, gpu_check, monkeypatch):
    check.options.minutes = 0.1
    check.run_benches([gpu_check.Bench("objective", "late", {}, early=False)])
    assert check.report["left_out"] == ["bench objective late: no time left"]


@pytest.fixture
def run_main(gpu_check, monkeypatch, tmp_path):
    """(what stands for everything) -> main()'s exit status and the report."""
    import _timing

    def run(everything):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(_timing, "machine", lambda device: {"gpu": "none"})
        monkeypatch.setattr(gpu_check.Check, "everything", everything)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "report.json")])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = gpu_check.main()
        except ZeroDivisionError:
            status = None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return status, json.loads((tmp_path / "report.json").read_text())

    return run


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_exit_status(run_main, ok, status):
    assert run_main(lambda check, capability: ok) == (status, {**run_main(lambda *_: ok)[1], "ok": ok})


def test_the_report_survives_an_error(run_main):
    status, report = run_main(lambda check, capability: 1 // 0)
    assert status is None and report["ok"] is False and report["machine"] == {"gpu": "none"}


def test_sigterm_ends_what_runs_and_leaves_the_report(run_main):
    def everything(check, capability):
        process = check.start("long", ["sleep", "61"])
        os.kill(os.getpid(), signal.SIGTERM)
        return check.finish("long", process, limit=60) == 0

    begin = time.monotonic()
    status, report = run_main(everything)
    assert status == 1 and report["ok"] is False and report["finished"] is False
    assert time.monotonic() - begin < 30


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

"""The command line as a whole: quick help, exit codes, one line for a user's fault."""

import subprocess
import sys
import threading

import pytest
import torch

from ngd_fast import cli


def test_help_names_every_command_and_imports_nothing_heavy():
    script = (
        "import sys\nfrom ngd_fast.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'pandas', 'sklearn', 'mne'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in cli._COMMANDS:
        assert f"  {name} " in result.stdout


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert "Usage: ngd-fast " + name in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["verify", "no/such/run"],
        ["prototypes", "verify", "no/such/bank.npz"],
        ["data", "check", "no/such/faces.npz"],
        ["eeg", "dreamer", "no/such/DREAMER.mat", "--out", "unused"],
    ],
)
def test_a_fault_of_the_user_is_exit_code_2_and_short(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error and len(error.splitlines()) <= 4 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (PermissionError(13, "Permission denied", "a.csv"), "error: a.csv: Permission denied"),
        (OSError(28, "No space left on device"), "error: no space left on the disk (while writing)"),
        (MemoryError("Unable to allocate 7 TiB"), "error: out of memory (Unable to allocate 7 TiB); a smaller batch"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "error: out of memory (CUDA out of memory.); a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory (DefaultCPUAllocator:"),
        (RuntimeError("could not create a primitive"), "error: out of memory (could not create a primitive)"),
        (ImportError("a.so: failed to map segment from shared object"), "error: out of memory (a.so: failed to map"),
    ],
)
def test_what_the_machine_refuses_is_one_line(fault, line, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(cli.group, "main", raising(fault))
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), OSError("nobody knows")])
def test_a_fault_of_ours_keeps_its_traceback(bug, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(cli.group, "main", raising(bug))
    with pytest.raises(type(bug)):
        cli.main([])


def raising(error):
    def call(**_):
        raise error

    return call


@pytest.mark.parametrize(("error", "reported"), [(OSError(28, "No space left on device"), False), (KeyError(1), True)])
def test_a_thread_that_the_disk_stopped_leaves_the_report_to_the_main_thread(error, reported, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", cli._report_thread)
    thread = threading.Thread(target=raising(error))
    thread.start()
    thread.join()
    assert ("Traceback" in capsys.readouterr().err) == reported

"""The command line as a whole: quick help, exit codes, one line for a user's fault."""

import subprocess
import sys

import pytest

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

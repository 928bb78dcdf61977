"""The command line. Each group of commands lives in a file of its own and is imported only when it is called."""

import errno
import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Collection

import click
from click.core import ParameterSource

from ngd_fast._version import __version__
from ngd_fast.errors import UserError, first_line, lacks_memory

_COMMANDS = {
    "demo": ("demo", "Run the whole of NeuroGaze-Distill on made-up data, from recordings to verified tables."),
    "doctor": ("doctor", "Print versions, devices and backends; for each backend that is missing, why."),
    "data": ("data", "Turn face datasets into NPZ files, manifests and class maps."),
    "eeg": ("eeg", "Turn EEG recordings or tables of band power into topomaps."),
    "teacher": ("teacher", "Train the teacher that regresses valence and arousal from topomaps."),
    "prototypes": ("prototypes", "Build, show and verify a bank of prototypes."),
    "student": ("student", "Train a student (or the vision teacher) on faces."),
    "ablation": ("ablation", "Train B0 to B3 over several seeds and print one table."),
    "sweep": ("sweep", "Run one of the paper's sweeps and print one table."),
    "evaluate": ("evaluate", "Evaluate a student: 8-way and present-only, with confidence intervals."),
    "report": ("report", "Gather figures and tables of runs into one HTML page."),
    "verify": ("verify", "Check a run's checksums and re-derive its tables."),
    "export": ("export", "Export a student to ONNX or torch.export."),
    "predict": ("predict", "Classify images, folders or CSV lists of faces."),
    "predict-video": ("predict_video", "Classify the faces in a video, linked and smoothed over its frames."),
    "flows": ("flows", "Study coupled flows: particles on a manifold, and weights that follow them."),
    "bench": ("bench", "Measure this machine: objective, feeds, training step."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx):
        return list(_COMMANDS)

    def get_command(self, ctx, name):
        if name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[name]
        return importlib.import_module(f"ngd_fast.cli.{module}").command

    def format_commands(self, ctx, formatter):
        # Help lists every command without importing one.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ngd-fast")
def group():
    """NeuroGaze-Distill: EEG prototypes, a fused distillation objective, facial-expression students."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 output cut off, 2 a fault the user can mend, 130 interrupted."""
    threading.excepthook = _report_thread
    _quiet_libraries()
    try:
        status = group.main(args=args, prog_name="ngd-fast", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except UserError as error:
        click.echo(f"error: {_plain(str(error))}", err=True)
        status = 2
    except BrokenPipeError:
        # The reader of our output went away (ngd-fast ... | head); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (OSError, MemoryError, RuntimeError, ImportError, SystemError) as error:
        fault = _fault_of(error)
        if not fault:
            raise
        click.echo(f"error: {fault}", err=True)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def refuse(ctx: click.Context, names: Collection[str], why: str) -> None:
    """Raise UserError where one of the options ``names`` was typed, which would have no effect."""
    for option in ctx.command.params:
        if option.name in names and ctx.get_parameter_source(option.name) == ParameterSource.COMMANDLINE:
            raise UserError(f"{option.opts[0]}: {why}")


def _quiet_libraries() -> None:
    """What this package has to say it says itself; of the libraries' warnings only those about a GPU's driver help."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message=".*(CUDA|driver)")
        logging.lastResort.setLevel(logging.ERROR)


def _plain(text: str) -> str:
    """``text`` in at most 2,000 characters, without those that steer a terminal: it may quote a hostile file."""
    text = text if len(text) <= 2000 else f"{text[:2000]} ..."
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _fault_of(error: Exception) -> str:
    """What the machine has refused, in one line; empty for an error that is no fault of machine or user."""
    if lacks_memory(error):
        return f"out of memory ({first_line(error)}); a smaller batch needs less"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left on the disk ({error.filename or 'while writing'})"
        return f"{error.filename}: {error.strerror}" if error.filename is not None else ""
    return ""


def _report_thread(arguments) -> None:
    # What stops TensorBoard's writer (a full disk) reaches the main thread too, which reports it.
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)

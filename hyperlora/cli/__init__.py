"""The command line: one file per command. Heavy imports happen inside the commands, so that `--help` is instant."""

import logging
import os
import sys
from collections.abc import Callable

import typer

import hyperlora
from hyperlora.cli import options
from hyperlora.cli.ask import ask
from hyperlora.cli.compare import compare
from hyperlora.cli.compose import compose
from hyperlora.cli.evaluate import evaluate
from hyperlora.cli.generate import generate
from hyperlora.cli.human import rate
from hyperlora.cli.inspect import inspect
from hyperlora.cli.judge import judge
from hyperlora.cli.listing import methods, tasks
from hyperlora.cli.plan import plan
from hyperlora.cli.teach import teach
from hyperlora.cli.train import train
from hyperlora.errors import HyperloraError, lost_peer, out_of_memory

_INTERRUPTED = "interrupted; what was finished is kept"
_LOST = "another process of this run ended or cannot be reached; see its error, and run the same command to go on"

app = typer.Typer(
    name="hyperlora",
    help="Turn documents into LoRA patches for a frozen language model.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for command in (generate, ask, inspect, compose, train, plan, teach, evaluate, compare, methods, tasks, judge):
    app.command()(command)
app.add_typer(rate, name="rate")


def _version(show: bool) -> None:
    if show:
        print(f"hyperlora {hyperlora.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    local_rank: options.LocalRank = None,  # deepspeed --module hyperlora COMMAND puts it here
) -> None:
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_NO_TQDM", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def main() -> None:
    """Entry point of `hyperlora`."""
    try:
        guarded(app)
    except SystemExit as end:
        if "RANK" in os.environ:  # one of several processes
            from hyperlora import ranks

            ranks.end(end.code)
        raise


def guarded(command: Callable[[], object]) -> None:
    """Run a command line: expected failures become one line on stderr and an exit code."""
    try:
        command()
    except HyperloraError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail(_INTERRUPTED, 130)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C, without a word
            fail(_INTERRUPTED, 130)
        raise
    except OSError as error:
        fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            fail("out of memory; free some, or take a smaller base, --dtype bfloat16, fewer or shorter documents", 1)
        if lost_peer(error):
            fail(_LOST, 1)
        raise


def fail(message: str, code: int) -> None:
    print(f"hyperlora: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)

"""What every job shares: the console, JSON output, and errors as one paragraph with an exit code.

Exit codes: 0 done · 1 our defect · 2 bad input · 3 training stopped early · 130, 143 interrupted (SIGINT, SIGTERM).
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

INTERRUPTED = 128  # plus the signal's number, as shells have it
DEBUG_FLAG, DEBUG_VARIABLE = "--debug", "METAPIPE_DEBUG"

out = Console()
err = Console(stderr=True)

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the file, e.g. training.num_workers=2. Repeatable.",
    ),
]


Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: HOST:PORT of its head, or auto. Default: RAY_ADDRESS, else one of its own."),
]


def use_cluster(address: str | None) -> None:
    """Have Ray join the cluster at an address, as RAY_ADDRESS does. Raises ConfigError: a kind that Ray Train lacks."""
    if address is None:
        return
    if "://" in address:
        from pipeline.errors import ConfigError

        raise ConfigError(
            f"--address {address}: give HOST:PORT of the cluster's head (port 6379), from one of its machines. From "
            "outside, submit the command: metapipe submit --address http://HEAD:8265 train …"
        )
    os.environ["RAY_ADDRESS"] = address


def harmless(text: str) -> str:
    """With escapes such as \\x1b for what would steer a terminal: a data set's texts and names are of other people.

    Those are control characters but for line ends and tabs, other line ends, and marks that turn the direction of text.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def say(line: str) -> None:
    """A line about what happens, beside the results."""
    err.print(harmless(line), markup=False, highlight=False, soft_wrap=True)


def new_app(**settings: Any) -> typer.Typer:
    epilog = f"{DEBUG_FLAG} anywhere shows the whole traceback of an error."
    return typer.Typer(
        epilog=epilog,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        **settings,
    )


def single_command(function: Callable[..., None], **settings: Any) -> typer.Typer:
    """An app of one command, for `python -m jobs.NAME`."""
    app = new_app()
    app.command(**settings)(function)
    return app


def run(app: typer.Typer) -> None:
    """Run an app; a UserError becomes one paragraph on standard error and its exit code."""
    debug = DEBUG_FLAG in sys.argv or bool(os.environ.get(DEBUG_VARIABLE))
    sys.argv = [argument for argument in sys.argv if argument != DEBUG_FLAG]
    if not debug:  # the libraries' notes would tear the display, and their advice is for other readers
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").propagate = False
    from pipeline.credentials import redacted
    from pipeline.errors import Interrupted, UserError

    def interrupt(number: int, _: object) -> None:
        raise Interrupted(number)  # Typer would swallow a KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, interrupt) for number in signals]
    try:
        app()
    except Interrupted as interruption:
        err.print("Interrupted. An unfinished run goes on from its last checkpoint when the same command is run again.")
        sys.exit(INTERRUPTED + interruption.signal_number)
    except Exception as error:
        if debug:
            err.print(redacted(traceback.format_exc()), markup=False, highlight=False, soft_wrap=True, end="")
            sys.exit(error.exit_code if isinstance(error, UserError) else 1)
        if isinstance(error, UserError):
            _print_error(str(error))
            sys.exit(error.exit_code)
        _print_error(f"{type(error).__name__}: {error}. This looks like a defect; {DEBUG_FLAG} shows where.")
        sys.exit(1)
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


def _print_error(message: str) -> None:
    from pipeline.credentials import redacted

    err.print("[bold red]error:[/] ", end="")
    err.print(harmless(redacted(message)), markup=False, highlight=False, soft_wrap=True)


def emit(result: dict[str, Any], *, as_json: bool, show: Callable[[], None]) -> None:
    """The result: as JSON for machines, or shown for people."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=1))
    else:
        show()


def percent(mean: float, half_width: float, score_name: str) -> str:
    """`95.31 ± 0.24 %` for accuracies, the plain number for the others."""
    if score_name == "accuracy":
        return f"{100 * mean:.2f} ± {100 * half_width:.2f} %"
    return f"{mean:.4f} ± {half_width:.4f}"

"""The command line: python -m sycoca caption | embed | retrieve | locate | overlay | doctor.

Exit codes: 0 done, 1 nothing could be used or a check failed, 2 wrong arguments, 130 interrupted.
"""

import argparse
import importlib
import os
import sys
import textwrap
import typing

from sycoca.commands.inputs import UserError
from sycoca.config import ConfigError, nearest

COMMANDS = ("caption", "embed", "retrieve", "locate", "overlay", "doctor")


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line that names the nearest right option."""

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            options = [option for parser in self._all() for option in parser._option_string_actions]
            message = f"{unknown}: unknown option{nearest(unknown, options)}"
        elif "invalid choice: " in message:
            chosen = message.partition("invalid choice: ")[2].split("'")[1]
            message = f"{chosen}: none of {', '.join(COMMANDS)}{nearest(chosen, COMMANDS)}"
        raise UserError(message.removeprefix("argument "))

    def _all(self) -> list[argparse.ArgumentParser]:
        nested = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return [self, *(parser for action in nested for parser in action.choices.values())]


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    form = argparse.RawDescriptionHelpFormatter
    top = _Parser(
        prog="python -m sycoca",
        allow_abbrev=False,
        formatter_class=form,
        description="Captions, embeddings, retrieval and pictures of what a model attends to.",
        epilog="example:\n  python -m sycoca caption photos/ --model runs/tiny",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"sycoca.commands.{name}")
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=textwrap.fill(" ".join(module.__doc__.split()), 80),
            epilog=module.EXAMPLES,
            allow_abbrev=False,
            formatter_class=form,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        # A bare call asks what there is.
        args = parser().parse_args(arguments or ["--help"])
        if args.command != "doctor":
            _require_our_kernels()
        code = args.run(args)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough; what is buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        # A full disk, a folder that refuses: nothing that a traceback would explain better.
        told = f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error)
        print(f"error: {told}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        return 130


def _require_our_kernels() -> None:
    from sycoca.commands.doctor import shadowed

    if line := shadowed():
        raise UserError(line)


def entry() -> typing.NoReturn:
    """The program: leaves at once after an interrupt, however many threads still decode."""
    code = main()
    if code == 130:
        sys.stderr.flush()
        os._exit(130)
    sys.exit(code)


if __name__ == "__main__":
    entry()

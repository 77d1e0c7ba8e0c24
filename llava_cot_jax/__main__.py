"""One command line for all commands: ``llava-cot COMMAND``, or ``python -m llava_cot_jax COMMAND``."""

import runpy
import sys

from llava_cot_jax import __version__, cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.option_errors import did_you_mean


def main() -> None:
    """Run the command that the first argument names, as ``python -m llava_cot_jax.COMMAND`` does, or list them."""
    cli.run(_dispatch)


def _dispatch() -> None:
    program, *arguments = sys.argv
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(f"llava-cot {__version__}")
    elif command in cli.COMMANDS:
        sys.argv = [program, *arguments[1:]]
        runpy.run_module(f"llava_cot_jax.{command}", run_name="__main__")
    else:
        suggestion = did_you_mean(command, cli.COMMANDS) or f"; the commands are {', '.join(cli.COMMANDS)}"
        raise UserError(f"there is no command {command!r}{suggestion}")


def _overview() -> str:
    """Return the text that lists the commands."""
    width = max(map(len, cli.COMMANDS))
    commands = [f"  {name:{width}}  {summary}" for name, summary in cli.COMMANDS.items()]
    program = cli.program_name()
    return "\n".join(
        [
            f"usage: {program} COMMAND [options]",
            "",
            "Llama-3.2-Vision in JAX, with LLaVA-CoT's staged reasoning.",
            "",
            "commands:",
            *commands,
            "",
            f"{program} COMMAND --help lists the options of a command.",
            f"{program} --version prints the version.",
        ]
    )


if __name__ == "__main__":
    main()

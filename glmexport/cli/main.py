"""Entry point: commands are found by name and imported only when they run, so that `--help` is quick."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings

import click

from glmexport import __version__
from glmexport.cli import interrupt
from glmexport.errors import GlmExportError, means_no_memory, printable
from glmexport.thread_pool import run_alone

INTERRUPTED = 130

COMMANDS = {
    "split": ("glmexport.cli.split", "Export a checkpoint as separate ONNX graphs."),
    "slim": ("glmexport.cli.slim", "Drop vocabulary rows: the image tokens, or all but a chosen set."),
    "embed": ("glmexport.cli.embed", "Store the embedding as raw rows (bf16), or share the LM head's."),
    "quantize": ("glmexport.cli.quantize", "Quantize the blocks and the LM head to int8 or int4."),
    "convert": ("glmexport.cli.convert", "Convert a bundle to another runtime's format: MNN."),
    "verify": ("glmexport.cli.verify", "Prove a bundle equal to the PyTorch reference."),
    "package": ("glmexport.cli.package", "Make the folder that MNN's LLM engine runs on phones."),
    "bench": ("glmexport.cli.bench", "Measure speed and memory beside what the computer's memory allows."),
    "generate": ("glmexport.cli.generate", "Continue a prompt with a bundle."),
    "chat": ("glmexport.cli.chat", "Chat with a bundle in the terminal."),
    "serve": ("glmexport.cli.serve", "Answer the APIs of Ollama and OpenAI with bundles."),
    "run": ("glmexport.cli.run_model", "Chat with a model, a bundle, a checkpoint or a hub id, in one line."),
    "create": ("glmexport.cli.create", "Name a bundle with a Modelfile, to be served and run."),
    "list": ("glmexport.cli.list_models", "List the models."),
    "show": ("glmexport.cli.show", "Show what a model is made of."),
    "ps": ("glmexport.cli.ps", "List the models that the running server has in memory."),
    "stop": ("glmexport.cli.stop", "Have the running server take a model out of memory."),
    "cp": ("glmexport.cli.cp", "Give a model another name too."),
    "rm": ("glmexport.cli.rm", "Forget models; their bundles stay."),
    "eval": ("glmexport.cli.evaluate", "Exact answers and perplexity of bundles over a file of examples."),
    "tokenize": ("glmexport.cli.tokenize", "Text to a bundle's ids, and back."),
    "inspect": ("glmexport.cli.inspect", "Show what a bundle or checkpoint holds."),
    "doctor": ("glmexport.cli.doctor", "Show which forms of the model this computer can run, and how fast."),
    "patches": ("glmexport.cli.patches", "List supported architectures and their transforms."),
}
"""Command -> (module with a click command named `command`, one line of help)."""

ALONE = ("bench", "generate", "chat", "eval", "serve")
"""Commands that run graphs and nothing else, with one pool of threads for all."""


class LazyGroup(click.Group):
    """A group whose commands' modules are imported when a command is looked up, not when the help lists them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name][0]}.command must be a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glmexport")
def cli() -> None:
    """Take a GLM-family language model from a PyTorch checkpoint to verified, separate ONNX graphs.

    \b
    Example:
      glmexport split chatglm-6b/ -o bundle/
      glmexport verify bundle/ chatglm-6b/
      glmexport split chatglm-6b/ -o int4/ --slim --embedding bf16 --quantize int4

    Exit status: 0 done, 1 a verification or check failed, 2 bad input (one sentence says what), 130 stopped by Ctrl-C.
    """


def main() -> None:
    """The program: `run` in a process of its own."""
    if sys.argv[1:2] and sys.argv[1] in ALONE:
        run_alone()
    run()


def run() -> None:
    """Run the command line; every error a person or file can cause becomes a sentence and a status here."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has not got a character gets a question mark
    try:
        with interrupt.remembered(), warnings.catch_warnings():
            if not sys.warnoptions:  # they are for whoever calls the libraries, and that is us
                warnings.simplefilter("ignore")
            cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nStopped.", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except GlmExportError as error:
        from glmexport.cli import output  # here: help and commands that succeed need not wait for it

        # names and values in a message come from files that anybody may have made
        click.echo(f"{click.style('Error:', fg='red')} {printable(str(error))}", err=True, color=output.colour())
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for it
        if not means_no_memory(error):
            raise
        sys.exit(_out_of_memory())
    except BrokenPipeError:
        # whoever read our output has seen enough
        _discard_output()
        sys.exit(1)
    except OSError as error:  # files that commands read and write have sentences of their own; this is stdout's
        _discard_output()
        click.echo(f"Error: The output could not be written ({error.strerror or error}).", err=True)
        sys.exit(2)


def _out_of_memory() -> int:
    """Say so; returns the status."""
    click.echo(
        "Error: There is not enough memory; close other programs, or see what a command needs with --dry-run.", err=True
    )
    return 2


def _discard_output() -> None:
    """Keep Python from writing what is left, and complaining, at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

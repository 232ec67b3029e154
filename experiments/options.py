"""Options: every command of kvsim with what may stand behind it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

MISTAKE = 2
BENCHES = ("sim", "policies", "paper", "attention", "beams")


class Parser(argparse.ArgumentParser):
    """An argument parser that puts a mistake into one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left, which the parser of a command would hand on to that of all."""
        parsed, left = super().parse_known_args(args, namespace)
        if left:
            from difflib import get_close_matches

            known = re.findall(r"(?<!\S)--[\w-]+", self.format_help()) if left[0].startswith("-") else []
            near = get_close_matches(left[0].partition("=")[0], known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            self.error(f"not understood: {' '.join(left)}{hint}")
        return parsed, left


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(prog="kvsim", description="Simulates how an LLM server manages its KV-cache memory.")
    top.add_argument("--version", action="store_true", help="print the version and stop")
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, told: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=told, description=told[:1].upper() + told[1:] + ".")
        made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        return made

    for name, told in (("run", "run an experiment"), ("check", "check an experiment, every mistake at once")):
        made = command(name, told)
        made.add_argument("config", type=Path, metavar="CONFIG", help="the experiment's YAML")
        made.add_argument(
            "--set", action="append", default=[], metavar="a.b=v", dest="sets",
            help="put a YAML value over the experiment's, at every point of a sweep",
        )  # fmt: skip
    made = commands.choices["run"]
    made.add_argument(
        "--out", type=_path, default=Path("results"), metavar="DIR", help="where results go (results)"
    )
    made.add_argument("--jobs", type=_count, metavar="N", help="processes that run points (one per core)")
    made.add_argument("--no-plots", action="store_true", help="draw no plots and write no report")
    made.add_argument("--no-probe", action="store_true", help="check no steps with real attention")
    made = command("list", "list policies, models and devices with their fields")
    made.add_argument("kind", nargs="?", metavar="KIND", help="a sort of policy, one policy, or combinations")
    command("schema", "print the JSON Schema of the YAML")
    for name in ("list", "schema"):
        commands.choices[name].add_argument(
            "--plugin", type=Path, action="append", default=[], metavar="FILE", dest="plugins",
            help="a Python file that registers policies",
        )  # fmt: skip
    for name, told in (
        ("plot", "draw the plots of stored results again"),
        ("report", "write the report again"),
    ):
        command(name, told).add_argument(
            "directory", type=Path, metavar="DIR", help="folder of an experiment"
        )
    made = command("validate", "compare the attention core with plain attention over its whole matrix")
    _add_device(made)
    made = command("calibrate", "measure the attention core on this machine, for timing: {kind: calibrated}")
    _add_device(made)
    made.add_argument("--out", type=_path, required=True, metavar="FILE", help="where the profile goes")
    made.add_argument("--quick", action="store_true", help="a coarse grid, in seconds")
    made = command("parity", "replay recorded engine cases, a line a file: ok or the first difference")
    made.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recordings, JSON lines")
    made = command("hit-rate", "tell what prefix caches of several sizes would find in a trace")
    made.add_argument("trace", type=Path, metavar="TRACE", help="a trace whose prompts are named by hash ids")
    made.add_argument("--format", default="mooncake", metavar="F", help="the trace's format (mooncake)")
    made.add_argument(
        "--capacity", nargs="+", type=_count, default=[], metavar="N", help="sizes, in blocks of the trace"
    )
    made.add_argument(
        "--eviction", nargs="+", default=[], metavar="E", help="orders of eviction (lru fifo lfu belady)"
    )
    for name, told in (
        ("fit", "fit the roofline to a run of a real server"),
        ("compare", "compare an experiment with a run of a real server"),
    ):
        made = command(name, told)
        made.add_argument("config", type=Path, metavar="CONFIG", help="an experiment of one point")
        made.add_argument(
            "--measured", type=Path, required=True, metavar="FILE", help="requests.jsonl of the run"
        )
        made.add_argument(
            "--set", action="append", default=[], metavar="a.b=v", dest="sets",
            help="put a YAML value over the experiment's",
        )  # fmt: skip
    made = commands.choices["fit"]
    made.add_argument("--blocks", action="store_true", help="find the number of KV blocks too")
    made.add_argument("--out", type=_path, metavar="FILE", help="where the fitted experiment goes")
    command("demo", "show on the terminal what paging does")
    made = command("bench", "measure the simulator and the attention core")
    made.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(BENCHES)} (all)")
    return top


def _add_device(made: argparse.ArgumentParser) -> None:
    made.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, ... (auto)")


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a path")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return int(text)

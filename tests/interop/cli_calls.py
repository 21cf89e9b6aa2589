"""Calls of FEDn's own command line: [[argument, …], …] on stdin, exit codes and outputs as JSON on stdout.

Run in FEDn's environment, all in one process: a `fedn` of its own for each would be a second of imports each.
"""

from __future__ import annotations

import json
import sys

from click.testing import CliRunner
from fedn.cli import main

runner = CliRunner()


def answer(arguments: list[str]) -> dict[str, object]:
    result = runner.invoke(main, arguments)
    raised = "" if result.exception is None else repr(result.exception)
    return {"exit_code": result.exit_code, "output": result.output, "raised": raised}


print(json.dumps([answer(arguments) for arguments in json.load(sys.stdin)]), file=sys.__stdout__)

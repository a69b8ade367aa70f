"""Give each of some commands again and again, killed at one of its first changes to its folder, until one finishes.

Argument: a JSON list of `epg-fast` command lines. Prints the number of kills of each, as a JSON list. A fork for each
attempt saves importing torch.
"""

import json
import os
import signal
import sys

import epg_fast.sampling.job  # noqa: F401
from epg_fast.__main__ import main

# Some too few to finish a batch, some more than one has.
CHANGES = (0, 1, 2, 6, 3, 9, 4, 7)


def attempt(command, changes):
    """Exit status of a child that is killed before its change number `changes + 1`."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    outdir, left = command[command.index("--outdir") + 1], changes

    def hook(event, arguments):
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(outdir):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    os._exit(main(command))


def kills(command):
    """How often the command was killed."""
    for number in range(100):  # later rounds get further: threads write their files in any order
        if attempt(command, CHANGES[number % len(CHANGES)] + number // len(CHANGES)) == 0:
            return number
    raise AssertionError("it never comes to the end")


print(json.dumps([kills(command) for command in json.loads(sys.argv[1])]))

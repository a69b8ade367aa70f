"""Run `sample` again and again in one folder, killed at one of its first changes to it, until it comes to the end.

Arguments: those of `epg-fast`. Prints the number of kills. A fork for each attempt saves importing torch.
"""

import os
import signal
import sys

import jsonargparse  # noqa: F401 (imported once, before the forks)

import epg_fast.sampling.job  # noqa: F401
from epg_fast.__main__ import main

# Some too few to finish a batch, some more than one has.
CHANGES = (0, 1, 2, 6, 3, 9, 4, 7)
outdir = sys.argv[sys.argv.index("--outdir") + 1]


def attempt(changes):
    """Exit status of a child that is killed before its change number `changes + 1`."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = changes

    def hook(event, arguments):
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(outdir):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    os._exit(main(sys.argv[1:]))


kills = 0
while attempt(CHANGES[kills % len(CHANGES)]):
    kills += 1
    assert kills < 60
print(kills)

"""A process that crashes or hangs costs one answer."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe

import pytest

from epg_fast.child import Child, Failed


class Reckless:
    """What a child calls: it does what the request says."""

    def __call__(self, what):
        if what == "crash":
            sys.stderr.write("CUDA error: an illegal memory access\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "hang":
            time.sleep(600)
        return what.upper()


def test_a_child_that_crashes_or_hangs_is_replaced():
    with Child(Reckless) as child:
        assert child.ask("fine", seconds=60) == "FINE"
        for request, seconds, kind, message in (
            ("crash", 60, "crashed", "signal 11: CUDA error: an illegal memory access"),
            ("hang", 2, "hung", "no answer in 2 s"),
        ):
            with pytest.raises(Failed, match=message) as failure:
                child.ask(request, seconds=seconds)
            assert failure.value.kind == kind and child.ask("fine", seconds=60) == "FINE"


def test_a_child_in_the_midst_of_a_request_ends_with_whoever_asked():
    near, far = Pipe()
    command, fd = [sys.executable, "-m", "epg_fast.child"], far.fileno()
    with subprocess.Popen([*command, str(fd)], stdin=subprocess.PIPE, pass_fds=[fd], start_new_session=True) as child:
        for message in (sys.path, Reckless):
            near.send(message)
        assert near.recv() is None  # it has started
        near.send(("hang",))
        child.stdin.close()  # as when the asker is killed
        assert child.wait(60) == -signal.SIGKILL

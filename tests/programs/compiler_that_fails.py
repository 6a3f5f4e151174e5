"""The same where numba's compiler raises."""

import runpy
from pathlib import Path

from numba.core.dispatcher import Dispatcher


def fail(self, sig):
    raise RuntimeError("LLVM has no idea of this processor")


Dispatcher.compile = fail
runpy.run_path(str(Path(__file__).with_name("read_and_pvla.py")), run_name="__main__")

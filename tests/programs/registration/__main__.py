"""Runs the programs of this folder in processes of their own, where peft is imported and peft_read is not."""

import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import peft  # noqa: E402, F401 - once, for all copies of this process

for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            runpy.run_path(str(path))
        except BaseException:
            print(path.stem, traceback.format_exc(), flush=True)
            status = 1
        os._exit(status)
    print("FAILED" if os.waitpid(child, 0)[1] else "ran", path.stem)

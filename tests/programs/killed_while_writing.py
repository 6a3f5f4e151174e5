"""Writes half of the file named by the argument and ends as a killed process does."""

import os
import sys

from peft_read.files import write_whole

with write_whole(sys.argv[1]) as file:
    file.write("x" * 100_000)
    file.flush()
    os._exit(9)

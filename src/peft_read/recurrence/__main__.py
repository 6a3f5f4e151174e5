"""Compile the fast recurrences for this machine, before anything needs them: `python -m peft_read.recurrence`."""

from ..backends import show_backends
from .warm_up import warm_up

warm_up()
print(show_backends())

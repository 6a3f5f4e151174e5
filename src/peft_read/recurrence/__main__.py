"""Compile the fast recurrences for this machine: `python -m peft_read.recurrence`."""

from .backends import show_backends, warm_up

warm_up()
print(show_backends())

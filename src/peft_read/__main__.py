"""`python -m peft_read`: the command `peft-read`."""

import sys

from peft_read_command import main

if __name__ == "__main__":
    sys.exit(main())

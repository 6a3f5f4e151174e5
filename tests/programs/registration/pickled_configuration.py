"""A pickled configuration brings the package with it."""

import os
import pickle

config = pickle.loads(bytes.fromhex(os.environ["PICKLED"]))
assert config.peft_type.name == "READ"

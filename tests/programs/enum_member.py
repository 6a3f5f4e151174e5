"""What must hold of an added member, by the file named by the argument; needs neither torch nor peft."""

import copy
import enum
import json
import pickle
import runpy
import sys

extend_str_enum = runpy.run_path(sys.argv[1])["extend_str_enum"]


class Method(str, enum.Enum):  # noqa: UP042 - as peft has it
    A = "A"
    B = "B"


member = extend_str_enum(Method, "READ", "READ")

assert Method.READ is member and Method["READ"] is member and Method("READ") is member
assert extend_str_enum(Method, "READ", "READ") is member, "a second time"
assert list(Method) == [Method.A, Method.B, member] and len(Method) == 3
assert next(reversed(Method)) is member and member in list(Method)
assert Method.__members__["READ"] is member and isinstance(member, Method) and isinstance(member, str)
assert member == "READ" and hash(member) == hash("READ") and {"READ": 1}[member] == 1
assert (member.name, member.value, str(member)) == ("READ", "READ", "Method.READ")
assert format(member) == format(Method.A).replace("A", "READ")
assert repr(member) == repr(Method.A).replace("A", "READ")
assert json.dumps({"type": member}) == '{"type": "READ"}'
assert copy.copy(member) is member and copy.deepcopy(member) is member
for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(member, protocol)) is member
try:
    Method.READ = 1
except AttributeError:
    pass
else:
    raise AssertionError("a member can be overwritten")
try:
    Method("UNKNOWN")
except ValueError:
    pass
else:
    raise AssertionError("unknown values are accepted")
if sys.version_info >= (3, 12):
    assert "READ" in Method
for name, value in (("A", "other"), ("OTHER", "A"), ("mro", "mro")):
    try:
        extend_str_enum(Method, name, value)
    except ValueError:
        pass
    else:
        raise AssertionError((name, value))

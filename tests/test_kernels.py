"""Triton kernels without a GPU: compiled for three generations of cards and all settings, loops compared with source.

Triton's interpreter runs a kernel as Python, so it cannot see what the compiler makes of it.
"""

import ast
import inspect
import itertools
import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from peft_read.recurrence.triton_kernels import launch

CARDS = (70, 80, 90)
# Compiles kernels for a card and prints, for each, the names that every loop of its IR carries. A process of its own:
# Triton reads TRITON_INTERPRET once, when it is imported.
COMPILE = r"""
import importlib, importlib.util, json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
jobs = json.loads(sys.stdin.read())
found = []
for job in jobs:
    if job["source"]:
        spec = importlib.util.spec_from_file_location("faulty", job["source"])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(job["module"])
    kernel = getattr(module, job["name"])
    fixed = {name: value for name, value in job["fixed"].items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in fixed else job["types"].get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    options = {"num_warps": job["warps"], "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", job["card"], 32), options=options)
    assert "cubin" in built.asm
    loops = []
    for line in built.asm["ttir"].splitlines():
        carried = re.search(r"scf[.]while \(([^)]*)\)|scf[.]for .*iter_args\(([^)]*)\)", line)
        if carried:
            names = re.findall(r"%(\w+?)(?:_\d+)? = ", carried.group(1) or carried.group(2))
            loops.append(sorted(names))
    found.append({"loops": loops, "barriers": built.asm["ptx"].count("bar.sync")})
print(json.dumps(found))
"""


def compiled(jobs, folder):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], input=json.dumps(jobs), env=environment, capture_output=True,
        text=True, timeout=3600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


class Loop(ast.NodeVisitor):
    """The names that a loop of a kernel hands from one pass to the next: assigned in it, and read before that.

    What is read after the loop counts too. Names that are only assigned to (`start`, `e`) live within one pass.
    """

    def __init__(self, function, constants):
        self.loops = []
        self.constants = constants
        self.body = function.body[1:] if ast.get_docstring(function) else function.body
        self.walk(self.body, set(), {argument.arg for argument in function.args.args})

    def walk(self, statements, later, defined):
        """Collects the loops of a list of statements; `later` are names read after it, `defined` those before it."""
        defined = set(defined)
        for number, statement in enumerate(statements):
            behind = later | self.first_reads(statements[number + 1 :])
            if isinstance(statement, (ast.While, ast.For)):
                test = self.reads(statement.test) if isinstance(statement, ast.While) else set()
                read = self.first_reads(statement.body) | test | behind
                self.loops.append((statement.lineno, sorted(self.assigned(statement.body) & read & defined)))
                self.walk(statement.body, read, defined)
            elif isinstance(statement, ast.If):
                taken = self.branches(statement)
                for branch in taken:
                    self.walk(branch, behind, defined)
                defined |= set.intersection(*(self.assigned(branch) for branch in taken))
            else:
                defined |= self.assigned([statement])

    def branches(self, statement):
        """The branches that are compiled: both, or the one that a constant chooses."""
        if isinstance(statement.test, ast.UnaryOp) and isinstance(statement.test.operand, ast.Name):
            name, negated = statement.test.operand.id, True
        elif isinstance(statement.test, ast.Name):
            name, negated = statement.test.id, False
        else:
            return [statement.body, statement.orelse]
        if name not in self.constants:
            return [statement.body, statement.orelse]
        return [statement.body if self.constants[name] != negated else statement.orelse]

    def reads(self, node):
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}

    def assigned(self, statements):
        found = set()
        for statement in statements:
            if isinstance(statement, ast.If):
                for branch in self.branches(statement):
                    found |= self.assigned(branch)
            elif isinstance(statement, (ast.While, ast.For)):
                found |= self.assigned(statement.body)
            else:
                found |= {
                    n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                }
        return found

    def first_reads(self, statements):
        """Names that are read before they are surely assigned."""
        read, known = set(), set()
        for statement in statements:
            if isinstance(statement, ast.If):
                taken = self.branches(statement)
                dynamic = len(taken) == 2
                read |= (self.reads(statement.test) if dynamic else set()) - known
                for branch in taken:
                    read |= self.first_reads(branch) - known
                if dynamic:  # what only one branch assigns keeps its value in the other
                    both = [self.assigned(branch) for branch in taken]
                    read |= (both[0] ^ both[1]) - known
                    known |= both[0] & both[1]
                else:
                    known |= self.assigned(taken[0])
            elif isinstance(statement, (ast.While, ast.For)):
                inner = self.reads(statement.test if isinstance(statement, ast.While) else statement.iter)
                read |= (inner | self.first_reads(statement.body)) - known
            elif isinstance(statement, ast.AugAssign):
                read |= (self.reads(statement.value) | {statement.target.id}) - known
                known |= {statement.target.id}
            else:
                value = getattr(statement, "value", statement)
                read |= self.reads(value) - known
                known |= {
                    n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                }
        return read


def carried_by_source(kernel, constants):
    """(carried names) of every loop, in the order of the source."""
    source = textwrap.dedent(inspect.getsource(kernel.fn))
    function = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
    return [names for _, names in sorted(Loop(function, constants).loops)]


SIZES = dict.fromkeys(("n", "m", "limit", "length", "k", "d", "tokens", "part"), "i32")
NUMBERS = (
    "inverse_first", "inverse_rest", "penalty_first", "penalty_rest", "tol", "floor", "reg_first", "reg_rest", "noise",
)  # fmt: skip
TRANSPORT_TYPES = SIZES | dict.fromkeys(NUMBERS, "fp32") | dict.fromkeys(("n_iter", "converged"), "*i32")
FINISH_TYPES = {"done": "*i32", "converged": "*u8"}
TRANSPORT_TYPES |= dict.fromkeys(("rows", "cols", "totals", "scratch", "left", "right", "bounds"), "*fp64")


def transport_jobs(card):
    from peft_read.transport import triton_finish
    from peft_read.transport import triton_kernels as transport

    jobs = []
    for n, m in ((75, 32), (9, 1), (1024, 1024)):
        for penalised in (False, True):
            settings = triton_finish.finish_settings(n, m)
            warps = settings.pop("num_warps")
            fixed = {"GAP": 4.0, "LOWEST_PRICE": 0.01, "EXCESS": 1e-5, "MISSING": 1e-3, "PENALISED": penalised}
            jobs.append({"module": triton_finish.__name__, "name": "finish", "source": None, "fixed": fixed | settings,
                         "types": TRANSPORT_TYPES | FINISH_TYPES, "card": card, "warps": warps})  # fmt: skip
    for n, m in ((75, 32), (256, 256), (9, 1), (1024, 1024)):
        for wide in (False, True):
            for penalised in (False, True):
                settings = transport.launch_settings(n, m, wide)
                warps = settings.pop("num_warps")
                fixed = {"FILLS": 100, "LOWEST_PRICE": 0.01, "LARGEST": 42.0, "PENALISED": penalised, "WIDE": wide}
                if (n, m) != (75, 32) and penalised:
                    continue
                jobs.append({"module": transport.__name__, "name": "sweeps", "source": None, "fixed": fixed | settings,
                             "types": TRANSPORT_TYPES, "card": card, "warps": warps})  # fmt: skip
    return jobs


def recurrence_jobs(card):
    from peft_read.recurrence.triton_kernels import adapter, scan

    jobs, seen = [], set()
    for k in (*range(1, 9), 12, 16, 17, 24, 31, 32, 33, 48, 63, 64):
        for masked, continued in itertools.product((False, True), repeat=2):
            for name in ("rnn_forward", "rnn_backward"):
                settings = dict(launch.scan_settings(k))
                key = (name, k, masked, continued and name == "rnn_forward")
                if key not in seen:
                    seen.add(key)
                    warps = settings.pop("num_warps")
                    fixed = {"k": k, "MASKED": masked, "CONTINUED": continued, **settings}
                    jobs.append({"module": scan.__name__, "name": name, "source": None, "fixed": fixed, "card": card,
                                 "types": SIZES | {"valid": "*u8"}, "warps": warps})  # fmt: skip
    half = "*fp16" if card < 80 else "*bf16"
    for k in (1, 4, 8, 16):
        for d in (24, 768):
            for kind in ("*fp32", half):
                if kind == half and (k, d) != (4, 768):
                    continue
                types = SIZES | {"valid": "*u8"} | dict.fromkeys(("x", "out", "grad", "grad_x"), kind)
                flags = ("MASKED", "SHIFTED", "BIASED", "LIFTED", "SEEN", "CONTINUED", "PASSED_ON", "UP", "DOWN")
                for name in adapter.__all__:
                    narrow = name == "narrow_backward"
                    most = 4 if name == "columns_backward" else 2
                    settings = dict(launch.narrow_settings(k) if narrow else launch.tile_settings(k, d, most))
                    warps = settings.pop("num_warps")
                    for on in (True, False) if (k, d) == (4, 768) else (True,):
                        options = dict.fromkeys(flags, on) | settings
                        jobs.append({"module": adapter.__name__, "name": name, "source": None, "fixed": options,
                                     "types": types, "card": card, "warps": warps})  # fmt: skip
    return jobs


def compare_loops(jobs, found):
    import importlib

    for job, built in zip(jobs, found, strict=True):
        kernel = getattr(importlib.import_module(job["module"]), job["name"])
        unread = set() if job["fixed"].get("MASKED") else {"marks", *(f"{name}{n}" for name in "rs" for n in range(8))}
        expected = [set(names) - unread for names in carried_by_source(kernel, job["fixed"]) if names]
        if job["name"] in ("down_forward", "up_backward"):  # their loop is that of a function that they call
            expected.append({"total"})
        carried = [set(names) for names in built["loops"]]
        if job["name"].startswith("rnn_") and job["fixed"]["k"] <= 8:
            assert built["barriers"] == 0, (job["name"], job["fixed"])  # nothing goes through shared memory
        assert len(carried) >= len(expected) - 1, (job["name"], expected, carried)
        for names in expected:
            # Nothing that the source hands on may be missing from the loop (a constant that never changes may).
            assert any(names <= one for one in carried), (job["name"], job["fixed"], names, carried)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_compiles_for_every_setting_and_carries_what_its_source_carries(card, tmp_path):
    jobs = recurrence_jobs(card) + transport_jobs(card)
    compare_loops(jobs, compiled(jobs, tmp_path))


@pytest.mark.slow
def test_the_transport_kernel_carries_what_its_source_carries(tmp_path):
    jobs = transport_jobs(90)[:2]
    compare_loops(jobs, compiled(jobs, tmp_path))


def test_the_comparison_sees_names_that_start_as_one_value(tmp_path):
    source = tmp_path / "faulty.py"
    source.write_text(
        "import triton\nimport triton.language as tl\n"
        "@triton.jit\n"
        "def rotating(x, n, K: tl.constexpr):\n"
        "    y = tl.zeros([K], tl.float32)\n"
        "    y1, y2 = y, y\n"
        "    step = 0\n"
        "    while step < n:\n"
        "        y2 = y1\n"
        "        y1 = y\n"
        "        y = y + tl.load(x + tl.arange(0, K)) * y2\n"
        "        step += 1\n"
        "    tl.store(x + tl.arange(0, K), y)\n"
    )
    job = {"module": "", "name": "rotating", "source": str(source), "fixed": {"K": 16}, "types": {"n": "i32"},
           "card": 90, "warps": 1}  # fmt: skip
    function = next(n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.FunctionDef))
    [(_, expected)] = Loop(function, {"K": 16}).loops
    assert expected == ["step", "y", "y1"]
    (built,) = compiled([job], tmp_path)
    assert not any(set(expected) <= set(names) for names in built["loops"])


def test_settings_are_powers_of_two_for_every_width():
    for k in range(1, 65):
        settings = dict(launch.scan_settings(k))
        assert settings["K"] >= k and all(value & (value - 1) == 0 for value in settings.values())
    for k in range(1, 17):
        for d in (1, 24, 768, 1024, 5120):
            for most in (2, 4):
                settings = launch.tile_settings(k, d, most)
                assert all(value & (value - 1) == 0 for value in settings.values()), (k, d)
                assert settings["TOKENS"] * settings["K"] * settings["COLUMNS"] <= launch.TILE_NUMBERS
        settings = launch.narrow_settings(k)
        assert all(value & (value - 1) == 0 for value in settings.values()), k


def test_parts_of_the_tokens_are_whole_tiles_and_miss_no_token():
    for tokens in (1, 2, 63, 64, 65, 8192, 16384, 100_001):
        for blocks in (1, 6, 16, 40, 5000):
            for tile in (1, 2, 16):
                parts, part = launch.token_parts(tokens, blocks, tile)
                assert part % tile == 0
                assert (parts - 1) * part < tokens <= parts * part
                assert parts == 1 or part >= launch.PART_TOKENS // 2

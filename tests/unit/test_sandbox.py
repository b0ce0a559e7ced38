"""Hostile programs: each must end in bounded time, pass no test, and change neither the host nor other sandboxes."""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_sspo.rewards import sandbox
from verl_sspo.rewards.code import grade
from verl_sspo.rewards.sandbox import Limits, SandboxError, run_cases, slot
from verl_sspo.rewards.sandbox_runner import decode, encode

pytestmark = pytest.mark.timeout(120)
needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed (apt-get install bubblewrap)"
)
# LIMITS are long enough for a right program on a busy machine. IMPATIENT is for programs that never end.
LIMITS = Limits(
    test_timeout=60.0, program_timeout=90.0, memory_bytes=256 << 20, disk_bytes=8 << 20, output_bytes=1 << 20
)
IMPATIENT = dataclasses.replace(LIMITS, test_timeout=0.7, program_timeout=8.0)
# Four forms of the same task: double the number.
FORMS = {
    "stdin": {"inputs": ["21\n"], "outputs": ["42\n"]},
    "fn_name": {"fn_name": "f", "inputs": [[21]], "outputs": [42]},
    "asserts": {"asserts": ["assert f(21) == 42", "assert f(1) == 2"]},
    "check": {"entry_point": "f", "test": "def check(candidate):\n    assert candidate(21) == 42\n    assert True"},
}
RIGHT = "def f(x):\n    return 2 * x\nif __name__ == '__main__':\n    print(f(int(input())))"

# Each runs twice: while the module loads, and in the function that the tests call.
HOSTILE = {
    "endless loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that swallows errors": "import os\nwhile True:\n  try: os.fork()\n  except Exception: pass",
    "subprocess": "import subprocess; subprocess.run(['/bin/sh', '-c', 'echo 42']); raise SystemExit(1)",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "one large allocation": "x = b'x' * (1 << 40)",
    "disk": "import os\nfor i in range(10000):\n  with open(f'/tmp/{i}', 'wb') as out: out.write(bytes(1 << 20))",
    "disk in one file": "with open('/tmp/x', 'wb') as out:\n  while True: out.write(bytes(1 << 20))",
    "write outside": "open('/etc/passwd', 'w'); open('/x', 'w')",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)\nos.kill(-1, 9)\nraise SystemExit(1)",
    "print gigabytes": "import sys\nwhile True: sys.stdout.write('42' * (1 << 20))",
    "write gigabytes to every descriptor": "import os\nwhile True:\n"
    "  for i in range(64):\n    try: os.write(i, b'42\\n' * 10000)\n    except OSError: pass",
    "os._exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "marker and early exit": "import os\nprint('passed', 'True', 'ready', flush=True); os._exit(0)",
    "threads left running": "import threading, time\n"
    "for _ in range(4): threading.Thread(target=time.sleep, args=(1000,)).start()\nraise ValueError",
    "thread bomb": "import threading, time\nthreading.stack_size(1 << 15)\n"
    "while True: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
    "ignores SIGTERM": "import signal, time\n"
    "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\n"
    "while True: pass",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef g(): g()\ng()",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "null bytes and bad unicode": "import sys\n"
    "sys.stdout.buffer.write(b'\\x00\\xff\\xfe42\\n\\xed\\xa0\\x80'); sys.stdout.flush()",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nraise ValueError",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    "replaces builtins": "import builtins, sys\nbuiltins.AssertionError = ValueError\nbuiltins.int = lambda *a: 42\n"
    "builtins.isinstance = lambda *a: True\nbuiltins.len = lambda *a: 1\nsys.exit = lambda *a: None",
    "clears modules": "import sys; sys.modules.clear()",
    "closes all descriptors": "import os; os.closerange(0, 64)",
    "garbage in every descriptor": "import os\nfor i in range(64):\n"
    "  try: os.write(i, b'ffffffff' * 100)\n  except OSError: pass",
    "compiles forever": "x = " + "(" * 5000 + ")" * 5000,
    "no syntax": "def (",
}


def _indent(program: str, spaces: int = 4) -> str:
    return "\n".join(" " * spaces + line for line in program.split("\n"))


@needs_bubblewrap
@pytest.mark.parametrize("form", FORMS)
def test_right_program_passes_in_every_form(form):
    verdict = grade(RIGHT, FORMS[form], LIMITS)
    assert verdict.passed == verdict.total
    assert verdict.error == ""


@needs_bubblewrap
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_is_bounded_and_passes_nothing(name):
    attack = HOSTILE[name]
    for program, form in (
        (attack, "stdin"),
        (f"def f(x):\n{_indent(attack)}", "asserts"),
    ):
        verdict = grade(program, FORMS[form], IMPATIENT)
        assert verdict.passed == 0, verdict
        assert verdict.error
    # The next program still passes.
    assert grade(RIGHT, FORMS["stdin"], LIMITS).passed == 1


FORGERIES = {
    "equal to everything": "class E:\n  def __eq__(s, o): return True\n  def __ne__(s, o): return False\n"
    "  __hash__ = None\ndef f(x): return E()",
    "an int equal to everything": "class E(int):\n  def __eq__(s, o): return True\n  __hash__ = int.__hash__\n"
    "def f(x): return E(7)",
    "a list equal to everything": "class E(list):\n  def __eq__(s, o): return True\ndef f(x): return E([7])",
    "a str that lies about its class": "class E(str):\n  __class__ = int\n  def __eq__(s, o): return True\n"
    "  def encode(s, *a): return b'42'\ndef f(x): return E('42')",
    "a bool": "def f(x): return True",
    "steers loops": "def f(x): raise StopIteration",
    "raises what a check expects of itself": "def f(x): raise SystemExit(0)",
    "keyboard interrupt": "def f(x): raise KeyboardInterrupt",
    # The text to find is put together at run time, so that the program itself does not contain it.
    "reads the caller": "import sys\ndef f(x):\n"
    "  frame = sys._getframe()\n  found = []\n"
    "  while frame:\n    found += [repr(v) for v in [*frame.f_locals.values(), *frame.f_globals.values()]]\n"
    "    frame = frame.f_back\n"
    "  return 42 if any('f(21) =' + '= 42' in s or \"'outp\" + \"uts'\" in s for s in found) else 0",
    "reads memory": "import gc\ndef f(x):\n  needle = 'f(21) =' + '= 42'\n"
    "  held = [o for each in gc.get_objects() for o in gc.get_referents(each)]\n"
    "  return 42 if any(type(o) is str and o != needle and needle in o for o in held) else 0",
    "reads the disk": "import os\ndef f(x):\n"
    "  found = [top + '/' + name for top, _, names in os.walk('/') for name in names]\n"
    "  return 42 if any(p.startswith(('/tmp', '/etc/p', '/proc')) or 'verl_sspo' in p for p in found) else 0",
    "forged answers": "import os\ndef f(x):\n"
    "  for i in range(3, 64):\n    try: os.write(i, b'00000004true' * 5)\n    except OSError: pass\n  return 0",
    "forged verdict": "import os\ndef f(x):\n"
    "  for i in range(64):\n    try: os.write(i, b'0000000a[2, 2, "
    "]')\n    except OSError: pass\n  os._exit(0)",
    "redefines the checker": "def check(candidate): pass\ndef candidate(x): return 42\n"
    "import builtins\nbuiltins.check = check\nf = None",
    "a generator": "def f(x): yield 42",
    "an endless generator": "import itertools\ndef f(x): return itertools.repeat(42)",
    "an iterator equal to everything": "class E:\n  def __eq__(s, o): return True\n  def __iter__(s): return s\n"
    "  def __next__(s): return 42\ndef f(x): return E()",
    "a deque equal to everything": "class E(deque):\n  def __eq__(s, o): return True\ndef f(x): return E([7])",
    "a view equal to everything": "from collections.abc import ValuesView\nclass E(ValuesView):\n"
    "  def __eq__(s, o): return True\ndef f(x): return E({7: 7})",
    "a generator that writes everywhere": "import os\ndef f(x):\n"
    "  for i in range(64):\n    try: os.write(i, b'0000000a[2, 2, "
    "]')\n    except OSError: pass\n  yield 42",
    "a function": "def f(x): return f",
    "endless nesting": "def f(x):\n  a = []\n  a.append(a)\n  return a",
    "a long result": "def f(x): return 'x' * (1 << 24)",
}


@needs_bubblewrap
@pytest.mark.parametrize("name", FORGERIES)
def test_forged_result_is_a_wrong_answer(name):
    for form in ("fn_name", "asserts", "check"):
        verdict = grade(FORGERIES[name], FORMS[form], IMPATIENT)
        assert verdict.passed == 0, (form, verdict)


@needs_bubblewrap
def test_loop_over_answers_is_not_cut_short():
    # If f raised StopIteration here, all(map(f, ...)) would end at once and be true.
    tests = {"asserts": ["assert all(map(f, [1, 2, 3]))", "assert [f(x) for x in [1]] == [1]"]}
    assert grade("def f(x): raise StopIteration", tests, LIMITS, all_tests=True).passed == 0


@needs_bubblewrap
def test_checks_cannot_be_swallowed_by_a_dead_program():
    tests = {"asserts": ["try:\n    f(1)\nexcept BaseException:\n    pass"]}
    assert grade("import os\ndef f(x): os._exit(0)", tests, LIMITS).passed == 0
    assert grade("import time\ndef f(x): time.sleep(100)", tests, IMPATIENT).error == "timeout"
    # An exception that the check expects counts as an answer.
    assert grade("def f(x): raise ValueError('no')", tests, LIMITS).passed == 1


@needs_bubblewrap
def test_results_arrive_as_fresh_plain_data():
    program = "from collections import *\nP = namedtuple('P', 'a b')\ndef f(x): return [P(1, 2), Counter('aab'), {3}]"
    tests = {"asserts": ["assert f(0) == [(1, 2), {'a': 2, 'b': 1}, {3}]", "assert type(f(0)[0]) is tuple"]}
    assert grade(program, tests, LIMITS).passed == 2


# What a function returns, a check that it passes, and one that it fails, as it does in plain Python.
LAZY = {
    "generator": ("(i for i in range(x))", "list(f(3)) == [0, 1, 2]", "f(3) == [0, 1, 2]"),
    "map": ("map(str, range(x))", "''.join(f(3)) == '012'", "f(3)[0] == '0'"),
    "zip": ("zip([x], [x])", "dict(f(1)) == {1: 1}", "len(f(1)) == 1"),
    "generators in a list": (
        "[iter([x]), iter([])]",
        "[list(each) for each in f(1)] == [[1], []]",
        "f(1) == [[1], []]",
    ),
    "range": ("range(x, 0, -2)", "f(5) == range(5, 0, -2) and f(5)[1] == 3", "f(5) == [5, 3, 1]"),
    "long range": ("range(10 ** x)", "len(f(12)) == 10 ** 12", "f(12) == 0"),
    "deque": ("deque([x])", "list(f(1)) == [1] and f(1)[0] == 1", "f(1) == [1]"),
    "keys": ("{x: 2}.keys()", "sorted(f(1)) == [1] and len(f(1)) == 1", "f(1) == [1]"),
    "items": ("OrderedDict(a=x).items()", "list(f(1)) == [('a', 1)]", "f(1)[0] == ('a', 1)"),
    "arguments": ("sum(x)", "f(range(3)) == f(iter([1, 2])) == f(i for i in (3,)) == 3", "f({1: 3}.values()) == 4"),
}


@needs_bubblewrap
@pytest.mark.parametrize("name", LAZY)
def test_iterators_and_views_cross_as_what_they_are(name):
    returned, passes, fails = LAZY[name]
    tests = {"asserts": [f"assert {passes}", f"assert {fails}"]}
    verdict = grade(f"def f(x): return {returned}", tests, LIMITS, all_tests=True)
    assert verdict.passed == 1, verdict
    assert grade(f"def f(x): return {returned}", {"asserts": tests["asserts"][:1]}, LIMITS).passed == 1


@needs_bubblewrap
def test_what_a_generator_raises_is_seen():
    program = "def f(x):\n    yield 1\n    raise TypeError('no')"
    check = "try:\n    list(f(1))\n    assert False\nexcept TypeError as error:\n    assert str(error) == 'no'"
    assert grade(program, {"asserts": [check]}, LIMITS).passed == 1
    assert grade("def f(x):\n    while True: yield 1", {"asserts": [check]}, LIMITS).error.startswith("not plain data")


def _outputs(program: str) -> str:
    ((error, output),) = run_cases(program, [{"stdin": b""}], LIMITS)
    assert error == "", (error, output)
    return output.decode()


@needs_bubblewrap
def test_nothing_of_the_host_is_visible(tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("treasure")
    monkeypatch.setenv("SECRET_TOKEN", "treasure")
    home = os.path.expanduser("~/.bashrc")
    program = f"""
import os
print(dict(os.environ))
for path in ({str(secret)!r}, '/proc/1/environ', '/proc/self/maps', '/etc/passwd',
             {home!r}, {os.getcwd()!r}, {__file__!r}, '/sys', '/var', '/run', '/tmp/ray', '/dev/shm', '/dev/kmsg'):
    print(path, os.path.exists(path))
print(sorted(os.listdir('/tmp')), os.getuid(), os.getpid() < 10)
"""
    lines = _outputs(program).splitlines()
    assert "treasure" not in "".join(lines)
    assert not any(line.endswith("True") for line in lines[:-1]), lines
    assert lines[-1] == f"[] {sandbox.NOBODY} True"


@needs_bubblewrap
def test_only_tmp_can_be_written_and_it_is_small():
    program = """
import os
wrote = []
for top, folders, files in os.walk('/'):
    try:
        with open(os.path.join(top, 'probe'), 'w') as out: out.write('x')
        wrote.append(top)
    except OSError: pass
print(wrote)
total = 0
try:
    for i in range(100):
        with open(f'/tmp/{i}', 'wb') as out: total += out.write(bytes(1 << 20))
except OSError: pass
print(total <= 8 << 20)
"""
    assert _outputs(program).splitlines() == ["['/tmp']", "True"]


@needs_bubblewrap
def test_no_network_not_even_loopback():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        program = f"""
import socket
import subprocess
import sys
for family, address in ((socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_UNIX, '\\0ray')):
    try:
        socket.socket(family).connect(address)
        print('connected')
    except OSError as error: print('refused')
"""
        assert _outputs(program).split() == ["refused", "refused"]
        with pytest.raises(TimeoutError):
            server.accept()


@needs_bubblewrap
def test_process_and_thread_limits_bind():
    program = """
import os, threading, time
try: os.fork(); print('forked')
except OSError: print('no fork')
try: os.execv('/bin/true', ['true'])
except OSError: print('no exec')
threading.stack_size(1 << 15)
n = 0
try:
    while n < 1000: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1
except RuntimeError: pass
print(0 < n <= 32, flush=True)
os._exit(0)
"""
    assert _outputs(program).splitlines() == ["no fork", "no exec", "True"]


@needs_bubblewrap
def test_memory_limit_covers_files_and_shared_memory_too():
    program = """
import ctypes, mmap, os
for attempt in (lambda: mmap.mmap(-1, 1 << 30), lambda: os.memfd_create('x'), lambda: bytearray(1 << 30),
                lambda: os.setxattr('/tmp', 'user.x', bytes(1000))):
    try: attempt(); print('got it')
    except (OSError, MemoryError): print('refused')
print(ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600))
"""
    assert _outputs(program).splitlines() == ["refused"] * 4 + ["-1"]


def _is_running(name: str) -> bool:
    # psutil skips processes that end meanwhile.
    return name in {process.info["name"] for process in psutil.process_iter(["name"])}


@needs_bubblewrap
def test_no_process_survives():
    name = f"orphan{os.getpid()}"[:15]
    program = f"import ctypes, threading, time\nctypes.CDLL(None).prctl(15, {name.encode()!r})\ntime.sleep(1000)"
    assert grade(program, FORMS["stdin"], Limits(test_timeout=1.0)).error == "timeout"
    assert grade(program, FORMS["stdin"], Limits(test_timeout=50.0, program_timeout=2.0)).error == "timeout"
    assert not _is_running(name)


@needs_bubblewrap
def test_sandbox_dies_with_its_caller():
    name = f"leftover{os.getpid()}"[:15]
    program = f"import ctypes, time\nctypes.CDLL(None).prctl(15, {name.encode()!r})\ntime.sleep(999)"
    source = f"""
from verl_sspo.rewards.sandbox import Limits, run_cases
print(list(run_cases({program!r}, [{{"stdin": b""}}], Limits(test_timeout=900, program_timeout=900))))
"""
    caller = subprocess.Popen([sys.executable, "-c", source])
    # If it never runs, the test's own timeout ends the wait.
    while not _is_running(name):
        assert caller.poll() is None
        time.sleep(0.1)
    caller.kill()
    caller.wait()
    while _is_running(name):
        time.sleep(0.1)


@needs_bubblewrap
def test_no_dead_process_is_left_to_others():
    def dead():
        family = psutil.process_iter(["pid", "ppid", "status"])
        return {p.pid for p in family if (p.info["ppid"], p.info["status"]) == (os.getpid(), psutil.STATUS_ZOMBIE)}

    # Those left by other tests.
    before = dead()
    prctl = ctypes.CDLL(None).prctl
    prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
    try:
        for program in (RIGHT, "while True: pass", "def ("):
            for form in ("stdin", "asserts"):
                grade(program, FORMS[form], Limits(test_timeout=0.5))
        assert dead() <= before
    finally:
        prctl(36, 0, 0, 0, 0)


@needs_bubblewrap
def test_stdin_program_sees_a_real_interpreter():
    program = """
import sys, threading, atexit
sys.setrecursionlimit(10**6); threading.stack_size(1 << 26)
def main():
    n = int(sys.stdin.readline()); print(sum(map(int, sys.stdin.read().split())) + n, end='')
atexit.register(lambda: print('.', end=''))
threading.Thread(target=main).start()
"""
    results = list(run_cases(program, [{"stdin": b"1\n2 3\n"}, {"stdin": b"10\n" + b"1 " * 100_000}], LIMITS))
    assert results == [("", b"6."), ("", b"100010.")]


@needs_bubblewrap
def test_each_test_starts_afresh():
    program = "import os\nprint(os.path.exists('/tmp/x') or 'seen' in globals())\nseen = True\nprint(input())"
    cases = [{"stdin": b"a"}, {"stdin": b"b"}]
    assert [out for _, out in run_cases(program, cases, LIMITS)] == [b"False\na\n", b"False\nb\n"]


@needs_bubblewrap
def test_one_slow_test_does_not_hide_the_others():
    program = "import time\nn = int(input())\nif n == 2: time.sleep(60)\nprint(n)"
    tests = {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "3"]}
    verdict = grade(program, tests, Limits(test_timeout=5.0), all_tests=True)
    assert (verdict.passed, verdict.total, verdict.error) == (2, 3, "timeout")


@needs_bubblewrap
def test_many_at_once_take_turns(monkeypatch, tmp_path):
    # The places are files there: with the user's other sandboxes, three of them might not be free.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    running, most, lock = 0, 0, threading.Lock()
    # Breaks unless three threads are inside at the same time.
    three = threading.Barrier(3, timeout=60)

    def one():
        nonlocal running, most
        with slot(3):
            with lock:
                running += 1
                most = max(most, running)
            three.wait()
            with lock:
                running -= 1

    threads = [threading.Thread(target=one) for _ in range(39)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3


def test_without_bubblewrap_it_refuses(monkeypatch):
    sandbox._wall.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxError, match="bubblewrap"):
        grade(RIGHT, FORMS["stdin"], LIMITS)
    sandbox._wall.cache_clear()


def test_unprotected_only_when_asked():
    assert grade(RIGHT, FORMS["asserts"], dataclasses.replace(LIMITS, unsafe=True)).passed == 2


@needs_bubblewrap
def test_a_broken_sandbox_is_an_error_not_a_score(monkeypatch):
    monkeypatch.setattr(sandbox, "_wall", lambda size: (shutil.which("bwrap"), "--no-such-option"))
    with pytest.raises(SandboxError, match="no-such-option"):
        grade(RIGHT, FORMS["stdin"], LIMITS)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-5, 5).map(lambda n: n * 7**9000)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4).map(deque)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
        | st.frozensets(st.integers(), max_size=4)
    ),
    max_leaves=20,
)


@given(plain)
def test_encoding_round_trip(value):
    assert decode(encode(value)) == value
    assert repr(type(decode(encode(value)))) == repr(type(value))


@given(st.binary())
def test_decoding_garbage_raises_value_error_only(data):
    with contextlib.suppress(ValueError):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"x",
            b"null null",
            b"[" * 100_000,
            b'{"x": []}',
            b'{"l": [], "t": []}',
            b"{}",
            b'{"l": 3}',
            b'{"l": "a"}',
        ),
        *(b'{"e": [[]]}', b'{"d": [1]}', b'{"d": [[[], 1]]}', b'{"r": []}', b'{"r": ["a"]}', b'{"c": [1, 2, 3]}'),
        *(b'{"c": [%d, 0]}' % 10**400, b'{"i": 3}', b'{"i": "x"}', b'{"y": "0"}', b'{"y": 1}', b"1" * 5000),
    ],
)
def test_decoding_malformed(data):
    with pytest.raises(ValueError):  # noqa: PT011
        decode(data)


@pytest.mark.parametrize("value", [object(), len, bytearray(), iter([len]), [object()], {1: object()}, type])
def test_other_things_do_not_cross(value):
    with pytest.raises(TypeError):
        encode(value)

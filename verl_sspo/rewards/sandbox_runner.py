"""What runs inside the sandbox, and the encoding that both sides of its wall speak.

`sandbox.py` compiles this file and feeds it to a bare interpreter, so it imports nothing of the project and only the
cheapest modules: start-up is most of the cost of a short program. One request comes in on standard input; frames go
out on standard output. Three roles:

- `cases`: runs a program once a test, each in a fresh child process, and sends back what it printed or returned.
- `program`: holds a program and answers calls of its functions.
- `checker`: runs a data set's checks against functions that live in another sandbox, and sends the verdict.

Nothing here is trusted by the host: a program that takes over its runner gains only what it had before, the choice of
what it prints and returns.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, MappingView
from itertools import islice
from time import monotonic, sleep
from types import CodeType, ModuleType
from typing import Any, NoReturn

# --- plain data --------------------------------------------------------------------------------------------------

# Deep enough for any test, far below the depth at which an interpreter would run out of stack.
MAX_DEPTH = 200
# An endless iterator ends here, long before the memory does.
MAX_YIELDED = 1 << 20


class NotPlainError(TypeError):
    """A value that cannot cross."""


def encode(value: Any) -> bytes:
    """Numbers, strings, bytes, lists, tuples, deques, ranges, dicts, sets and None as bytes.

    Subclasses become what they derive from. Of iterators and of views of a dict, what they yield crosses.

    Raises:
        NotPlainError: Anything else, nested deeper than `MAX_DEPTH`, or an iterator longer than `MAX_YIELDED`.
    """
    parts: list[bytes] = []
    _encode(value, parts, MAX_DEPTH)
    return b"".join(parts)


def _encode(value: Any, parts: list[bytes], depth: int) -> None:
    # `type` and the base classes' own methods: an object cannot answer for itself what it is or holds.
    kind = type(value)
    if not depth:
        raise NotPlainError("nested too deeply")
    if value is None:
        parts.append(b"n;")
    elif kind is bool:
        parts.append(b"b1;" if value else b"b0;")
    elif issubclass(kind, int):
        parts.append(b"i%s;" % int.__format__(value, "x").encode())
    elif issubclass(kind, float):
        parts.append(b"f%s;" % float.hex(value).encode())
    elif issubclass(kind, complex):
        number = complex.__add__(value, 0j)
        parts.append(f"c{number.real.hex()} {number.imag.hex()};".encode())
    elif issubclass(kind, str):
        text = str.encode(value, "utf-8", "surrogatepass")
        parts.append(b"s%d;" % len(text) + text)
    elif kind is bytes:
        parts.append(b"y%d;" % len(value) + value)
    elif issubclass(kind, dict):
        items = list(dict.items(value))
        parts.append(b"d%d;" % len(items))
        for key, item in items:
            _encode(key, parts, depth - 1)
            _encode(item, parts, depth - 1)
    else:
        letter, elements = _elements(value, kind)
        parts.append(letter + b"%d;" % len(elements))
        for element in elements:
            _encode(element, parts, depth - 1)


def _elements(value: Any, kind: type) -> tuple[bytes, list[Any]]:
    if kind is range:
        return b"r", [value.start, value.stop, value.step]
    for letter, base in ((b"l", list), (b"t", tuple), (b"e", set), (b"z", frozenset), (b"q", deque)):
        if issubclass(kind, base):
            return letter, list(base.__iter__(value))
    # These run code of the program, in its own process.
    for letter, lazy in ((b"g", Iterator), (b"v", MappingView)):
        if issubclass(kind, lazy):
            elements = list(islice(value, MAX_YIELDED + 1))
            if len(elements) > MAX_YIELDED:
                raise NotPlainError(f"more than {MAX_YIELDED} elements: {kind.__name__}")
            return letter, elements
    raise NotPlainError(f"not plain data: {kind.__name__}")


class Pairs(list):
    """Keys and items of a dict that was not built."""


def decode(data: bytes, hashing: bool = True) -> Any:
    """The inverse of `encode`: fresh objects of the plain types, whatever the bytes say.

    Args:
        data: What `encode` wrote, or anything.
        hashing: Build dicts, sets and what else is no JSON. A program can choose numbers that cost quadratic time: with
            equal hashes, or as the ends of a range. Who cannot bear that gets `Pairs` for a dict and nothing, an empty
            frozenset, for the others.

    Raises:
        ValueError: The bytes are not what `encode` writes.
    """
    value, end = _decode(data, 0, MAX_DEPTH, hashing)
    if end != len(data):
        raise ValueError("trailing bytes")
    return value


def _decode(data: bytes, start: int, depth: int, hashing: bool) -> tuple[Any, int]:
    end = data.find(b";", start)
    if end < 0 or not depth:
        raise ValueError("malformed")
    letter, head, end = data[start : start + 1], data[start + 1 : end].decode("ascii"), end + 1
    if letter == b"n":
        return None, end
    if letter == b"b":
        return head == "1", end
    if letter == b"i":
        return int(head, 16), end  # base 16: linear in the digits, however many a program sends
    if letter == b"f":
        return float.fromhex(head), end
    if letter == b"c":
        real, imag = head.split(" ")
        return complex(float.fromhex(real), float.fromhex(imag)), end
    size = int(head[:20])
    if size < 0 or size > len(data) - end:  # every element takes at least a byte
        raise ValueError("malformed")
    if letter in (b"s", b"y"):
        raw = data[end : end + size]
        return (raw.decode("utf-8", "surrogatepass") if letter == b"s" else raw), end + size
    elements = []
    for _ in range(size * 2 if letter == b"d" else size):
        element, end = _decode(data, end, depth - 1, hashing)
        elements.append(element)
    try:
        if letter == b"l":
            return elements, end
        if letter == b"t":
            return tuple(elements), end
        if not hashing and letter in (b"e", b"z", b"q", b"r", b"g", b"v"):
            return frozenset(), end
        if not hashing and letter == b"d":
            return Pairs(zip(elements[::2], elements[1::2], strict=True)), end
        if letter == b"e":
            return set(elements), end
        if letter == b"z":
            return frozenset(elements), end
        # As in Python, these equal no list.
        if letter == b"q":
            return deque(elements), end
        if letter == b"r":
            return range(*elements), end
        if letter == b"g":
            return iter(elements), end
        if letter == b"v":
            return dict(enumerate(elements)).values(), end
        if letter == b"d":
            return dict(zip(elements[::2], elements[1::2], strict=True)), end
    except TypeError as error:  # an unhashable element, a range of texts
        raise ValueError("malformed") from error
    raise ValueError("malformed")


def write_frame(descriptor: int, data: bytes) -> None:
    """Writes a length of 8 hexadecimal digits and the data."""
    view = memoryview(b"%08x" % len(data) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_exactly(descriptor: int, size: int, deadline: float | None) -> bytes:
    parts = []
    while size:
        if deadline is not None and not _readable(descriptor, deadline):
            raise TimeoutError
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(descriptor: int, limit: int, deadline: float | None = None) -> bytes:
    """Reads what `write_frame` wrote.

    Raises:
        EOFError: The other side is gone.
        TimeoutError: `deadline`, on the monotonic clock, is over.
        ValueError: The frame is longer than `limit` bytes, or not a frame.
    """
    size = int(_read_exactly(descriptor, 8, deadline), 16)
    if not 0 <= size <= limit:
        raise ValueError("frame too long")
    return _read_exactly(descriptor, size, deadline)


def _readable(descriptor: int, deadline: float) -> bool:
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - monotonic()) * 1000))


# --- limits ------------------------------------------------------------------------------------------------------

OPEN_FILES = 64
STACK_BYTES = 120 << 20

# System calls that a single-process program has no use for: new processes (RLIMIT_AS bounds one process, so one
# process is what a program gets), memory that RLIMIT_AS does not count, sockets, and kernel interfaces known for holes.
# name: (number on x86_64, number on aarch64); None where the architecture has none.
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "open_by_handle_at": (304, 265),
    # Attributes of files in memory are memory that no limit counts.
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
}
# machine: (AUDIT_ARCH_*, column of FORBIDDEN, number of clone; clone3 is 435 on both)
ARCHITECTURES = {"x86_64": (0xC000003E, 0, 56), "aarch64": (0xC00000B7, 1, 220)}
CLONE3 = 435
CLONE_THREAD = 0x10000


def _filter_steps() -> bytes:
    """A seccomp program: threads may start, processes and what `FORBIDDEN` names may not."""
    audit, column, clone = ARCHITECTURES[os.uname().machine]
    load, equal, at_least, any_bit, result = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, missing, allow = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000  # KILL, EPERM, ENOSYS, ALLOW
    steps = [(load, 0, 0, 4), (equal, 1, 0, audit), (result, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:  # the x32 interface numbers its calls from here
        steps += [(at_least, 0, 1, 0x40000000), (result, 0, 0, refuse)]
    # ENOSYS makes the C library fall back to clone, whose flags a filter can see.
    steps += [(equal, 0, 1, CLONE3), (result, 0, 0, missing)]
    for numbers in FORBIDDEN.values():
        if (number := numbers[column]) is not None:
            steps += [(equal, 0, 1, number), (result, 0, 0, refuse)]
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (result, 0, 0, refuse)]
    steps += [(result, 0, 0, allow)]
    return b"".join(
        code.to_bytes(2, sys.byteorder) + bytes((yes, no)) + value.to_bytes(4, sys.byteorder)
        for code, yes, no, value in steps
    )


def limit_resources(limits: dict[str, Any], seconds: int) -> None:
    """Limits the calling process and its children, for good, among others to `seconds` of processor time each."""
    import resource

    bounds = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_NPROC: limits["threads"],
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))
    # Recursion through `lru_cache` and the like takes C stack; the kernel leaves this much room below it. The hard
    # limit stays: programs set the soft one themselves.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES if hard < 0 else min(STACK_BYTES, hard), hard))


def system_call_filter() -> Callable[[], None]:
    """Loads what filtering needs; the function it returns filters the calling process, for good."""
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    steps = _filter_steps()
    program = Program(len(steps) // 8, steps)
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def confine() -> None:
        # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with SECCOMP_MODE_FILTER
        if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.byref(program), 0, 0):
            raise OSError(ctypes.get_errno(), "seccomp")

    return confine


# --- programs ----------------------------------------------------------------------------------------------------

# Names that judges such as LeetCode provide, and that programs written for them use without importing.
# module: what of it goes without its name
PROVIDED = {
    "bisect": "bisect_left bisect_right insort insort_left insort_right",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "copy": "deepcopy",
    "datetime": "",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "heapq": "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle groupby islice pairwise "
    "permutations product repeat starmap takewhile dropwhile zip_longest",
    "json": "",
    "math": "acos asin atan atan2 ceil comb cos exp factorial fabs floor gcd hypot inf isqrt lcm log log10 log2 pi "
    "prod sin sqrt tan",
    "operator": "",
    "random": "",
    "re": "",
    "statistics": "",
    "string": "",
    "sys": "",
    "typing": "Any Callable DefaultDict Deque Dict Generator Iterable Iterator List Mapping Optional Sequence Set "
    "Tuple Type TypeVar Union",
}


def global_names(source: str) -> set[str]:
    """The names that a program looks up in its globals or builtins and does not bind in its outermost scope.

    Raises:
        SyntaxError: As `compile`.
    """
    import _symtable as symbols

    used: set[str] = set()
    top = symbols.symtable(source, "<program>", "exec")
    scopes = [top]
    while scopes:
        scope = scopes.pop()
        scopes += scope.children
        used |= {
            name
            for name, flags in scope.symbols.items()
            if (flags >> symbols.SCOPE_OFF) & symbols.SCOPE_MASK in (symbols.GLOBAL_IMPLICIT, symbols.GLOBAL_EXPLICIT)
        }
    return {name for name in used if not top.symbols.get(name, 0) & (symbols.DEF_LOCAL | symbols.DEF_IMPORT)}


def provided_names(names: set[str]) -> dict[str, Any]:
    """Of the given names, those that a judge provides."""
    provided: dict[str, Any] = {}
    for source, listed in PROVIDED.items():
        members = names.intersection(listed.split())
        if members or source in names:
            loaded = __import__(source)
            provided |= {member: getattr(loaded, member) for member in members}
            provided |= {source: loaded} if source in names else {}
    return provided


def new_module(name: str, space: dict[str, Any]) -> ModuleType:
    """A module known under its name, as `dataclasses` and `typing` expect, with the given globals."""
    module = ModuleType(name)
    module.__dict__.update(space, __builtins__=builtins)
    sys.modules[name] = module
    return module


def find_function(module: ModuleType, name: str) -> Any:
    """A function of the program, or a method of its class `Solution`."""
    if name not in module.__dict__ and "Solution" in module.__dict__:
        return getattr(module.__dict__["Solution"](), name)
    return module.__dict__[name]


def load(name: str, sources: list[str]) -> ModuleType:
    """A module in which the sources ran one after the other.

    Raises:
        BaseException: What they raise, or compiling them.
    """
    module = new_module(name, {})
    for source, before in zip(sources, ["", *sources], strict=False):
        try:
            program = Program(source)
        except IndentationError:
            if not before:
                raise
            program = Program(before + source)  # not a program but the rest of the one before
        module.__dict__.update({key: value for key, value in program.provided.items() if key not in vars(module)})
        exec(program.code, module.__dict__)
    return module


def _use_descriptors(*descriptors: int) -> None:
    """Makes the given descriptors 0, 1, 2, ... and closes all others."""
    aside = OPEN_FILES - len(descriptors)  # above every descriptor that this process has opened itself
    copies = [os.dup(descriptor) for descriptor in descriptors]
    for place, descriptor in enumerate(copies):
        os.dup2(descriptor, aside + place)
    for place in range(len(descriptors)):
        os.dup2(aside + place, place)
    os.closerange(len(descriptors), 4096)


class Program:
    """A compiled program, and what it needs to run.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: It does not compile.
    """

    def __init__(self, source: str) -> None:
        self.code: CodeType = compile(source, "<program>", "exec", dont_inherit=True)
        self.names = global_names(source)
        self.provided = provided_names(self.names)


NOT_PLAIN = 3  # exit status: the function returned something that cannot cross


def _child(case: dict[str, Any], program: Program, confine: Callable[[], None], stdin: int, out: int) -> int:
    """One test, in its own process; returns the exit status."""
    null = os.open("/dev/null", os.O_RDWR)
    call = "call" in case
    _use_descriptors(*((null, null, null, out) if call else (stdin, out, null)))
    stdin_file = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    stdout_file = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdin = sys.__stdin__ = stdin_file  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = stdout_file  # type: ignore[misc]
    module = new_module("solution" if call else "__main__", program.provided)
    confine()
    status = 0
    try:
        exec(program.code, module.__dict__)
        if call:
            name, arguments = case["call"]
            result = find_function(module, name)(*arguments)
            try:
                data = encode(result)
            except NotPlainError:
                return NOT_PLAIN
            while data:
                data = data[os.write(3, data) :]
            return 0
    except SystemExit as stop:
        status = 0 if stop.code in (None, 0) and not call else 1
    # What the interpreter does at the end of a program: wait for its threads, call its exit handlers, flush.
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    if sys.stdout is not None and not getattr(sys.stdout, "closed", False):
        sys.stdout.flush()
    module.__dict__.clear()  # files that the program left open flush as they go
    if not stdout_file.closed:
        stdout_file.flush()
    return status


def _run_case(
    case: dict[str, Any], program: Program, confine: Callable[[], None], limits: dict[str, Any]
) -> tuple[str, bytes]:
    """Runs one test in a child; returns how it ended ("" is well) and its output, at most `output_bytes` of it."""
    import select

    stdin, feed = os.pipe()
    drain, out = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            limit_resources(limits, int(limits["test_timeout"]) + 2)
            status = _child(case, program, confine, stdin, out)
        finally:  # whatever the program raised
            os._exit(status)
    os.close(stdin)
    os.close(out)
    os.set_blocking(feed, False)
    os.set_blocking(drain, False)
    pending = memoryview(case.get("stdin", b""))
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(drain, select.POLLIN)
    poll.register(ended, select.POLLIN)
    poll.register(feed, select.POLLOUT)
    if not pending:
        poll.unregister(feed)
        os.close(feed)
    deadline = monotonic() + limits["test_timeout"]
    output = bytearray()
    error, reading, running = "", True, True
    while (reading or running) and not error:
        ready = poll.poll(max(0.0, deadline - monotonic()) * 1000)
        if monotonic() > deadline:
            error = "timeout"
            break
        for descriptor, _ in ready:
            if descriptor == drain:
                part = os.read(drain, 1 << 16)
                output += part
                if not part:
                    reading = False
                    poll.unregister(drain)
                if len(output) > limits["output_bytes"]:
                    error = "too much output"
            elif descriptor == ended:
                running = False
                poll.unregister(ended)
            elif pending:
                try:
                    pending = pending[os.write(feed, pending[: 1 << 16]) :]
                except BrokenPipeError:  # the program does not read its input: its own affair
                    pending = pending[:0]
                if not pending:
                    poll.unregister(feed)
                    os.close(feed)
    if pending:
        os.close(feed)
    os.kill(child, 9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(ended)
    os.close(drain)
    if not error and status:
        error = "not plain data" if status == NOT_PLAIN else "crash" if status < 0 else "exception"
    return error, bytes(output[: limits["output_bytes"]])


def run_cases(request: dict[str, Any]) -> None:
    """Role `cases`: a frame `(error, output)` for each test, in order."""
    limits = request["limits"]
    limit_resources(limits, int(limits["program_timeout"]) + 2)
    try:
        program = Program(request["program"])
    except Exception as error:
        for _ in request["cases"]:
            write_frame(1, encode((f"does not compile: {type(error).__name__}", b"")))
        return
    confine = system_call_filter()
    for case in request["cases"]:
        write_frame(1, encode(_run_case(case, program, confine, limits)))


def serve_program(request: dict[str, Any]) -> None:
    """Role `program`: answers calls `(name, arguments, keyword arguments)` until nobody asks any more.

    Answers are `("value", result)`, `("raise", type, message)` or `("end", reason)`.
    """
    limits = request["limits"]
    null = os.open("/dev/null", os.O_RDWR)
    _use_descriptors(null, null, null, request["calls"], request["answers"])
    calls, answers = 3, 4
    limit_resources(limits, int(limits["program_timeout"]) + 2)
    system_call_filter()()
    try:
        module = load("solution", request["sources"])
    except BaseException as error:
        write_frame(answers, encode(("end", f"exception while loading: {type(error).__name__}")))
        return
    while True:
        try:
            name, arguments, keywords = decode(read_frame(calls, limits["output_bytes"]))
        except EOFError:
            return
        try:
            function = find_function(module, name)
        except Exception as error:  # of the program's class `Solution`
            write_frame(answers, encode(("end", f"no function {name}: {type(error).__name__}")))
            continue
        try:
            answer = encode(("value", function(*arguments, **keywords)))
        except NotPlainError as error:
            answer = encode(("end", f"not plain data: {error}"))
        except Exception as error:
            message = str(error.args[0])[:1000] if error.args and type(error.args[0]) is str else ""
            # The nearest kind that the checker knows: a program's own exceptions derive from one.
            kind = next(each for each in type(error).__mro__ if each in RAISED.values())
            answer = encode(("raise", kind.__name__, message))
        except BaseException as error:
            answer = encode(("end", f"the function raised {type(error).__name__}"))
        write_frame(answers, answer)


# Exceptions that a check may see the program raise. Those that steer the interpreter (StopIteration ends a loop over
# the answers as if all were there) are not among them.
RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ArithmeticError, AssertionError, AttributeError, EOFError, Exception, IndexError, KeyError, LookupError),
        *(NameError, NotImplementedError, OSError, OverflowError, RecursionError, RuntimeError, TypeError),
        *(UnicodeError, ValueError, ZeroDivisionError),
    )
}


def run_checker(request: dict[str, Any]) -> None:
    """Role `checker`: sends `(passed, total, error)` once, when all checks are done or none can follow."""
    limits = request["limits"]
    null = os.open("/dev/null", os.O_RDWR)
    _use_descriptors(null, null, null, 1, request["calls"], request["answers"])
    verdict, calls, answers = 3, 4, 5
    limit_resources(limits, int(limits["program_timeout"]) + 2)
    checks: list[str] = request["checks"]
    passed = 0
    failure = ""

    def finish(error: str) -> NoReturn:
        # Never returns: a check that catches every exception cannot go on after this.
        write_frame(verdict, encode((passed, len(checks), error)))
        while True:
            sleep(60)

    def remote(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                question = encode((name, arguments, keywords))
                try:
                    write_frame(calls, question)
                except BrokenPipeError:
                    question = b""  # the program is gone, but may have left a last word
                answer = read_frame(answers, limits["output_bytes"], monotonic() + limits["test_timeout"])
                kind, *rest = decode(answer)
                if kind == "value":
                    (result,) = rest
                    return result
                if kind == "raise":
                    error, message = rest
                elif kind == "end":
                    finish(str(rest[0])[:200])
                else:
                    finish("malformed answer")
            except TimeoutError:
                finish("timeout")
            except EOFError:
                finish("the program ended")
            except (ValueError, TypeError, RecursionError, MemoryError) as problem:
                finish(f"not plain data: {problem}"[:200])
            raise RAISED.get(str(error), RuntimeError)(message)

        call.__name__ = name
        return call

    system_call_filter()()
    try:
        context, *codes = (Program(source) for source in ["\n".join(request["context"]), *checks])
        space = new_module("checks", {}).__dict__
        # What the data set defines is its own, and so are modules. Everything else it calls is the program's.
        names = set().union(*(code.names for code in (context, *codes)))
        space.update(provided_names(names.intersection(PROVIDED)))
        space.update({name: remote(name) for name in names if name not in space and not hasattr(builtins, name)})
        exec(context.code, space)
        if entry_point := request["entry_point"]:
            space[entry_point] = space["candidate"] = remote(entry_point)
    except BaseException as error:
        finish(f"the checks do not load: {type(error).__name__}")
    for code in codes:
        try:
            exec(code.code, space)
            passed += 1
        except BaseException as error:
            failure = failure or ("wrong answer" if isinstance(error, AssertionError) else type(error).__name__)
            if not request["all_checks"]:
                break
    finish(failure)


def main() -> None:
    """Reads the request and plays its role."""
    request = decode(sys.stdin.buffer.read())
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # as the module `site` would
    write_frame(1, b"ready")
    # A program may say which interpreter it is; the interpreter may not say anything about the runner's host.
    sys.argv[:] = [""]
    {"cases": run_cases, "program": serve_program, "checker": run_checker}[request["role"]](request)
    while True:  # to be killed: bubblewrap buries a child that was killed, but not always one that ended
        sleep(60)


if __name__ == "__main__":
    main()

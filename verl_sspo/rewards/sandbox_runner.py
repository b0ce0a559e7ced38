"""Runs inside the sandbox. Also holds the encoding that both sides use.

`sandbox.py` compiles this file and feeds it to a bare interpreter, so it imports nothing from the project and only
cheap modules: start-up is most of the cost of a short program. It reads one request from standard input and writes
frames to standard output. Three roles:

- `cases`: runs a program once per test, each in a fresh child process, and sends back what it printed or returned.
- `program`: loads a program and answers calls of its functions.
- `checker`: runs a data set's checks against functions that live in another sandbox, and sends the verdict.

The host trusts nothing that comes from here. A program that takes over its runner gains nothing: it could already
choose what it prints and returns.
"""

from __future__ import annotations

import builtins
import marshal
import os
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, MappingView
from itertools import islice
from time import monotonic, sleep
from types import CodeType, ModuleType
from typing import Any, NoReturn

# --- plain data --------------------------------------------------------------------------------------------------

# Deep enough for any test, far below the depth at which an interpreter would run out of stack.
MAX_DEPTH = 200
# Longer iterators are refused, endless ones long before memory runs out.
MAX_YIELDED = 1 << 20
# Longer integers are sent in base 16: it takes linear time, and Python's limit on digits does not apply.
LONG_BITS = 10_000
# tag: (type that is sent, what it becomes). Lists need no tag. Arrays, iterators and views do not become lists: in
# Python they never equal one.
COLLECTIONS: tuple[tuple[str, type, Callable[[list[Any]], Any]], ...] = (
    ("l", list, list),
    ("t", tuple, tuple),
    ("e", set, set),
    ("z", frozenset, frozenset),
    ("q", deque, deque),
    ("q", array, deque),
    # Reading these runs the program's code, in its own process.
    ("g", Iterator, iter),
    ("v", MappingView, lambda elements: dict(enumerate(elements)).values()),
)
DECODERS: dict[str, Callable[[list[Any]], Any]] = {tag: build for tag, _, build in COLLECTIONS} | {
    "c": lambda parts: complex(*parts),
    "d": dict,
    "r": lambda ends: range(*ends),
}


class NotPlainError(TypeError):
    """A value that cannot be encoded."""


def encode(value: Any) -> bytes:
    """Numbers, strings, bytes, lists, tuples, deques, arrays, ranges, dicts, sets and None as JSON with tags.

    Subclasses become their base type. Iterators and views of a dict are sent as the elements that they yield.

    Raises:
        NotPlainError: Anything else, nested deeper than `MAX_DEPTH`, or an iterator longer than `MAX_YIELDED`.
    """
    import json  # slower to import than all the rest, and most programs do not need it

    return json.dumps(_tagged(value, MAX_DEPTH)).encode()


def _tagged(value: Any, depth: int) -> Any:
    # Uses `type` and the base classes' own methods, so an object cannot lie about what it is or holds.
    kind = type(value)
    if not depth:
        raise NotPlainError("not plain data: nested too deeply")
    if value is None or kind is bool:
        return value
    if issubclass(kind, int):
        number = int.__pos__(value)
        return number if number.bit_length() <= LONG_BITS else {"i": f"{number:x}"}
    if issubclass(kind, float):
        return float.__pos__(value)
    if issubclass(kind, complex):
        return {"c": [complex.__pos__(value).real, complex.__pos__(value).imag]}
    if issubclass(kind, str):
        return str.__str__(value)
    if kind is bytes:
        return {"y": value.hex()}
    if kind is range:
        return {"r": [_tagged(end, depth - 1) for end in (value.start, value.stop, value.step)]}
    if issubclass(kind, dict):
        return {"d": [[_tagged(each, depth - 1) for each in item] for item in dict.items(value)]}
    for tag, base, _ in COLLECTIONS:
        if issubclass(kind, base):
            lazy = base in (Iterator, MappingView)
            elements = list(islice(value, MAX_YIELDED + 1) if lazy else base.__iter__(value))  # type: ignore[attr-defined]
            if lazy and len(elements) > MAX_YIELDED:
                raise NotPlainError(f"not plain data: more than {MAX_YIELDED} elements: {kind.__name__}")
            elements = [_tagged(element, depth - 1) for element in elements]
            return elements if tag == "l" else {tag: elements}
    raise NotPlainError(f"not plain data: {kind.__name__}")


class Pairs(list):
    """Keys and values of a dict that was not built."""


def decode(data: bytes, hashing: bool = True) -> Any:
    """The inverse of `encode`: new objects of the plain types, whatever the bytes contain.

    Args:
        data: What `encode` wrote, or anything.
        hashing: Build dicts, sets and the other types that JSON lacks. A program can choose numbers that make this
            take quadratic time: equal hashes, or the ends of a range. False gives `Pairs` for a dict and, except for
            tuples, bytes and complex numbers, an empty frozenset for the rest.

    Raises:
        ValueError: The bytes are not what `encode` writes.
    """
    import json

    try:
        return _untagged(json.loads(data), hashing)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"malformed: {error}") from error


def _untagged(value: Any, hashing: bool) -> Any:
    if isinstance(value, list):
        return [_untagged(each, hashing) for each in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "i":
        return int(content, 16)
    if tag == "y":
        return bytes.fromhex(content)
    elements = _untagged(content, hashing)
    if not isinstance(elements, list) or tag not in DECODERS:
        raise ValueError(tag)
    if hashing or tag in ("c", "t"):
        return DECODERS[tag](elements)
    return Pairs((key, item) for key, item in elements) if tag == "d" else frozenset()


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_frame(descriptor: int, data: bytes) -> None:
    """Writes a length of 8 hexadecimal digits and the data."""
    _write(descriptor, b"%08x" % len(data) + data)


def read_frame(descriptor: int, limit: int, deadline: float | None = None) -> bytes:
    """Reads what `write_frame` wrote.

    Raises:
        EOFError: The other side is gone.
        TimeoutError: `deadline` (monotonic clock) has passed.
        ValueError: The frame is longer than `limit` bytes, or not a frame.
    """
    size = int(_read_exactly(descriptor, 8, deadline), 16)
    if not 0 <= size <= limit:
        raise ValueError("frame too long")
    return _read_exactly(descriptor, size, deadline)


def _read_exactly(descriptor: int, size: int, deadline: float | None) -> bytes:
    parts = []
    while size:
        if deadline is not None and not readable(descriptor, deadline - monotonic()):
            raise TimeoutError
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def readable(descriptor: int, seconds: float) -> bool:
    """Waits until a descriptor can be read, or a process behind it has ended; False if that takes too long."""
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


# --- limits ------------------------------------------------------------------------------------------------------

OPEN_FILES = 64
STACK_BYTES = 120 << 20

# System calls that a single-process program does not need: new processes (RLIMIT_AS bounds one process, so a program
# gets only one), memory that RLIMIT_AS does not count (such as attributes of files in memory), sockets, and kernel
# interfaces known for holes. Name: number on x86_64, number on aarch64; None if there is none.
# fmt: off
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "socket": (41, 198), "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "open_by_handle_at": (304, 265), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
}
# fmt: on
# machine: (AUDIT_ARCH_*, place in FORBIDDEN, number of clone; clone3 is 435 on both)
ARCHITECTURES = {"x86_64": (0xC000003E, 0, 56), "aarch64": (0xC00000B7, 1, 220)}
CLONE3 = 435
CLONE_THREAD = 0x10000


def _filter_steps() -> bytes:
    """A seccomp program: threads may start, processes and what `FORBIDDEN` names may not."""
    audit, place, clone = ARCHITECTURES[os.uname().machine]
    load, equal, at_least, any_bit, result = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, missing, allow = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000  # KILL, EPERM, ENOSYS, ALLOW
    steps = [(load, 0, 0, 4), (equal, 1, 0, audit), (result, 0, 0, kill), (load, 0, 0, 0)]
    # The x32 interface of x86_64 numbers its calls from here; no other number is as high.
    steps += [(at_least, 0, 1, 0x40000000), (result, 0, 0, refuse)]
    # ENOSYS makes the C library fall back to clone, whose flags a filter can see.
    steps += [(equal, 0, 1, CLONE3), (result, 0, 0, missing)]
    for numbers in FORBIDDEN.values():
        if (number := numbers[place]) is not None:
            steps += [(equal, 0, 1, number), (result, 0, 0, refuse)]
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (result, 0, 0, refuse)]
    steps += [(result, 0, 0, allow)]
    return b"".join(
        code.to_bytes(2, sys.byteorder) + bytes((yes, no)) + value.to_bytes(4, sys.byteorder)
        for code, yes, no, value in steps
    )


def limit_resources(limits: dict[str, Any], seconds: float) -> None:
    """Limits the calling process and its children permanently; processor time to about `seconds` each."""
    import resource

    bounds = {
        resource.RLIMIT_CPU: int(seconds) + 2,
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
    # Recursion through `lru_cache` and the like uses the C stack, so the kernel reserves this much for it. The hard
    # limit stays: programs set the soft one themselves.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES if hard < 0 else min(STACK_BYTES, hard), hard))


def system_call_filter() -> Callable[[], None]:
    """Loads what the filter needs. The returned function applies it to the calling process, permanently."""
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

# What sites such as LeetCode provide, so that programs use it without importing: all names of the modules in STARRED,
# and the modules in MODULES themselves.
STARRED = ("math", "collections", "itertools", "functools", "heapq", "bisect", "copy", "typing")
MODULES = (*STARRED, "datetime", "json", "operator", "random", "re", "statistics", "string", "sys")


def global_names(source: str) -> set[str]:
    """The names that a program looks up in its globals or builtins and does not bind in its outermost scope.

    Raises:
        SyntaxError: As `compile`.
    """
    import symtable

    top = symtable.symtable(source, "<program>", "exec")
    used, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {each.get_name() for each in table.get_symbols() if each.is_global()}
    return used - {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}


def provided_names(names: set[str]) -> dict[str, Any]:
    """Those of the given names that are provided, see `MODULES`, with their values."""
    provided = {}
    for name in {name for name in names if name[0] != "_" and not hasattr(builtins, name)}:
        if name in MODULES:
            provided[name] = __import__(name)
        elif source := next((source for source in STARRED if hasattr(__import__(source), name)), None):
            provided[name] = getattr(sys.modules[source], name)
    return provided


def _compiled(source: str) -> tuple[CodeType, dict[str, Any]]:
    """The code of a program, and the provided names that it uses without importing.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: It does not compile.
    """
    return compile(source, "<program>", "exec", dont_inherit=True), provided_names(global_names(source))


def _new_module(name: str, space: dict[str, Any]) -> ModuleType:
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
        BaseException: Whatever they, or compiling them, raise.
    """
    module = _new_module(name, {})
    for source, before in zip(sources, ["", *sources], strict=False):
        try:
            code, provided = _compiled(source)
        except IndentationError:
            if not before:
                raise
            code, provided = _compiled(before + source)  # continues the source before it
        module.__dict__.update({key: value for key, value in provided.items() if key not in vars(module)})
        exec(code, module.__dict__)
    return module


def _use_descriptors(*descriptors: int | None) -> None:
    """Makes the given descriptors 0, 1, 2, ..., with /dev/null for None, and closes all others."""
    null = os.open("/dev/null", os.O_RDWR)
    aside = OPEN_FILES - len(descriptors)  # above every descriptor that this process has opened itself
    copies = [os.dup(null if descriptor is None else descriptor) for descriptor in descriptors]
    for place, descriptor in enumerate(copies):
        os.dup2(descriptor, aside + place)
    for place in range(len(descriptors)):
        os.dup2(aside + place, place)
    os.closerange(len(descriptors), 4096)


NOT_PLAIN = 3  # exit status: the function returned something that cannot be encoded


def _child(case: dict[str, Any], code: CodeType, provided: dict[str, Any], confine: Callable[[], None]) -> int:
    """One test, in its own process; returns the exit status."""
    stdin_file = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    stdout_file = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdin = sys.__stdin__ = stdin_file  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = stdout_file  # type: ignore[misc]
    call = "call" in case
    module = _new_module("solution" if call else "__main__", provided)
    confine()
    status = 0
    try:
        exec(code, module.__dict__)
        if call:
            name, arguments = case["call"]
            result = find_function(module, name)(*arguments)
            try:
                _write(3, encode(result))
            except NotPlainError:
                return NOT_PLAIN
            return 0
    except SystemExit as stop:
        status = 0 if stop.code in (None, 0) and not call else 1
    # As the interpreter does at the end of a program: wait for its threads, call its exit handlers, flush.
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    if sys.stdout is not None and not getattr(sys.stdout, "closed", False):
        sys.stdout.flush()
    module.__dict__.clear()  # flushes files that the program left open
    if not stdout_file.closed:
        stdout_file.flush()
    return status


def _memory_file(content: bytes, size: int = 0) -> int:
    """A file in memory with this content, at its start; it cannot grow beyond `size` bytes."""
    import fcntl

    file = os.memfd_create("file", os.MFD_ALLOW_SEALING)
    _write(file, content)
    os.lseek(file, 0, os.SEEK_SET)
    os.ftruncate(file, size or len(content))
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return file


def _run_case(
    case: dict[str, Any],
    code: CodeType,
    provided: dict[str, Any],
    confine: Callable[[], None],
    limits: dict[str, Any],
) -> tuple[str, bytes]:
    """Runs one test in a child; returns how it ended ("" if well) and at most `output_bytes` of its output.

    Input and output are files in memory, so no process has to feed or drain a pipe. The two processes share the file's
    position, which says how much the child has written.
    """
    # A write that does not fit fails for a whole page, so there is room for two more.
    stdin, out = _memory_file(case.get("stdin", b"")), _memory_file(b"", limits["output_bytes"] + 8192)
    child = os.fork()
    if not child:
        status = 1
        try:
            limit_resources(limits, limits["test_timeout"])
            _use_descriptors(*((None, None, None, out) if "call" in case else (stdin, out, None)))
            status = _child(case, code, provided, confine)
        finally:  # whatever the program raised
            os._exit(status)
    ended = os.pidfd_open(child)
    in_time = readable(ended, limits["test_timeout"])
    os.kill(child, 9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    written = os.lseek(out, 0, os.SEEK_CUR)
    output = os.pread(out, min(written, limits["output_bytes"]), 0)
    for descriptor in (stdin, out, ended):
        os.close(descriptor)
    if not in_time:
        return "timeout", output
    if written > limits["output_bytes"]:
        return "too much output", output
    return {0: "", NOT_PLAIN: "not plain data"}.get(status, "crash" if status < 0 else "exception"), output


def run_cases(request: dict[str, Any]) -> None:
    """Role `cases`: sends one frame per test, in order: how it ended, a null byte, its output."""
    limits = request["limits"]
    limit_resources(limits, limits["program_timeout"])
    try:
        code, provided = _compiled(request["program"])
    except Exception as problem:
        for _ in request["cases"]:
            write_frame(1, f"does not compile: {type(problem).__name__}\0".encode())
        return
    if any("call" in case for case in request["cases"]):
        encode(None)  # imports what encoding needs, once for all children
    confine = system_call_filter()
    for case in request["cases"]:
        error, output = _run_case(case, code, provided, confine, limits)
        write_frame(1, error.encode() + b"\0" + output)


def serve_program(request: dict[str, Any]) -> None:
    """Role `program`: answers calls `(name, arguments, keyword arguments)` until the checker has closed the pipe.

    Answers are `("value", result)`, `("raise", type, message)` or `("end", reason)`.
    """
    limits = request["limits"]
    _use_descriptors(None, None, None, request["calls"], request["answers"])
    calls, answers = 3, 4
    limit_resources(limits, limits["program_timeout"])
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
        except Exception as error:  # raised by the program's class `Solution`
            write_frame(answers, encode(("end", f"no function {name}: {type(error).__name__}")))
            continue
        try:
            answer = encode(("value", function(*arguments, **keywords)))
        except NotPlainError as error:
            answer = encode(("end", str(error)))
        except Exception as error:
            message = str(error.args[0])[:1000] if error.args and type(error.args[0]) is str else ""
            # The nearest type that the checker knows: a program's own exceptions derive from one.
            kind = next(each for each in type(error).__mro__ if each in RAISED.values())
            answer = encode(("raise", kind.__name__, message))
        except BaseException as error:
            answer = encode(("end", f"the function raised {type(error).__name__}"))
        write_frame(answers, answer)


# Exceptions that a check may see the program raise. Those that steer the interpreter are left out: StopIteration would
# end a loop over the answers as if all were there.
RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ArithmeticError, AssertionError, AttributeError, EOFError, Exception, IndexError, KeyError, LookupError),
        *(NameError, NotImplementedError, OSError, OverflowError, RecursionError, RuntimeError, TypeError),
        *(UnicodeError, ValueError, ZeroDivisionError),
    )
}


def run_checker(request: dict[str, Any]) -> None:
    """Role `checker`: sends `(passed, total, error)` once, when all checks are done or no more can run."""
    limits = request["limits"]
    _use_descriptors(None, None, None, 1, request["calls"], request["answers"])
    verdict, calls, answers = 3, 4, 5
    limit_resources(limits, limits["program_timeout"])
    checks: list[str] = request["checks"]
    passed, failure = 0, ""

    def finish(error: str) -> NoReturn:
        # Never returns: a check that catches every exception cannot continue after this.
        write_frame(verdict, encode((passed, len(checks), error)))
        while True:
            sleep(60)

    def ask(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        try:
            question = encode((name, arguments, keywords))
            try:
                write_frame(calls, question)
            except BrokenPipeError:
                question = b""  # the program is gone, but may have written a last message
            kind, *rest = decode(read_frame(answers, limits["output_bytes"], monotonic() + limits["test_timeout"]))
            if kind == "value":
                (result,) = rest
                return result
            if kind != "raise":
                finish(str(rest[0])[:200])
            error, message = rest
        except TimeoutError:
            finish("timeout")
        except EOFError:
            finish("the program ended")
        except NotPlainError as problem:
            finish(str(problem)[:200])
        except (ValueError, TypeError, IndexError, RecursionError, MemoryError):
            finish("malformed answer")
        raise RAISED.get(str(error), RuntimeError)(message)

    def remote(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            return ask(name, arguments, keywords)

        call.__name__ = name
        return call

    system_call_filter()()
    try:
        context = "\n".join(request["context"])
        names = {name for name in global_names("\n".join([context, *checks])) if not hasattr(builtins, name)}
        # Names that the data set defines are its own. So are those that Python provides, unless no other name is left
        # to test: `gcd` in `assert gcd(4, 6) == 2` is the program's, `isclose` in `assert isclose(f(1), 0.1)` is not.
        library = provided_names(names)
        tested = names - library.keys() or names.difference(MODULES)
        space = _new_module("checks", library | {name: remote(name) for name in tested}).__dict__
        exec(compile(context, "<checks>", "exec", dont_inherit=True), space)
        if entry_point := request["entry_point"]:
            space[entry_point] = space["candidate"] = remote(entry_point)
        codes = [compile(check, "<check>", "exec", dont_inherit=True) for check in checks]
    except BaseException as error:
        finish(f"the checks do not load: {type(error).__name__}")
    for code in codes:
        try:
            exec(code, space)
            passed += 1
        except BaseException as error:
            failure = failure or ("wrong answer" if isinstance(error, AssertionError) else type(error).__name__)
            if not request["all_checks"]:
                break
    finish(failure)


def main() -> None:
    """Reads the request and runs its role."""
    request = marshal.load(sys.stdin.buffer)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # as the module `site` would
    write_frame(1, b"ready")
    # A program may say which interpreter it is; the interpreter may not say anything about the runner's host.
    sys.argv[:] = [""]
    {"cases": run_cases, "program": serve_program, "checker": run_checker}[request["role"]](request)
    while True:  # until killed: bubblewrap reaps a child that was killed, but not always one that ended
        sleep(60)


if __name__ == "__main__":
    main()

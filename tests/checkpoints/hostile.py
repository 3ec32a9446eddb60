"""Hostile checkpoints, assembled by hand: every known way to make a loader run code, lie, or eat memory.

`hostile(canary)` yields (name, bytes). A payload, where there is one, would create the file `canary`.
Pickles are put together from opcodes, so that nothing here depends on what Python's own pickler would write.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C

# --- the assembler ---


def text(value: str, wide: bool = True) -> bytes:
    """BINUNICODE, or SHORT_BINUNICODE of protocol 4."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw if wide else b"\x8c" + bytes([len(raw)]) + raw


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def item(value: object) -> bytes:
    """Opcodes of a plain value; bytes are taken for opcodes."""
    if isinstance(value, bytes):
        return value
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return number(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, tuple):
        return b"(" + b"".join(map(item, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(item, value)) + b"e"
    assert isinstance(value, Mapping)
    return b"}(" + b"".join(item(key) + item(each) for key, each in value.items()) + b"u"


def name(module: str, function: str, stacked: bool = False) -> bytes:
    """GLOBAL, or STACK_GLOBAL of protocol 4."""
    if stacked:
        return text(module, wide=False) + text(function, wide=False) + b"\x93"
    return b"c" + module.encode() + b"\n" + function.encode() + b"\n"


def call(module: str, function: str, *arguments: object, stacked: bool = False) -> bytes:
    return name(module, function, stacked) + item(tuple(arguments)) + b"R"


def program(body: object, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + item(body) + b"."


HOOKS = name("collections", "OrderedDict") + b")R"
STORAGES = {4: "FloatStorage", 2: "HalfStorage", 8: "LongStorage", 1: "ByteStorage"}


def storage(
    key: object = "0", count: object = 4, kind: bytes | None = None, legacy: bool = False, view: object = None
) -> bytes:
    kind = name("torch", "FloatStorage") if kind is None else kind
    identifier: tuple[object, ...] = ("storage", kind, key, "cpu", count)
    return item((*identifier, view) if legacy else identifier) + b"Q"


def tensor(
    shape: object = (2, 2),
    stride: object = (2, 1),
    offset: object = 0,
    where: bytes | None = None,
    hooks: object = HOOKS,
) -> bytes:
    where = storage() if where is None else where
    return call("torch._utils", "_rebuild_tensor_v2", where, offset, shape, stride, False, hooks)


# --- the containers ---


@dataclass
class Member:
    """One member of a zip file, with every field that can lie."""

    name: str
    content: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None  # what the directory says
    local_size: int | None = None
    local_name: str | None = None
    offset: int | None = None
    checksum: int | None = None
    central_extra: bytes = b""


@dataclass
class Zip:
    """Writes a zip file without a thought about whether it is sound."""

    members: list[Member] = field(default_factory=list)
    comment: bytes = b""
    tail: bytes = b""
    count: int | None = None
    directory_offset: int | None = None
    directory_size: int | None = None

    def build(self) -> bytes:
        body, central = bytearray(), bytearray()
        for each in self.members:
            at = len(body) if each.offset is None else each.offset
            packed = each.content
            if each.method == 8:
                squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
                packed = squeeze.compress(each.content) + squeeze.flush()
            checksum = zlib.crc32(each.content) if each.checksum is None else each.checksum
            size = len(each.content) if each.size is None else each.size
            length = len(packed) if each.size is None else each.size
            local = size if each.local_size is None else each.local_size
            there = (each.name if each.local_name is None else each.local_name).encode(
                "utf-8", "surrogateescape"
            )
            raw = each.name.encode("utf-8", "surrogateescape")
            local_packed = length if each.local_size is None else local
            body += struct.pack(
                "<4s5H3L2H", b"PK\3\4", 20, each.flags, each.method, 0, 0, checksum, local_packed, local,
                len(there), 0,
            ) + there + packed  # fmt: skip
            central += struct.pack(
                "<4s6H3L5H2L", b"PK\1\2", 20, 20, each.flags, each.method, 0, 0, checksum, length, size,
                len(raw), len(each.central_extra), 0, 0, 0, 0, at,
            ) + raw + each.central_extra  # fmt: skip
        count = len(self.members) if self.count is None else self.count
        size = len(central) if self.directory_size is None else self.directory_size
        offset = len(body) if self.directory_offset is None else self.directory_offset
        count &= 0xFFFF
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, offset, len(self.comment))
        return bytes(body + central + end) + self.comment + self.tail


FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def archive(pickled: bytes, *more: Member, storages: Mapping[str, bytes] | None = None) -> Zip:
    storages = {"0": FLOATS} if storages is None else storages
    return Zip([
        Member("archive/data.pkl", pickled),
        *(Member(f"archive/data/{key}", content) for key, content in storages.items()),
        Member("archive/version", b"3\n"),
        *more,
    ])  # fmt: skip


def zipped(body: object, protocol: int = 2) -> bytes:
    """A torch zip file of this pickle, with one storage of four floats."""
    return archive(program(body, protocol)).build()


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def legacy(
    body: object, protocol: int = 2, *, system: object = SYSTEM, keys: object = ("0",), magic: object = MAGIC,
    version: object = 1001, data: bytes | None = None,
) -> bytes:  # fmt: skip
    """A legacy file of this pickle, with one storage of four floats."""
    keys = list(keys) if isinstance(keys, tuple) else keys
    data = struct.pack("<q", 4) + FLOATS if data is None else data
    return b"".join(program(part, protocol) for part in (magic, version, system, body, keys)) + data


def state(value: bytes, **more: object) -> dict[str, object]:
    """A state dict with a sound tensor, and `value` beside it."""
    return {"sound": tensor(), "other": value, **more}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- code ---

SHELL = "shell command"  # stands for the command; CODE for Python source that runs it
CODE = "python code"
SINKS: tuple[tuple[Any, ...], ...] = (
    ("os", "system", SHELL), ("posix", "system", SHELL), ("nt", "system", SHELL), ("os", "popen", SHELL),
    ("os", "execlp", "sh", "sh", "-c", SHELL), ("os", "execvp", "sh", ["sh", "-c", SHELL]),
    ("os", "spawnlp", 0, "sh", "sh", "-c", SHELL),
    ("posix", "posix_spawn", "/bin/sh", ["sh", "-c", SHELL], {}), ("os", "remove", "x"),
    ("os", "rename", "x", "y"), ("os", "putenv", "LD_PRELOAD", "x"), ("os", "fork"), ("os", "_exit", 0),
    ("os", "kill", 1, 9), ("os", "abort"), ("os", "chdir", "/"), ("subprocess", "Popen", ["sh", "-c", SHELL]),
    ("subprocess", "call", ["sh", "-c", SHELL]), ("subprocess", "run", ["sh", "-c", SHELL]),
    ("subprocess", "check_call", ["sh", "-c", SHELL]), ("subprocess", "check_output", ["sh", "-c", SHELL]),
    ("subprocess", "getoutput", SHELL), ("subprocess", "getstatusoutput", SHELL),
    ("commands", "getoutput", SHELL), ("popen2", "popen2", SHELL), ("builtins", "eval", CODE),
    ("builtins", "exec", CODE), ("builtins", "compile", CODE, "x", "exec"), ("builtins", "__import__", "os"),
    ("builtins", "getattr", name("torch", "FloatStorage"), "mro"),
    ("builtins", "setattr", name("torch", "FloatStorage"), "x", 1), ("builtins", "open", "canary", "w"),
    ("builtins", "delattr", name("torch", "FloatStorage"), "x"), ("builtins", "input"),
    ("builtins", "breakpoint"), ("builtins", "type", "X", (), {}), ("builtins", "globals"),
    ("builtins", "vars"), ("builtins", "map"), ("builtins", "apply", "x"), ("builtins", "print", "x"),
    ("builtins", "memoryview", "x"), ("builtins", "Exception", "x"), ("builtins", "exit"),
    ("builtins", "help"), ("builtins", "super"), ("__builtin__", "eval", CODE), ("__builtin__", "exec", CODE),
    ("__builtin__", "execfile", "x.py"), ("__builtin__", "file", "canary", "w"),
    ("__builtin__", "getattr", "a", "b"), ("__builtin__", "reload", "os"), ("exec", "exec", CODE),
    ("io", "open", "canary", "w"), ("_io", "FileIO", "canary", "w"), ("io", "FileIO", "c", "w"),
    ("codecs", "open", "canary", "w"), ("shutil", "rmtree", "x"), ("shutil", "copy", "x", "y"),
    ("shutil", "move", "x"), ("tempfile", "mkstemp"), ("pathlib", "Path.touch", "x"),
    ("pathlib", "os.system", SHELL), ("glob", "glob", "*"), ("importlib", "import_module", "os"),
    ("importlib", "__import__", "os"), ("imp", "load_source", "x", "x.py"),
    ("importlib._bootstrap", "_call_with_frames_removed", "x"),
    ("importlib.util", "spec_from_file_location", "x"), ("runpy", "run_path", "x.py"),
    ("runpy", "run_module", "x"), ("runpy", "_run_code", CODE, {}), ("pkgutil", "resolve_name", "os:system"),
    ("pty", "spawn", ["sh", "-c", SHELL]), ("webbrowser", "open", "http://x"),
    ("code", "InteractiveInterpreter"), ("codeop", "compile_command", CODE), ("timeit", "timeit", CODE),
    ("timeit", "repeat", CODE), ("cProfile", "run", CODE), ("profile", "run", CODE), ("pdb", "run", CODE),
    ("bdb", "Bdb"), ("trace", "Trace"), ("doctest", "debug_script", CODE), ("pydoc", "pipepager", "x", SHELL),
    ("pydoc", "safeimport", "os"), ("ctypes", "CDLL", "libc.so.6"),
    ("ctypes", "cdll.LoadLibrary", "libc.so.6"), ("_ctypes", "dlopen", "x"),
    ("_posixsubprocess", "fork_exec"), ("multiprocessing.util", "spawnv_passfds", "sh"),
    ("multiprocessing", "Process"), ("concurrent.futures", "ThreadPoolExecutor"), ("threading", "Thread"),
    ("_thread", "start_new_thread", "x"), ("asyncio", "run", "x"),
    ("asyncio.subprocess", "create_subprocess_shell", SHELL),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start", "x"),
    ("socket", "create_connection", ("x", 1)), ("socket", "socket"),
    ("urllib.request", "urlopen", "http://x"), ("urllib.request", "urlretrieve", "http://x"),
    ("http.client", "HTTPConnection", "x"), ("ftplib", "FTP", "x"), ("smtplib", "SMTP", "x"),
    ("telnetlib", "Telnet", "x"), ("ssl", "get_server_certificate", ("x", 1)),
    ("imaplib", "IMAP4_stream", SHELL), ("xmlrpc.client", "ServerProxy", "x"),
    ("socketserver", "TCPServer", "x"), ("logging.config", "listen"), ("logging", "FileHandler", "canary"),
    ("uuid", "_get_command_stdout", "sh"), ("platform", "popen", SHELL), ("venv", "create", "x"),
    ("ensurepip", "bootstrap"), ("distutils.spawn", "spawn", ["sh"]),
    ("distutils.file_util", "write_file", "canary", ["x"]), ("zipfile", "ZipFile", "x"),
    ("tarfile", "open", "x"), ("sqlite3", "connect", "canary"), ("dbm", "open", "canary", "c"),
    ("shelve", "open", "canary"), ("pickle", "loads", "x"), ("_pickle", "loads", "x"),
    ("cPickle", "loads", "x"), ("pickle", "Unpickler", "x"), ("marshal", "loads", "x"), ("types", "CodeType"),
    ("types", "FunctionType"), ("types", "ModuleType", "x"),
    ("functools", "partial", name("os", "system"), SHELL), ("functools", "reduce"),
    ("operator", "attrgetter", "system"), ("operator", "methodcaller", "system", SHELL),
    ("operator", "itemgetter", 0), ("operator", "getitem", {}, "x"), ("itertools", "starmap"),
    ("collections", "namedtuple", "X", "y"), ("collections", "UserDict"), ("copyreg", "pickle"),
    ("copyreg", "add_extension", "os", "system", 1), ("copyreg", "__newobj__"),
    ("copy_reg", "dispatch_table"), ("sys", "exit", 0), ("sys", "setrecursionlimit", 10), ("sys", "modules"),
    ("sys", "settrace"), ("gc", "get_objects"), ("inspect", "getsource"), ("signal", "alarm", 1),
    ("atexit", "register"), ("weakref", "finalize"), ("site", "main"), ("sysconfig", "_main"),
    ("linecache", "getlines", "x"), ("fileinput", "input", "x"), ("mmap", "mmap", 0, 1),
    ("fcntl", "fcntl", 0), ("resource", "setrlimit", 0, (0, 0)), ("readline", "read_history_file", "x"),
    ("cgitb", "enable"), ("this", "s"), ("antigravity", "fly"), ("turtle", "Turtle"), ("tkinter", "Tk"),
    ("idlelib.run", "main"), ("lib2to3.main", "x"),
    ("test.support.script_helper", "assert_python_ok", "-c", CODE), ("unittest.mock", "patch", "x"),
    ("unittest", "main"), ("wsgiref.simple_server", "make_server"), ("json", "load"), ("enum", "EnumMeta"),
    ("abc", "ABCMeta"), ("re", "compile", "x"), ("string", "Formatter"), ("contextlib", "ExitStack"),
    ("dataclasses", "make_dataclass", "X", []), ("typing", "get_type_hints"), ("typing", "_eval_type"),
    ("argparse", "FileType", "w"), ("datetime", "sys.exit"), ("decimal", "getcontext"),
    ("types", "os.system", SHELL), ("_codecs", "lookup", "x"), ("_codecs", "encode", CODE, "rot13"),
    ("_codecs", "decode", "x", "hex"), ("torch", "load", "x.pt"), ("torch.serialization", "load", "x.pt"),
    ("torch", "save", "x", "canary"), ("torch", "ops"), ("torch.hub", "load", "x/y", "z"),
    ("torch", "hub.load", "x/y", "z"), ("torch.hub", "download_url_to_file", "x", "canary"),
    ("torch.hub", "load_state_dict_from_url", "http://x"), ("torch.jit", "load", "x"),
    ("torch.jit", "script", "x"), ("torch", "compile"), ("torch.storage", "_load_from_bytes", "x"),
    ("torch", "from_file", "/etc/passwd", False, 10),
    ("torch", "UntypedStorage.from_file", "/etc/passwd", False, 10),
    ("torch.utils.cpp_extension", "load_inline", "x", CODE), ("torch.utils.cpp_extension", "load", "x", "y"),
    ("torch.utils.data.datapipes.utils.decoder", "basichandlers", "pkl", "x"),
    ("torch.utils.data", "os.system", SHELL), ("torch.utils.model_zoo", "load_url", "http://x"),
    ("torch.package", "PackageImporter", "x"), ("torch._utils", "_import_dotted_name", "os.system"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", "x"), ("torch._utils", "_rebuild_qtensor", "x"),
    ("torch._utils", "_rebuild_wrapper_subclass", "x"), ("torch._utils", "sys.exit"),
    ("torch._dynamo", "optimize"), ("torch._inductor.codecache", "PyCodeCache.load", CODE),
    ("torch.fx.graph_module", "_forward_from_src", CODE), ("torch.fx._symbolic_trace", "Tracer"),
    ("torch.distributed.rpc.internal", "_run_function", "x"), ("torch.onnx", "export", "x"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename", "x"),
    ("torch.multiprocessing", "spawn", "x"), ("torch._C", "_jit_set_profiling_mode"),
    ("torch.classes", "load_library", "x.so"), ("torch.ops", "load_library", "x.so"),
    ("torch.autograd.profiler", "profile"),
    ("torch._tensor", "_rebuild_from_type_v2", name("torch", "Tensor"), 1, 2, 3),
    ("torch.optim", "os.system", SHELL), ("torch.nn.modules.module", "_global_forward_hooks"),
    ("torch.nn.functional", "sys.exit"), ("torch.nn.functional", "relu", "x"), ("torch", "float32", "x"),
    ("torch", "FloatStorage", 10**12), ("torch", "empty", 10**12), ("torch", "randn", 10**12),
    ("numpy", "load", "x.npy"), ("numpy", "save", "canary", "x"), ("numpy", "fromfile", "/etc/passwd"),
    ("numpy", "memmap", "canary"), ("numpy.testing._private.utils", "runstring", CODE, {}),
    ("numpy.testing", "rundocs", "x"), ("numpy.f2py.crackfortran", "myeval", CODE),
    ("numpy.f2py.crackfortran", "param_eval", CODE), ("numpy.f2py", "compile", CODE),
    ("numpy.lib.npyio", "DataSource"), ("numpy", "zeros", 10**12),
    ("numpy.distutils.exec_command", "exec_command", SHELL), ("numpy.core.multiarray", "fromfile", "x"),
    ("numpy.ctypeslib", "load_library", "x"), ("pip", "main", ["install", "x"]),
    ("pip._internal", "main", ["install", "x"]), ("setuptools.sandbox", "run_setup", "x"),
    ("pkg_resources", "load_entry_point", "x"), ("IPython", "embed"), ("dill", "loads", "x"),
    ("dill._dill", "_create_type", "x"), ("cloudpickle", "loads", "x"),
    ("cloudpickle.cloudpickle", "_make_function", "x"), ("joblib", "load", "x"),
    ("yaml", "unsafe_load", CODE), ("pandas", "read_pickle", "x"), ("pandas", "eval", CODE),
    ("sympy", "sympify", CODE), ("tensorflow.io", "read_file", "x"), ("keras.models", "load_model", "x"),
    ("paramiko", "ProxyCommand", SHELL), ("pexpect", "run", SHELL), ("sh", "Command", "sh"),
    ("plumbum", "local"), ("fabric", "Connection", "x"), ("requests", "get", "http://x"),
    ("psutil", "Popen", ["sh"]), ("sfumato", "load", "x"), ("transformers", "pipeline", "x"),
    ("transformers.dynamic_module_utils", "get_class_from_dynamic_module", "x"),
    ("diffusers", "load_image", "x"), ("omegaconf", "os.system", SHELL),
    ("pytorch_lightning", "seed_everything", 1), ("pytorch_lightning.utilities.cloud_io", "load", "x"),
    ("ldm.util", "instantiate_from_config", {"target": "os.system"}), ("__main__", "main"),
    ("__main__", "os.system", SHELL), ("evil", "Evil", SHELL), ("evil", "run", SHELL),
    ("evil.deep", "Outer.Inner", SHELL), ("os.path", "os.system", SHELL), ("ntpath", "genericpath", "x"),
    ("usercustomize", "x"), ("sitecustomize", "X"), ("torch.nn..", "X"), (".os", "system", SHELL),
    ("os\0", "system", SHELL), ("o s", "system", SHELL), ("\u1d52s", "system", SHELL),
    ("os", "sys\u200btem", SHELL), ("os", "", SHELL), ("", "system", SHELL), ("x" * 201, "X"),
    ("x", "X" * 300),
)  # fmt: skip
CORE = (
    "os:system", "posix:system", "subprocess:Popen", "builtins:eval", "builtins:exec", "runpy:_run_code",
    "pty:spawn", "torch:load", "torch.hub:load", "builtins:getattr", "importlib:import_module", "evil:Evil",
)  # fmt: skip


def _filled(value: object, canary: str) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(each, canary) for each in value)
    code = f"open({canary!r}, 'w').close()"
    return (
        {SHELL: f"touch {canary}", CODE: code, "canary": canary}.get(value, value)
        if isinstance(value, str)
        else value
    )


def _code(canary: str) -> Iterator[tuple[str, bytes]]:
    for module, function, *raw in SINKS:
        sink, arguments = f"{module}:{function}"[:60], tuple(_filled(each, canary) for each in raw)
        plain = "\n" not in module + function and module.isascii() and function.isascii()
        if plain:
            yield f"zip, GLOBAL {sink}", zipped(state(call(module, function, *arguments)))
        stacked = len(module + function) < 200
        yield (
            f"legacy, STACK_GLOBAL {sink}",
            legacy(state(call(module, function, *arguments, stacked=stacked)), 4),
        )
        if sink in CORE:
            yield from _spellings(sink, module, function, arguments)


def _spellings(
    sink: str, module: str, function: str, arguments: tuple[object, ...]
) -> Iterator[tuple[str, bytes]]:
    g, a, opcodes = name(module, function), item(arguments), b"".join(map(item, arguments))
    called = g + a + b"R"
    inst = b"(" + opcodes + b"i" + g[1:]
    typed, kind = ("torch._tensor", "_rebuild_from_type_v2"), name("torch", "Tensor")
    ways: dict[str, object] = {
        "alone": called, "as the key of a dictionary": {called: 1, "sound": tensor()},
        "as a value of the state dict": {"state_dict": state(called)},
        "beside the state dict": {"state_dict": {"sound": tensor()}, "callbacks": called},
        "deep in lists": state(b"](" * 5 + called + b"e" * 5),
        "thrown away": called + b"0" + item({"sound": tensor()}),
        "by the memo": g + b"q\x05" + b"0" + item(state(b"h\x05" + a + b"R")),
        "by MEMOIZE": g + b"\x94" + b"0" + item(state(b"h\x00" + a + b"R")), "INST": state(inst),
        "OBJ": state(b"(" + g + opcodes + b"o"), "in a tensor's hooks": {"sound": tensor(hooks=called)},
        "as a tensor's shape": {"sound": tensor(shape=called)},
        "as a tensor's storage": {"sound": tensor(where=called)},
        "as a storage's class": {"sound": tensor(where=storage(kind=g))},
        "as a storage's key": {"sound": tensor(where=storage(key=called))},
        "as the persistent id": state(called + b"Q"),
        "as a module's id": state(item(("module", called, "x.py", "source")) + b"Q"),
        "as the type of a tensor subclass": state(call(*typed, g, kind, arguments, {})),
        "as a defaultdict's factory called": state(call("collections", "defaultdict", called)),
        "as items of an OrderedDict": state(call("collections", "OrderedDict", [("a", called)])),
        "by _reconstructor": state(call("copyreg", "_reconstructor", called, kind, None)),
        "inside a tensor of a subclass": state(call(*typed, name(*typed), kind, (g, kind, arguments, 1), 2)),
        "by POP and MARK": b"(" + called + b"1" + item({"sound": tensor()}),
        "calling what was called": state(called + b")R"),
        "making an object of what was called": state(called + b")\x81"),
        "with BUILD on the name": state(g + item({"__setstate__": name("os", "system")}) + b"b"),
        "with BUILD on the result": state(called + item({"x": 1}) + b"b"),
    }  # fmt: skip
    if sink != "evil:Evil":  # of an unknown root a class may be mentioned and made
        ways["only mentioned"] = state(g)
        ways["NEWOBJ"] = state(g + a + b"\x81")
        ways["NEWOBJ_EX"] = state(g + a + item({}) + b"\x92")
        ways["NEWOBJ and BUILD"] = state(g + b")\x81" + item({"__dict__": 1}) + b"b")
        ways["as the class of a module"] = state(item(("module", g, "x.py", "source")) + b"Q")
        ways["as a defaultdict's factory"] = state(call("collections", "defaultdict", g))
    for way, body in ways.items():
        yield f"zip, {sink} {way}", zipped(body)
        if sink in CORE[:4]:
            yield f"legacy, {sink} {way}", legacy(body, 3)
    for part in ("system", "keys", "magic", "version"):
        changed: dict[str, Any] = {part: called}
        yield f"legacy, {sink} in its {part}", legacy({"sound": tensor()}, **changed)


class _Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self.command,)


class _Stateful(_Payload):
    """The command hides in the state of a dict's subclass."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), {"x": _Payload(self.command)}


def _pickled(canary: str) -> Iterator[tuple[str, bytes]]:
    """What Python's own pickler writes for an object with `__reduce__`."""
    for kind in (_Payload, _Stateful):
        for protocol in range(6):
            raw = pickle.dumps(kind(f"touch {canary}"), protocol)
            label = f"{kind.__name__[1:]} of protocol {protocol}"
            yield f"pickle, {label}", raw
            yield f"zip, {label}", archive(raw).build()
            head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, SYSTEM))
            yield f"legacy, {label}", head + raw + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + FLOATS
            yield (
                f"pickle in a dictionary, {label}",
                pickle.dumps({"state_dict": {"a": kind("true " + canary)}}, protocol),
            )


# --- the machine ---


def _machine() -> Iterator[tuple[str, bytes]]:
    opcodes = {
        "EXT1": b"\x82\x01", "EXT2": b"\x83\x01\x00", "EXT4": b"\x84\x01\0\0\0", "PERSID": b"Pstorage\n",
        "NEXT_BUFFER": b"\x97", "READONLY_BUFFER": b"N\x98", "INT": b"I1\n", "LONG": b"L1L\n",
        "FLOAT": b"F1.0\n", "STRING": b"S'os'\n", "UNICODE": b"Vos\n", "GET": b"g0\n", "PUT": b"Np0\n",
        "DICT": b"(d", "LIST": b"(l", "DUP": b"N2", "INST": b"(iargparse\nNamespace\n",
        "OBJ": b"(cargparse\nNamespace\no", "LONG4": b"\x8b\x01\0\0\0\x01", "unassigned 255": b"\xff",
        "unassigned 0": b"\0", "a second PROTO": b"\x80\x02",
    }  # fmt: skip
    for what, code in opcodes.items():
        for how, build in (("zip", zipped), ("legacy", legacy)):
            yield f"{how}, opcode {what}", build(state(code))
    big = {
        "LONG4 of 2 GiB": b"\x8b" + struct.pack("<i", 2**31 - 1),
        "LONG4 of -1": b"\x8b" + struct.pack("<i", -1), "BINUNICODE of 4 GiB": b"X" + b"\xff" * 4,
        "BINUNICODE8 of 2^63": b"\x8d" + struct.pack("<Q", 2**63), "BINBYTES of 4 GiB": b"B" + b"\xff" * 4,
        "BINBYTES8 of 2^62": b"\x8e" + struct.pack("<Q", 2**62),
        "BYTEARRAY8 of 2^62": b"\x96" + struct.pack("<Q", 2**62), "BINSTRING of 4 GiB": b"T" + b"\xff" * 4,
        "FRAME of 2^62": b"\x95" + struct.pack("<Q", 2**62), "text of 2 MiB": text("a" * 2**21),
        "bytes of 2 MiB": b"B" + struct.pack("<I", 2**21) + bytes(2**21),
        "text of bad UTF-8": b"X\x02\0\0\0\xff\xfe", "memo index of 2^32 alone": b"j\xff\xff\xff\xff",
        "memo never stored": b"h\x63", "a lone MARK": b"(", "TUPLE without a mark": b"t",
        "POP of nothing": b"0" * 9, "APPEND to a number": b"K\1Na", "SETITEM on a list": b"]NNs",
        "SETITEM on nothing": b"s", "SETITEMS of three": b"}(NNNu", "BUILD on a list": b"]}b",
        "BUILD on a number": b"K\1}b", "BUILD on a tuple": b")}b", "APPENDS to a dictionary": b"}(Ne",
        "REDUCE of numbers": b"K\1)R", "REDUCE with a list": name("collections", "OrderedDict") + b"]R",
        "STACK_GLOBAL of numbers": b"K\1K\2\x93", "STACK_GLOBAL of bytes": b"C\2osC\6system\x93",
        "NEWOBJ of a text": text("os") + b")\x81", "GLOBAL without an end": b"cos", "two results": b"NN",
        "a lying frame": b"\x95" + struct.pack("<Q", 10**6),
        "BUILD on a class": name("torch.nn", "Module") + b"}b",
        "SETITEMS on a class": name("torch.nn", "Module") + b"(NNu",
        "APPENDS to a class": name("torch.nn", "Module") + b"(Ne", "a call of a tensor": tensor() + b")R",
        "pairs that are none": call("collections", "OrderedDict", [1, 2, 3]),
    }  # fmt: skip
    for what, code in big.items():
        for how, build in (("zip", zipped), ("legacy", legacy)):
            yield f"{how}, {what}", build(state(code), 4)
    yield from _tables()


def _floods() -> Iterator[tuple[str, bytes]]:
    """Pickles that are sound but for their size; megabytes each."""
    sound = item({"sound": tensor()})
    memo = b"".join(b"r" + struct.pack("<I", index) for index in range(600_000))
    floods = {
        "NONE": b"(" + b"N" * 3_000_000 + b"t", "POP": b"N0" * 3_000_000,
        "EMPTY_LIST": b"(" + b"]" * 3_000_000 + b"t", "EMPTY_DICT": b"(" + b"}" * 3_000_000 + b"t",
        "MARK": b"(" * 3_000_000, "nested lists": b"](" * 300_000, "TUPLE1": b"N" + b"\x85" * 3_000_000,
        "memo": b"N" + memo, "MEMOIZE": b"N" + b"\x94" * 3_000_000, "SETITEM": b"}" + b"NNs" * 1_500_000,
        "APPEND": b"]" + b"Na" * 3_000_000, "floats": b"(" + (b"G" + bytes(8)) * 1_500_000 + b"t",
        "objects": name("argparse", "Namespace") + b"q\0" + b"h\0)\x81" * 1_000_000,
        "calls": name("collections", "OrderedDict") + b"q\0" + b"h\0)R0" * 900_000,
        "names": b"".join(name("evil", f"Name{index}") + b"0" for index in range(200_000)),
        "frames": b"\x95\0\0\0\0\0\0\0\0" * 1_500_000,
        "encode": text("a" * 2**20) + b"q\1" + name("_codecs", "encode") + b"q\2" + text("latin1") + b"q\3"
        + b"h\2h\1h\3\x86R0" * 400_000,
        "rare letters": b"(" + text("\U0001f600" + "a" * (2**20 - 9)) * 15 + b"t",
        "pairs": b"](" + b"NN\x86" * 300_000 + b"eq\1" + name("collections", "OrderedDict") + b"q\2"
        + b"h\2h\1\x85R0" * 100_000,
        "sets": b"\x8f" + b"(N\x90" * 1_000_000, "equal keys": b"}(" + (text("a") + b"N") * 300_000 + b"u",
        "numpy scalars": name( "numpy", "dtype") + b"q\0" + b"h\0)R0" * 900_000,
        "persistent ids": storage() + b"0" + storage() * 120_000,
        "states": name("argparse", "Namespace") + b")\x81" + b"}b" * 2_000_000,
    }  # fmt: skip
    for what, code in floods.items():  # between MARK and POP_MARK, which drops it
        yield f"zip, flood of {what}", zipped(b"(" + code + b"1" + sound)
        yield f"legacy, flood of {what}", legacy(b"(" + code + b"1" + sound, 4)
    long = (text("a" * 2**20) + b"0") * 17 + sound
    yield "zip, a pickle of 17 MiB", zipped(long)
    yield "legacy, a pickle of 17 MiB", legacy(long)


def _tables() -> Iterator[tuple[str, bytes]]:
    """Dictionaries that are walked through: deep, wide, in themselves, exponential."""
    deep = b"".join(b"}" + text("d") for _ in range(100)) + tensor() + b"s" * 100
    exponential = b"}q\0" + item("x") + tensor() + b"s"
    for level in range(30):
        index = bytes([level])
        exponential += (
            b"0}q" + bytes([level + 1]) + b"(" + text("a") + b"h" + index + text("b") + b"h" + index + b"u"
        )
    same = b"}q\0" + text("x") + tensor() + b"s" + text("self") + b"h\0s"
    long_key = text("k" * 1_000_000) + b"q\1" + b"0" + b"}q\2(" + b"h\1" + tensor() + b"u0" + b"}("
    long_key += b"".join(text(str(index)) + b"h\2" for index in range(1000)) + b"u"
    again = [text(f"t{index}") + b"h\1" for index in range(30_000)]
    empties = [text(f"t{index}") + tensor((0,), (1,)) for index in range(5000)]
    whole = tensor((250_000,), (1,), where=storage(count=250_000)) + b"q\1"
    shared = b"".join((tensor(), b"q\1", b"0", b"}(", *again, b"u"))
    bodies: dict[str, object] = {
        "nested 100 deep": deep, "doubled 30 times": exponential, "containing itself": same,
        "with a key of a million letters": long_key, "of 30,000 names for one tensor": shared,
        "with two tensors of one name": b"}(" + (text("a") + tensor()) * 2 + b"u",
        "with one dotted name twice": {"a": {"b": tensor()}, "a.b": tensor()},
        "with a NUL in a name": {"a\0b": tensor()},
        "with an escape sequence in a name": {"\x1b[2Ja": tensor()},
        "with a line end in a name": {"a\nb": tensor()}, "with an empty name": {"": tensor()},
        "with a name written backwards": {"\u202egnp.exe": tensor()},
        "with a name of 2,000 letters": {"a" * 2000: tensor()}, "of nothing": {}, "of numbers": {"a": 1},
        "with an empty state dict": {"state_dict": {}}, "of a tensor alone": tensor(),
        "of a list": [tensor()], "of a text": "hello",
        "of a model": name("torch.nn", "Module") + b")\x81" + item({"w": tensor()}) + b"b",
        "with 5,000 empty tensors": b"}(" + b"".join(empties) + b"u",
        "with three gigabytes of views": b"}(" + text("t") + whole + b"".join(again[:3000]) + b"u",
    }  # fmt: skip
    large = {"0": bytes(1_000_000)}
    for what, body in bodies.items():
        big = "gigabytes" in what
        yield f"zip, a table {what}", archive(program(body), storages=large if big else None).build()
        if not big:
            yield f"legacy, a table {what}", legacy(body)


# --- tensors that are not there ---


def _views() -> Iterator[tuple[str, bytes]]:
    huge = 2**62
    shapes: dict[str, tuple[object, object, object]] = {
        "beyond its storage": ((5,), (1,), 0), "offset beyond its storage": ((1,), (1,), 4),
        "offset and shape beyond": ((2, 2), (2, 1), 1), "stride beyond its storage": ((2,), (4,), 0),
        "negative offset": ((2,), (1,), -1), "negative stride": ((2,), (-1,), 1),
        "negative shape": ((-2,), (1,), 0), "two negative sides": ((-2, -2), (1, 1), 0),
        "expanded to a terabyte": ((2**20, 2**20), (0, 0), 0), "expanded a little": ((5,), (0,), 0),
        "huge side": ((huge,), (1,), 0), "overflowing shape": ((huge, huge), (1, 1), 0),
        "overflowing to zero": ((2**32, 2**32), (0, 0), 0), "overflowing stride": ((2, 2), (2**63, 1), 0),
        "overflowing offset": ((1,), (1,), 2**63), "wrapping stride": ((2,), (2**64 - 1,), 1),
        "empty and huge": ((0, huge), (1, 1), 0), "rank 9": ((1,) * 9, (1,) * 9, 0),
        "rank 3000": ((1,) * 3000, (1,) * 3000, 0), "shape longer than stride": ((2, 2), (1,), 0),
        "stride longer than shape": ((2,), (1, 1), 0), "shape of floats": ((2.0,), (1,), 0),
        "shape of texts": (("2",), (1,), 0), "shape of None": (None, (1,), 0),
        "shape of booleans": ((True,), (1,), 0), "shape a number": (4, 1, 0),
        "offset a text": ((1,), (1,), "0"), "offset None": ((1,), (1,), None),
        "shape of tables": (({},), (1,), 0),
        "integers of 255 bytes": ((b"\x8a\xff" + b"\x7f" * 255,), (1,), 0), "shape a text": ("22", "21", 0),
        "offset true": ((1,), (1,), True),
    }  # fmt: skip
    for what, (shape, stride, offset) in shapes.items():
        yield f"zip, tensor {what}", zipped({"t": tensor(shape, stride, offset)})
        yield f"legacy, tensor {what}", legacy({"t": tensor(shape, stride, offset, storage(legacy=True))})
    floats, raw = name("torch", "FloatStorage"), name("torch.storage", "UntypedStorage")
    stores: dict[str, bytes] = {
        "that says more than it has": storage(count=1000), "that says less than it has": storage(count=1),
        "of a missing key": storage("7"), "of a key with a path": storage("../version"),
        "of 2^62 elements": storage(count=huge), "of 2^64 elements": storage(count=2**64),
        "of -1 elements": storage(count=-1),
        "of an unknown class": storage(kind=name("torch", "CudaStorage")),
        "of another type": storage(kind=name("torch", "DoubleStorage")), "of a numeric key": storage(0),
        "of a text for a class": storage(kind=text("FloatStorage")),
        "of a dtype for a class": storage(kind=name("torch", "float32")),
        "of a text count": storage(count="4"), "with one part": item(("storage",)) + b"Q",
        "with no parts": item(()) + b"Q", "that is a number": item(3) + b"Q",
        "that is a text": item("storage") + b"Q", "that is a list": item([]) + b"Q",
        "of another kind": item(("tensor", name("torch", "FloatStorage"), "0", "cpu", 4)) + b"Q",
        "with eight parts": item(("storage", floats, "0", "cpu", 4, None, 1, 2)) + b"Q",
        "that is no storage": item(7), "that is a tensor": tensor(),
        "that is a placeholder": name("argparse", "Namespace") + b")\x81",
        "of a meta class": storage(kind=name("builtins", "object")),
    }  # fmt: skip
    for what, where in stores.items():
        yield f"zip, storage {what}", zipped({"t": tensor(where=where)})
        old = where.replace(b"tQ", b"NtQ") if where.endswith(b"tQ") and b"storage" in where else where
        yield f"legacy, storage {what}", legacy({"t": tensor(where=old)})
    two = {"a": tensor(), "b": tensor(where=storage(count=2), shape=(1,), stride=(1,))}
    yield "zip, storage in two sizes", zipped(two)
    kinds = {"a": tensor(), "b": tensor(where=storage(kind=name("torch", "IntStorage")))}
    yield "zip, storage in two types", zipped(kinds)
    yield "legacy, storage in two types", legacy(kinds)
    for what, view in {
        "beyond the end": ("v", 2, 3), "from -1": ("v", -1, 2), "of -1": ("v", 0, -1),
        "of texts": ("v", "0", "1"), "of 2^63": ("v", 2**63, 1), "too short for its tensor": ("v", 0, 2),
        "of one part": ("v",),
    }.items():  # fmt: skip
        yield f"legacy, storage view {what}", legacy({"t": tensor(where=storage(legacy=True, view=view))})
    v3 = ("torch._utils", "_rebuild_tensor_v3")
    rebuilt = {
        "v2 without arguments": call("torch._utils", "_rebuild_tensor_v2"),
        "v2 of three": call("torch._utils", "_rebuild_tensor_v2", storage(), 0, (1,)),
        "a parameter of nothing": call("torch._utils", "_rebuild_parameter"),
        "v3 of an unknown dtype": call(*v3, storage(count=16, kind=raw), 0, (4,), (1,), False, HOOKS, floats),
        "v3 of a text dtype": call(*v3, storage(), 0, (4,), (1,), False, HOOKS, "float32"),
        "v3 beyond its bytes": call(
            *v3, storage(count=16, kind=raw), 0, (5,), (1,), False, HOOKS, name("torch", "float32")),
        "a call of the wrong kind": call("torch._utils", "_rebuild_tensor_v2", b"]", 0, (1,), (1,)),
    }  # fmt: skip
    for what, body in rebuilt.items():
        yield f"zip, {what}", zipped({"t": body})


# --- archives ---


def _archives() -> Iterator[tuple[str, bytes]]:
    good = program({"t": tensor()})
    bad = program(call("os", "system", "true"))

    def built(*members: Member, **options: Any) -> bytes:
        return Zip(list(members), **options).build()

    pkl, data = Member("archive/data.pkl", good), Member("archive/data/0", FLOATS)
    sound = built(pkl, data)
    yield "zip, deflated storage", built(pkl, Member("archive/data/0", FLOATS, method=8))
    yield "zip, deflated pickle", built(Member("archive/data.pkl", good, method=8), data)
    yield (
        "zip, 64 MiB of zeros deflated",
        built(pkl, data, Member("archive/data/1", bytes(64 << 20), method=8)),
    )
    for method in (1, 6, 9, 12, 14, 93, 95, 99):
        yield f"zip, method {method}", built(pkl, Member("archive/data/0", FLOATS, method=method))
    for flag in (0x0001, 0x0040, 0x2000):
        yield f"zip, encrypted {flag}", built(pkl, Member("archive/data/0", FLOATS, flags=flag))
    yield "zip, two data.pkl of one name", built(pkl, data, Member("archive/data.pkl", bad))
    yield "zip, two data.pkl in two folders", built(pkl, data, Member("other/data.pkl", bad))
    yield "zip, two data.pkl, one deeper", built(pkl, data, Member("archive/data/data.pkl", bad))
    yield "zip, data.pkl without a folder", built(Member("data.pkl", good), Member("data/0", FLOATS))
    yield "zip, data.pkl in two levels", built(Member("a/b/data.pkl", good), Member("a/b/data/0", FLOATS))
    yield "zip, no data.pkl", built(data)
    yield "zip, data.pkl in capitals", built(Member("archive/DATA.PKL", good), data)
    yield "zip, an empty data.pkl", built(Member("archive/data.pkl", b""), data)
    yield "zip, two storages of one name", built(pkl, data, data)
    for strange in (
        "../escape",
        "/absolute",
        "a/../../b",
        "a//b",
        "a\\b",
        "..\\b",
        "C:\\b",
        "a\0b",
        "a\nb",
        "./a",
        "a/./b",
        "\udcff",
        "",
    ):
        yield f"zip, member {strange!a}", built(pkl, data, Member(strange, b"x"))
    for size in (0, 1, 15, 17, 1000, 2**31, 2**32 - 2):
        yield f"zip, size {size} in the directory", built(pkl, Member("archive/data/0", FLOATS, size=size))
        yield f"zip, size {size} in the header", built(pkl, Member("archive/data/0", FLOATS, local_size=size))
    wide = struct.pack("<2HQQ", 1, 16, 2**40, 2**40)
    yield (
        "zip, a terabyte in zip64 fields",
        built(pkl, Member("archive/data/0", FLOATS, size=0xFFFFFFFF, central_extra=wide)),
    )
    yield "zip, zip64 fields that are missing", built(pkl, Member("archive/data/0", FLOATS, size=0xFFFFFFFF))
    yield (
        "zip, zip64 fields cut off",
        built(pkl, Member("archive/data/0", FLOATS, size=0xFFFFFFFF, central_extra=wide[:9])),
    )
    yield (
        "zip, another name in the header",
        built(pkl, Member("archive/data/0", FLOATS, local_name="archive/data/9")),
    )
    yield (
        "zip, a longer name in the header",
        built(pkl, Member("archive/data/0", FLOATS, local_name="archive/data/00")),
    )
    yield (
        "zip, pickle under another name in the header",
        built(Member("archive/data.pkl", good, local_name="archive/data.txt"), data),
    )
    yield "zip, storage inside the pickle", built(pkl, Member("archive/data/0", FLOATS, offset=0))
    yield (
        "zip, storage inside another",
        built(pkl, data, Member("archive/data/1", FLOATS, offset=len(built(pkl)) - 100)),
    )
    yield "zip, storage beyond the file", built(pkl, Member("archive/data/0", FLOATS, offset=2**31))
    yield (
        "zip, storage in the directory",
        built(pkl, Member("archive/data/0", FLOATS, offset=len(sound) - 60)),
    )
    yield "zip, wrong checksum of the pickle", built(Member("archive/data.pkl", good, checksum=12345), data)
    yield "zip, a comment", built(pkl, data, comment=b"PK\5\6" + bytes(18))
    yield (
        "zip, a comment that is an archive",
        built(pkl, data, comment=built(Member("archive/data.pkl", bad), data)[:60000]),
    )
    yield "zip, bytes after the end", built(pkl, data, tail=b"appended")
    yield "zip, a second archive after the end", sound + built(Member("archive/data.pkl", bad), data)
    yield "zip, a second archive before", b"PK\3\4" + bytes(96) + sound
    yield "zip, more members than there are", built(pkl, data, count=3)
    yield "zip, fewer members than there are", built(pkl, data, count=1)
    yield "zip, no members", built(pkl, data, count=0)
    yield "zip, 65,535 members said", built(pkl, data, count=65535)
    for value in (0, 1, len(sound), 2**31, 2**32 - 1):
        yield f"zip, directory at {value}", built(pkl, data, directory_offset=value)
        yield f"zip, directory of {value} bytes", built(pkl, data, directory_size=value)
    yield (
        "zip, 25,000 members",
        built(pkl, data, *(Member(f"archive/data/{index + 1}", b"") for index in range(25_000))),
    )
    yield "zip, the numbers big-endian", built(pkl, data, Member("archive/byteorder", b"big"))
    yield "zip, the order of bytes unknown", built(pkl, data, Member("archive/byteorder", b"middle" * 10**6))
    yield "zip, TorchScript's constants", built(pkl, data, Member("archive/constants.pkl", good))
    yield "zip, TorchScript's code", built(pkl, data, Member("archive/code/__torch__.py", b"x"))
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("archive/data.pkl", good)
        written.writestr("archive/data/0", FLOATS)
    yield "zip, written by zipfile, deflated", script.getvalue()
    for cut in (1, 10, 21, 22, 23, 60, 100, 200, len(sound) // 2, len(sound) - 30, len(sound) - 4):
        yield f"zip, cut by {cut} bytes", sound[:-cut]
    end64 = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(sound) - 22 - len(built(pkl, data)[:0]), 0
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(sound) - 22, 1)
    yield "zip, a zip64 end that differs", sound[:-22] + end64 + locator + sound[-22:]
    yield (
        "zip, a zip64 end elsewhere",
        sound[:-22] + end64 + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + sound[-22:],
    )
    yield (
        "zip, a zip64 end of two disks",
        sound[:-22] + end64 + struct.pack("<4sLQL", b"PK\6\7", 0, len(sound) - 22, 2) + sound[-22:],
    )
    yield from _strangers(good, bad)


def _strangers(good: bytes, bad: bytes) -> Iterator[tuple[str, bytes]]:
    """Files of other formats, and pickles that torch did not write."""
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w") as written:
        for member in ("sys_info", "pickle", "tensors", "storages"):
            entry_info = tarfile.TarInfo(member)
            entry_info.size = len(bad)
            written.addfile(entry_info, io.BytesIO(bad))
    yield "tar, torch 0.1.10", tarred.getvalue()
    compressed = zlib.compressobj(9, zlib.DEFLATED, 31)
    yield "gzip", compressed.compress(bytes(10**6)) + compressed.flush()
    others = {
        "an empty file": b"", "one byte": b"P", "an empty zip": Zip().build(),
        "a web page": b"<!DOCTYPE html><html>404</html>", "a web page in capitals": b"<HTML>",
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100), "GGUF": b"GGUF" + bytes(100),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100), "7z": b"7z\xbc\xaf\x27\x1c" + bytes(100),
        "rar": b"Rar!\x1a\x07" + bytes(90), "zeros": bytes(4096), "ones": b"\xff" * 4096,
        "a script": b"#!/bin/sh\ntouch canary\n", "Python": b"import os\nos.system('true')\n",
        "JSON": b'{"a": 1}', "a bare pickle": good, "a bare hostile pickle": bad,
        "a pickle of a number": program(7), "a pickle of another magic": program(MAGIC + 1),
        "a pickle of protocol 0": b"cos\nsystem\n(S'true'\ntR.",
        "a pickle of protocol 1": b"cos\nsystem\n(U\x04truetR.", "protocol 6": b"\x80\x06N.",
        "protocol 255": b"\x80\xffN.", "the magic alone": program(MAGIC), "ELF": b"\x7fELF" + bytes(100),
        "numpy": b"\x93NUMPY\x01\x00" + bytes(100), "PDF": b"%PDF-1.7\n" + bytes(100),
    }  # fmt: skip
    yield from ((f"stranger, {what}", content) for what, content in others.items())


def _legacy() -> Iterator[tuple[str, bytes]]:
    body = {"t": tensor(where=storage(legacy=True))}
    sound = legacy(body)
    cases: dict[str, dict[str, Any]] = {
        "big-endian": {"system": {**SYSTEM, "little_endian": False}}, "no order of bytes": {"system": {}},
        "sizes that are no table": {"system": [1]}, "another version": {"version": 1002},
        "a version in words": {"version": "1001"}, "a magic in words": {"magic": "magic"},
        "keys that are no list": {"keys": "0"}, "keys that are numbers": {"keys": [0]},
        "a missing key": {"keys": []}, "one key too many": {"keys": ["0", "1"]},
        "a key twice": {"keys": ["0", "0"]}, "another key": {"keys": ["1"]},
        "25,000 keys": {"keys": [str(index) for index in range(25_000)]},
        "keys in a table": {"keys": {"0": 1}}, "a storage among the keys": {"keys": [storage(legacy=True)]},
    }  # fmt: skip
    for what, options in cases.items():
        yield f"legacy, {what}", legacy(body, **options)
    counts = {
        "0": 0,
        "3": 3,
        "5": 5,
        "-1": -1,
        "2^62": 2**62,
        "2^63-1": 2**63 - 1,
        "-2^63": -(2**63),
        "2^32": 2**32,
    }
    for what, count in counts.items():
        yield f"legacy, count {what}", legacy(body, data=struct.pack("<q", count) + FLOATS)
        yield (
            f"legacy, count {what} said twice",
            legacy(
                {"t": tensor(where=storage(count=count, legacy=True))}, data=struct.pack("<q", count) + FLOATS
            ),
        )
    yield "legacy, numbers cut off", legacy(body, data=struct.pack("<q", 4) + FLOATS[:-2])
    yield "legacy, bytes after the end", legacy(body, data=struct.pack("<q", 4) + FLOATS + b"more")
    yield "legacy, no numbers", legacy(body, data=b"")
    yield "legacy, half a count", legacy(body, data=b"\4\0\0\0")
    for cut in (1, 8, 16, 23, 40, len(sound) // 2, len(sound) - 20):
        yield f"legacy, cut by {cut} bytes", sound[:-cut]


# --- safetensors ---


def _safetensors() -> Iterator[tuple[str, bytes]]:
    one, four = entry([1], 0, 4), bytes(4)
    twice = json.dumps({"a": one})[:-1] + "," + json.dumps({"a": one})[1:]
    meta = '{"__metadata__":{"k":"1"},"__metadata__":{"k":"2"},"a":' + json.dumps(one) + "}"
    inner = '{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
    endless = b",".join(b'"%d":""' % index for index in range(10**6))
    headers: dict[str, tuple[object, bytes]] = {
        "a name twice": (twice.encode(), four), "metadata twice": (meta.encode(), four),
        "a field twice": (inner.encode(), four), "a hole": ({"a": one, "b": entry([1], 8, 12)}, bytes(12)),
        "a hole at the start": ({"a": entry([1], 4, 8)}, bytes(8)),
        "an overlap": ({"a": one, "b": one}, four),
        "half an overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        "one inside another": ({"a": entry([3], 0, 12), "b": entry([1], 4, 8)}, bytes(12)),
        "bytes after the end": ({"a": one}, bytes(5)), "bytes missing": ({"a": one}, bytes(3)),
        "data without tensors": ({}, four), "offsets turned round": ({"a": entry([1], 4, 0)}, four),
        "offsets of 2^62": ({"a": entry([2**60], 0, 2**62)}, four),
        "offsets of 2^64": ({"a": entry([2**62], 0, 2**64)}, four),
        "negative offsets": ({"a": entry([1], -4, 0)}, four),
        "offsets of floats": ({"a": entry([1], 0, 4.0)}, four),
        "offsets of booleans": ({"a": entry([0], False, False)}, b""),
        "three offsets": ({"a": {**one, "data_offsets": [0, 4, 8]}}, four),
        "a shape that lies": ({"a": entry([1000, 1000], 0, 4)}, four),
        "a negative shape": ({"a": entry([-1], 0, 4)}, four),
        "two negative sides": ({"a": entry([-1, -1], 0, 4)}, four),
        "a shape of 2^62": ({"a": entry([0, 2**62], 0, 0)}, b""),
        "an overflowing shape": ({"a": entry([2**62, 2**62], 0, 0)}, b""),
        "overflowing to zero": ({"a": entry([2**32, 2**32], 0, 0)}, b""),
        "a shape of floats": ({"a": entry([1.0], 0, 4)}, four),
        "a shape of booleans": ({"a": entry([True], 0, 4)}, four),
        "a shape of texts": ({"a": entry(["1"], 0, 4)}, four),
        "a shape of null": ({"a": entry(None, 0, 4)}, four), "rank 9": ({"a": entry([1] * 9, 0, 4)}, four),
        "rank 30,000": ({"a": entry([1] * 30_000, 0, 4)}, four),
        "an unknown type": ({"a": entry([1], 0, 4, "C1024")}, four),
        "a type that is a number": ({"a": entry([1], 0, 4, 32)}, four),
        "a type in small letters": ({"a": entry([1], 0, 4, "f32")}, four),
        "half bytes": ({"a": entry([2], 0, 1, "F4")}, b"\0"), "a list": (b"{" + b"[]}", b""),
        "an entry that is a number": ({"a": 3}, b""), "an entry that is a list": ({"a": [1]}, b""),
        "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, four),
        "no type": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, four),
        "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, four),
        "metadata of numbers": ({"__metadata__": {"a": 1}, "b": one}, four),
        "metadata of lists": ({"__metadata__": {"a": []}, "b": one}, four),
        "metadata that are a list": ({"__metadata__": [], "b": one}, four),
        "a NUL in a name": ({"a\0b": one}, four), "an escape sequence in a name": ({"\x1b[2J": one}, four),
        "a name written backwards": ({"\u202ea": one}, four), "an empty name": ({"": one}, four),
        "half a letter in a name": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', four),
        "a name of 2,000 letters": ({"a" * 2000: one}, four),
        "5,000 empty tensors": ({str(i): entry([0], 0, 0) for i in range(5000)}, b""),
        "25,000 tensors": ({str(i): entry([1], i, i + 1, "U8") for i in range(25_000)}, bytes(25_000)),
        "nested too deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
        "nested a little too deep": (b'{"a":' * 2000 + b"1" + b"}" * 2000, b""),
        "lists without end": (b'{"a":[' + b"[]," * 4_000_000 + b"0]}", b""),
        "numbers without end": (b'{"a":[' + b"1," * 6_000_000 + b"0]}", b""),
        "tables without end": (b'{"a":[' + b'{"":0},' * 2_000_000 + b"0]}", b""),
        "metadata without end": (b'{"__metadata__":{' + endless + b"}}", b""),
        "a number of a million digits": (b'{"a":' + b"1" * 10**6 + b"}", b""),
        "no JSON": (b"{nonsense}", b""), "a trailing comma": (b'{"a":1,}', b""),
        "NaN for an offset": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,4]}}', four),
        "no UTF-8": (b'{"\xff\xfe":1}', b""), "UTF-16": ('{"a":1}'.encode("utf-16-le"), b""),
        "rare letters": (b'{"' + "\U0001f600".encode() + b"a" * (15 << 20) + b'":1}', b""),
        "a byte order mark": (b"\xef\xbb\xbf{}", b""), "two values": (b"{}{}", b""),
    }  # fmt: skip
    for what, (header, data) in headers.items():
        yield f"safetensors, {what}", safetensors(header, data)
    for length in (0, 1, 7, 10**4, 2**24 + 1, 2**31, 2**32, 2**63, 2**64 - 1):
        yield f"safetensors, a header of {length}", safetensors(b'{"a":1}', four, length)
    whole = safetensors({"a": entry([4], 0, 16)}, FLOATS)
    for cut in (1, 4, 15, 16, 17, 40, len(whole) - 9):
        yield f"safetensors, cut by {cut} bytes", whole[:-cut]


def hostile(canary: str, floods: bool = True) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every hostile file; each is to be refused, and `canary` never to exist."""
    if floods:
        yield from _floods()
    yield from _code(canary)
    yield from _pickled(canary)
    yield from _machine()
    yield from _views()
    yield from _archives()
    yield from _legacy()
    yield from _safetensors()

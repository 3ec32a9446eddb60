"""Which names a pickle may mention: those with a meaning here, and those that may stand as inert records.

Nothing that a file names is ever imported or called, so no name can do harm in this package. The rule below
decides which files are *refused* nevertheless: a file that asks for `os.system` was made to harm somebody,
and its owner should hear of it before another program opens it. A rule that lists what is bad is never
complete; so this one lists what is good, and leaves room for classes that nobody can know beforehand:

1. Names with a meaning (tensors, storages, `OrderedDict`, numpy scalars, ...) are used as that.
2. The standard library, numpy and torch are closed: what is not in the tables here is refused where it is
   mentioned, called or not. There every known trick begins (`os`, `builtins.getattr`, `torch.hub`, ...).
3. Libraries whose objects lie in real checkpoints (Lightning callbacks, OmegaConf settings, ...) are open for
   names in the form of a class: each becomes a placeholder without behaviour.
4. Any other root may be mentioned, and its classes created without a call (`__new__` and a state), as a
   training script of one's own leaves them; to *call* something of it is refused.
"""

from __future__ import annotations

import re
import sys
from enum import Enum
from typing import Final

MAX_NAME = 200  # characters of a module's or class's name


class Forbidden(ValueError):
    """The file asks for what no file of weights needs."""


class Use(Enum):
    """How a global may be used: as a value alone, created without a call, called too, or by its meaning."""

    MENTION = "mention"
    CREATE = "create"
    CALL = "call"
    MEANING = "meaning"


MAPPINGS: Final = frozenset({"collections.OrderedDict", "collections.defaultdict", "builtins.dict"})
MEANINGS: Final = MAPPINGS | {
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2", "torch.Size", "_codecs.encode", "copyreg._reconstructor",
    "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
}  # fmt: skip

# Storages by the name of their class in `torch`; UntypedStorage is bytes, its tensors carry their own dtype.
STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
DTYPES: Final = frozenset({
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16",
    "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz",
})  # fmt: skip

_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_CALLED: Final = frozenset({
    *(f"builtins.{name}" for name in (
        "bool", "bytearray", "bytes", "complex", "float", "frozenset", "int", "list", "object", "range",
        "set", "slice", "str", "tuple", "long", "unicode", "xrange")),  # protocol 2 writes Python 2's names
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "argparse.Namespace", "collections.Counter", "collections.deque", "decimal.Decimal", "fractions.Fraction",
    "types.SimpleNamespace", "uuid.UUID", "torch.device", "torch.serialization._get_layout",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer", "numpy.ndarray",
    "numpy.random._pickle.__randomstate_ctor",
    "numpy.random._pickle.__generator_ctor", "numpy.random._pickle.__bit_generator_ctor",
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
    *(f"numpy.{name}" for name in (
        "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
        "uint32", "uint64", "str_", "bytes_")),
})  # fmt: skip
_VALUES: Final = frozenset({
    *(f"torch.{name}" for name in (*DTYPES, *STORAGES)),
    "torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.strided", "torch.Tensor",
    "torch._tensor.Tensor",
    *(f"torch.nn.functional.{name}" for name in ("gelu", "mish", "relu", "sigmoid", "silu", "softplus")),
})  # fmt: skip
PLAIN: Final = _CALLED | _VALUES  # harmless everywhere, nothing to tell of

_OPEN_PREFIXES: Final = (
    "torch.nn.", "torch.optim.", "torch.utils.data.", "torch.amp.", "torch.cuda.amp.", "typing.",
    "numpy.random.",
)  # fmt: skip
_OPEN_ROOTS: Final = frozenset({
    "__main__", "accelerate", "bitsandbytes", "cldm", "clip", "diffusers", "k_diffusion", "kornia", "ldm",
    "library", "lightning", "lightning_fabric", "lightning_utilities", "modules", "networks", "omegaconf",
    "open_clip", "peft", "pytorch_lightning", "sgm", "taming", "timm", "tokenizers", "torch_ema",
    "torchmetrics", "transformers",
})  # fmt: skip

# Python 2's names, and modules that later versions of Python dropped: other readers still resolve them.
_RENAMED: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_FORMER: Final = frozenset({
    "asynchat", "asyncore", "cPickle", "cStringIO", "cgi", "commands", "crypt", "dbm", "distutils",
    "dummy_thread", "exceptions", "formatter", "httplib", "imp", "ihooks", "lib2to3", "mailcap", "md5",
    "msilib", "new", "nis", "nntplib", "os2", "parser", "pipes", "popen2", "posixfile", "rexec", "sets",
    "sitecustomize", "smtpd", "spwd", "symbol", "telnetlib", "test", "thread", "urllib2", "urlparse", "user",
    "usercustomize", "xmlrpclib",
})  # fmt: skip
CLOSED_ROOTS: Final = frozenset(sys.stdlib_module_names) - {"__main__"} | _FORMER | {"torch", "numpy"}

_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_CLASS = re.compile(r"_*[A-Z][A-Za-z0-9_]*(\._*[A-Z][A-Za-z0-9_]*)*")  # a class, or one inside another


def judge(module: str, name: str) -> tuple[str, Use]:
    """(the dotted name, how it may be used) of a global; `Forbidden` where it may not be mentioned at all."""
    if max(len(module), len(name)) > MAX_NAME or not (_MODULE.fullmatch(module) and _MODULE.fullmatch(name)):
        raise Forbidden(f"it asks for something of the name {f'{module}.{name}'[:MAX_NAME]!r}")
    module = _RENAMED.get(module, module)
    full, root = f"{module}.{name}", module.partition(".")[0]
    if "." not in name:  # `torch` with `_utils._rebuild_tensor_v2` is no spelling that torch writes
        if full in MEANINGS:
            return full, Use.MEANING
        if full in _CALLED:
            return full, Use.CALL
        if full in _VALUES:
            return full, Use.MENTION
    is_class = _CLASS.fullmatch(name) is not None
    if is_class and (root in _OPEN_ROOTS or f"{module}.".startswith(_OPEN_PREFIXES)):
        return full, Use.CALL
    if root in CLOSED_ROOTS:
        raise Forbidden(f"it asks for {full}, which no file of weights needs")
    return full, Use.CREATE if is_class else Use.MENTION

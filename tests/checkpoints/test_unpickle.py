"""The pickle interpreter: what it makes of pickles that Python writes, and what it refuses or counts."""

from __future__ import annotations

import argparse
import collections
import pickle
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from hostile import call, item, name, number, program, text

from sfumato.checkpoints.ckpt import policy as pickle_policy
from sfumato.checkpoints.ckpt import records as pickle_records
from sfumato.checkpoints.ckpt import unpickle
from sfumato.checkpoints.ckpt.policy import Forbidden, Use, judge
from sfumato.checkpoints.ckpt.records import Global, Placeholder, Table
from sfumato.checkpoints.ckpt.unpickle import Unpickled


def read(content: bytes) -> Unpickled:
    return unpickle.unpickle(content, lambda identifier: ("stored", identifier))


def run(*opcodes: bytes, protocol: int = 2) -> Any:
    return read(program(b"".join(opcodes), protocol)).value


def plain(value: object) -> object:
    """Records as the values that they stand for."""
    match value:
        case Table():
            return {key: plain(each) for key, each in value.pairs}
        case list():
            return [plain(each) for each in value]
        case tuple():
            return tuple(plain(each) for each in value)
        case Placeholder(name="builtins.bytes"):  # of protocol 2, which has no empty ones
            return b""
    return value


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(value=VALUES, protocol=st.integers(2, 5))
def test_values_come_back_as_they_were(value: object, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    found = read(content)
    assert plain(found.value) == value
    assert found.end == len(content) and found.classes == ()


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=60), protocol=st.integers(2, 5))
def test_any_bytes_give_a_value_or_one_kind_of_error(content: bytes, protocol: int) -> None:
    try:
        read(b"\x80" + bytes([protocol]) + content)
    except ValueError:
        return


def test_objects_that_contain_themselves() -> None:
    circle: list[Any] = []
    circle.append((circle, {"self": circle}))
    found = read(pickle.dumps(circle, 2)).value
    assert isinstance(found, list) and found[0][0] is found and found[0][1].named()["self"] is found


def test_python_2_texts_are_texts_and_its_bytes_are_bytes() -> None:
    assert run(b"(", b"U\x03abc", b"T\x02\0\0\0\xff\xfe", b"t") == ("abc", b"\xff\xfe")


def test_objects_are_placeholders_that_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda *_: pytest.fail("run"))
    module = types.ModuleType("own_trainer")
    preview = type(
        "Preview", (), {"__module__": "own_trainer", "__setstate__": lambda *_: pytest.fail("run")}
    )
    module.Preview = preview  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_trainer", module)
    made = preview()
    made.every = 10  # type: ignore[attr-defined]
    found = read(pickle.dumps([made, collections.Counter("aab")], 4))
    first, second = found.value  # type: ignore[misc]
    assert isinstance(first, Placeholder) and first.name == "own_trainer.Preview"
    assert isinstance(first.state, Table) and first.state.named() == {"every": 10}
    assert isinstance(second, Placeholder) and second.name == "collections.Counter"
    assert found.classes == ("own_trainer.Preview",)


def test_nothing_is_imported() -> None:
    before = set(sys.modules)
    body = [name("pytorch_lightning.callbacks", "Timer"), name("wsgiref_like.module", "Thing") + b")\x81"]
    assert read(program(body)).classes == ("pytorch_lightning.callbacks.Timer", "wsgiref_like.module.Thing")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "value", [numpy.float64(0.1), numpy.int64(-3), numpy.float16(2), numpy.bool_(True), numpy.uint8(9)]
)
def test_numpy_scalars_are_numbers(value: Any) -> None:
    for protocol in (2, 4):
        assert read(pickle.dumps(value, protocol)).value == value.item()


def test_numpy_scalars_that_lie_are_placeholders_or_nothing() -> None:
    kind = call("numpy", "dtype", "f8", False, True)
    assert run(call("numpy.core.multiarray", "scalar", kind, b"C\x02ab")) is None
    assert isinstance(run(call("numpy.core.multiarray", "scalar", "f8", b"C\x02ab")), Placeholder)


def test_ordered_dictionaries_in_both_spellings() -> None:
    for body in (
        call("collections", "OrderedDict", [["a", 1]]),
        name("collections", "OrderedDict") + b")R" + item("a") + item(1) + b"s",
    ):
        found = run(body)
        assert isinstance(found, Table) and found.named() == {"a": 1}
    with_state = name("collections", "OrderedDict") + b")R" + item({"_metadata": {}}) + b"b"
    assert isinstance(run(with_state), Table)


def test_keys_are_neither_hashed_nor_compared() -> None:
    colliding = [number(index * (2**61 - 1)) for index in range(1, 2000)]  # Python hashes them all to 0
    found = run(b"}(", *(key + b"N" for key in colliding), b"]N", b"}N", b"u")
    assert len(found.pairs) == 2001
    with pytest.raises(ValueError, match="two entries of the name 'a'"):
        run(b"}(", text("a"), b"N", text("a"), b"N", b"u").named()


# (module, name) -> how it may be used; None: not even mentioned
POLICY = {
    ("collections", "OrderedDict"): Use.MEANING, ("torch._utils", "_rebuild_tensor_v2"): Use.MEANING,
    ("torch", "HalfStorage"): Use.MENTION, ("torch", "bfloat16"): Use.MENTION, ("torch", "device"): Use.CALL,
    ("__builtin__", "set"): Use.CALL, ("__builtin__", "long"): Use.CALL,
    ("copy_reg", "_reconstructor"): Use.MEANING, ("pathlib", "PosixPath"): Use.CALL,
    ("typing", "Any"): Use.CALL, ("torch.optim.adamw", "AdamW"): Use.CALL,
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): Use.CALL,
    ("lightning.pytorch.callbacks", "Outer.Inner"): Use.CALL,
    ("omegaconf.dictconfig", "DictConfig"): Use.CALL, ("__main__", "Config"): Use.CALL,
    ("own_trainer.callbacks", "Preview"): Use.CREATE, ("own_trainer.callbacks", "collate"): Use.MENTION,
    ("pytorch_lightning", "seed_everything"): Use.MENTION, ("builtins", "eval"): None,
    ("builtins", "getattr"): None, ("__builtin__", "execfile"): None, ("os", "system"): None,
    ("posix", "system"): None, ("nt", "system"): None, ("subprocess", "Popen"): None,
    ("runpy", "run_path"): None, ("importlib", "import_module"): None, ("functools", "partial"): None,
    ("operator", "attrgetter"): None, ("commands", "getoutput"): None, ("torch", "load"): None,
    ("torch.hub", "load"): None, ("torch", "hub.load"): None, ("torch", "_utils._rebuild_tensor_v2"): None,
    ("torch.package", "PackageImporter"): None, ("numpy", "load"): None, ("torch.nn", "os.system"): None,
    ("torch.utils.data", "datapipes.Popen"): None, ("numpy.f2py", "compile"): None,
    ("os", "sys\u200btem"): None, ("o s", "system"): None, ("", "X"): None, ("x" * 201, "X"): None,
    ("a", "b\nc"): None,
}  # fmt: skip


@pytest.mark.parametrize(("module", "attribute"), POLICY, ids=lambda word: ascii(word)[:40])
def test_the_policy(module: str, attribute: str) -> None:
    use = POLICY[module, attribute]
    if use is None:
        with pytest.raises(Forbidden, match="asks for"):
            judge(module, attribute)
    else:
        assert judge(module, attribute)[1] is use


def test_every_name_with_a_meaning_has_one() -> None:
    assert set(pickle_records._CALLS) == pickle_policy.MEANINGS


@pytest.mark.parametrize("use", [use for use in Use if use is not Use.MEANING])
def test_what_may_be_done_with_a_name(use: Use) -> None:
    cls = Global("a.B", use)
    for act, allowed in ((lambda: pickle_records.call(cls, (), lambda _: None), {Use.CALL}),
                         (lambda: pickle_records.create(cls, ()), {Use.CALL, Use.CREATE})):  # fmt: skip
        if use in allowed:
            assert isinstance(act(), Placeholder)
        else:
            with pytest.raises(Forbidden, match=r"a\.B"):
                act()


THING = name("argparse", "Namespace")
TYPED = ("torch._tensor", "_rebuild_from_type_v2")
REFUSED = {
    "a call of a number": (b"K\1)R", "calls something that is no name"),
    "a call of what a call gave": (THING + b")R)R", "calls something that is no name"),
    "a call without a tuple": (THING + b"]R", "calls something"),
    "an object of a text": (text("os") + b")\x81", "no class"),
    "an object of a function": (name("own", "function") + b")\x81", r"own\.function, which is no class"),
    "an object of a rebuilding function": (name("torch._utils", "_rebuild_parameter") + b")\x81", "no class"),
    "an unknown call": (name("own", "Thing") + b")R", r"calls own\.Thing, which is not known"),
    "a state for a class": (THING + b"}b", r"changes argparse\.Namespace itself"),
    "a state for a list": (b"]}b", "has none"), "a name that is no text": (b"K\1K\2\x93", "no text"),
    "a name without an end": (b"cos" + b"s" * 300, "without an end"),
    "INST": (b"(iargparse\nNamespace\n", "opcode INST"), "OBJ": (b"(" + THING + b"o", "opcode OBJ"),
    "EXT1": (b"\x82\1", "opcode EXT1"), "PERSID": (b"Px\n", "opcode PERSID"),
    "another encoding": (call("_codecs", "encode", "x", "rot13"), "other than bytes"),
    "a subclass's call": (call(*TYPED, THING, THING, (), 1), "other things than a tensor"),
    "a subclass's call in itself": (call(*TYPED, name(*TYPED), THING, (), 1), "other things than a tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("opcodes", "cause"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_forbidden(opcodes: bytes, cause: str) -> None:
    with pytest.raises(Forbidden, match=cause):
        run(opcodes)


DAMAGED = {
    "no pickle": (b"hello", "does not begin"),
    "protocol 1": (b"\x80\1N.", "does not begin"),
    "protocol 6": (b"\x80\6N.", "does not begin"),
    "nothing": (b"", "does not begin"),
    "no STOP": (b"\x80\2N", "ends too early"),
    "STOP without a value": (b"\x80\2.", "other than one object"),
    "two values": (b"\x80\2NN.", "other than one object"),
    "an open mark": (b"\x80\2N(.", "other than one object"),
    "a second PROTO": (b"\x80\2\x80\2N.", "never writes"),
    "an unassigned opcode": (b"\x80\2\xffN.", "never writes"),
    "an empty stack": (b"\x80\2R.", "empty stack"),
    "a short tuple of too few": (b"\x80\2N\x86.", "empty stack"),
    "a mark never set": (b"\x80\2t.", "mark that it never set"),
    "a text cut off": (b"\x80\2X\x09\0\0\0abc", "ends too early"),
    "a text beyond 2^63": (b"\x80\4\x8d" + b"\xff" * 8, "at most"),
    "a text that is none": (b"\x80\2X\x01\0\0\0\xff.", "decode"),
    "an object never stored": (b"\x80\2h\7.", "never stored"),
    "a key without a value": (b"\x80\2}(Nu.", "without a value"),
    "an entry of a list": (b"\x80\2]NNs.", "no dictionary"),
    "an element of a dictionary": (b"\x80\2}Na.", "no list"),
    "a frame beyond the end": (b"\x80\4\x95\xff\0\0\0\0\0\0\0N.", "frame"),
    "pairs that are none": (program(call("collections", "OrderedDict", [1])), "other than pairs"),
    "_reconstructor of one": (program(call("copy_reg", "_reconstructor", THING)), "instead of 3"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "cause"), DAMAGED.values(), ids=list(DAMAGED))
def test_what_is_damaged(content: bytes, cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as caught:
        read(content)
    assert not isinstance(caught.value, Forbidden)


LIMITS = {
    "MAX_OPCODES": (10, b"N0" * 4 + b"N", b"N0" * 5 + b"N", "more than 10 opcodes"),
    "MAX_MEMORY": (2000, b"]0" * 10 + b"N", b"]0" * 20 + b"N", "MiB of memory"),
    "MAX_MEMO": (3, b"Nq\0q\1q\2", b"Nq\0q\1q\2q\3", "remembers more"),
    "MAX_DEPTH": (4, b"(" * 4 + b"t" * 4, b"(" * 5 + b"t" * 5, "deeper than 4"),
    "MAX_TEXT": (4, text("abcd"), text("abcde"), "at most 4 are read"),
    "MAX_CLASSES": (
        2, name("a", "A") + b"0" + name("a", "B"), b"0".join(name("a", each) for each in "ABC"), "classes"),
}  # fmt: skip


@pytest.mark.parametrize("limit", LIMITS)
def test_what_is_counted(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, within, beyond, cause = LIMITS[limit]
    run(beyond)
    monkeypatch.setattr(unpickle, limit, value)
    run(within)
    with pytest.raises(ValueError, match=cause):
        run(beyond)


COSTLY = {
    "numbers": b"K\1", "big numbers": b"\x8a\xff" + b"\x7f" * 255, "floats": b"G" + bytes(8), "lists": b"]",
    "tables": b"}", "tuples": b"N\x85", "texts": text("abc"), "rare texts": text("\U0001f600" * 99),
    "bytes": b"C\x03abc", "marks": b"(1", "old texts": b"U\x03abc", "memo": b"N\x94", "appended": b"]Na",
    "entries": b"}NNs", "objects": THING + b")\x81", "calls": THING + b")R", "ids": b")Q", "sets": b"\x8f",
    "frozen sets": b"(\x91", "bytes by name": call("_codecs", "encode", "x" * 99, "latin1"),
    "pairs": call("collections", "OrderedDict", [[1, 2]] * 9), "mentions": name("a", "B"),
    "the memo's": b"h\0",
}  # fmt: skip


@pytest.mark.parametrize("opcodes", COSTLY.values(), ids=list(COSTLY))
def test_everything_that_takes_memory_is_counted(opcodes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each repetition costs at least what its objects take; a free one could be repeated without end."""
    spent: list[int] = []
    real = unpickle._Machine.spend
    monkeypatch.setattr(
        unpickle._Machine, "spend", lambda self, count: (spent.append(count), real(self, count))[1]
    )
    run(b"Nq\0(", opcodes, b"1")
    once = sum(spent)
    spent.clear()
    run(b"Nq\0(", opcodes * 3, b"1")
    assert sum(spent) - once >= 2 * 8
    taken = 3 * len(opcodes) if opcodes[:1] in (b"\x8a", b"X", b"C", b"U") else 0
    assert sum(spent) >= taken


AGAIN = {  # (a large value for the memo, a call that takes it from there, bytes that each call makes)
    "bytes of a text": (
        text("a" * 10_000), name("_codecs", "encode") + b"h\0" + text("latin1") + b"\x86R", 10_000),
    "pairs of a list": (item([[1, 2]] * 500), name("collections", "OrderedDict") + b"h\0\x85R", 500 * 64),
}  # fmt: skip


@pytest.mark.parametrize(("value", "made", "count"), AGAIN.values(), ids=list(AGAIN))
def test_what_is_made_again_and_again_is_counted_again_and_again(
    value: bytes, made: bytes, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpickle, "MAX_MEMORY", 20 * count)
    run(value, b"q\x000", made)
    with pytest.raises(ValueError, match="MiB of memory"):
        run(value, b"q\x000", (made + b"0") * 20, b"N")


def test_deep_nests_need_no_recursion() -> None:
    depth = 50_000
    value = run(b"N", b"\x85" * depth)
    for _ in range(depth):
        (value,) = value
    assert value is None


def test_persistent_ids_are_asked_for() -> None:
    assert run(item(("storage", 1)) + b"Q") == ("stored", ("storage", 1))


def test_a_pickle_inside_more_bytes() -> None:
    content = b"before" + program([1, 2]) + b"after" + struct.pack("<q", 1)
    found = unpickle.unpickle(content, lambda _: None, 6)
    assert found.value == [1, 2] and content[found.end :].startswith(b"after")

"""The rules of the house: who imports whom, what an import touches, how long files are, no unsafe sinks."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "sfumato"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> what it may import, each by the longest matching prefix. `errors` is open to all.
INNER = (
    "conditioning",
    "nn",
    "diffusion",
    "text",
    "checkpoints",
    "presets",
    "families",
    "runtime",
    "images",
    "intake",
    "request",
    "model",
    "conditioned",
    "preprocess",
    "upscale",
)
RULES: dict[str, tuple[str, ...]] = {
    "": (*INNER, "generation"),  # the package's public names
    "errors": (),
    "conditioning": (),
    "nn": ("nn", "conditioning"),
    "diffusion": ("diffusion", "conditioning"),
    "text": ("text",),
    "text.encode": ("text", "nn.clip", "nn.bert", "nn.layers", "conditioning"),
    "presets": ("nn", "diffusion", "text"),
    "families": ("nn", "diffusion", "text", "presets"),
    "checkpoints": ("checkpoints", "nn", "presets", "families", "diffusion", "text", "runtime"),
    "runtime": (),
    "images": ("checkpoints.files",),
    "intake": (),
    "charts": ("checkpoints.files",),
    "request": ("diffusion", "request"),
    "recipes": ("recipes", "request", "diffusion", "checkpoints.files"),
    "model": INNER,
    "conditioned": ("conditioning", "nn", "presets", "text"),
    "generation": (*INNER, "generation"),
    "upscale": ("checkpoints.upscaler", "nn.tiles"),
    "morph": ("checkpoints.files",),
    "doctor": INNER,
    "training": (*INNER, "generation", "training", "data.pictures", "charts"),  # reads what `data` wrote
    "data": (*INNER, "data"),
    "preprocess": ("preprocess",),
    "compat": (*INNER, "generation", "compat"),
    "cli": (
        *INNER,
        "generation",
        "training",
        "data",
        "charts",
        "recipes",
        "morph",
        "doctor",
        "cli",
    ),
    "__main__": ("cli",),
    "server": (*INNER, "generation", "server"),
}
LEAF_LIBRARIES = {"torch", "numpy", *sys.stdlib_module_names}
BANNED_MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "requests",
    "httpx",
    "urllib.request",
}
BANNED_CALLS = {
    "eval": "runs text", "exec": "runs text", "compile": "runs text", "__import__": "imports by a value",
    "torch.load": "unpickles", "torch.save": "pickles", "torch.hub.load": "runs downloaded code",
    "yaml.load": "constructs objects", "yaml.unsafe_load": "constructs objects", "os.system": "runs a shell",
    "os.popen": "runs a shell", "subprocess.getoutput": "runs a shell",
    "importlib.import_module": "imports by a value",
    "print": "prints",
}  # fmt: skip
# (call, file): the one place that is trusted with it.
ALLOWED = {("importlib.import_module", "__init__.py")}
BANNED_KEYWORDS = {("shell", True), ("strict", False), ("trust_remote_code", True), ("allow_pickle", True)}


def module_of(file: Path) -> str:
    """The dotted name inside the package: "" for the package itself, "nn.unet", ..."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every module named by an import statement, in functions too; `from a import b` gives "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def rule_of(module: str) -> tuple[str, ...]:
    rooms = [room for room in RULES if within(module, room)]
    assert rooms or module == "", (
        f"sfumato.{module} belongs to no room: add it to the plan in docs/architecture.md"
    )
    return RULES[max(rooms, key=len, default="")]


def inward_offences(module: str, tree: ast.Module) -> list[str]:
    allowed = (*rule_of(module), "errors", "__version__")
    inside = [
        (name.removeprefix("sfumato."), line) for name, line in imports_of(tree) if within(name, "sfumato")
    ]
    return [
        f"line {line}: {name}" for name, line in inside if not any(within(name, room) for room in allowed)
    ]


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def sinks(file_name: str, tree: ast.Module) -> list[str]:
    found = [f"line {line}: import {name}" for name, line in imports_of(tree)
             if any(within(name, banned) for banned in BANNED_MODULES)]  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: bare except")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in BANNED_CALLS and (name, file_name) not in ALLOWED:
            found.append(f"line {node.lineno}: {name} {BANNED_CALLS[name]}")
        if name.endswith(".extractall"):
            found.append(f"line {node.lineno}: {name} writes names that an archive chose")
        keywords = {
            (word.arg, word.value.value) for word in node.keywords if isinstance(word.value, ast.Constant)
        }
        if name != "zip":
            found += [f"line {node.lineno}: {word}={value}" for word, value in keywords & BANNED_KEYWORDS]
        words = {word.arg for word in node.keywords}
        if name == "Image.open" and "formats" not in words:
            found.append(f"line {node.lineno}: {name} without formats= tries every decoder there is")
        if name in {"np.load", "numpy.load"} and ("allow_pickle", False) not in keywords:
            found.append(f"line {node.lineno}: {name} without allow_pickle=False")
    return found


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_a_file_keeps_the_rules(file: Path) -> None:
    text, tree, module = file.read_text(encoding="utf-8"), tree_of(file), module_of(file)
    assert len(text.splitlines()) <= 400
    assert file.name != "utils.py"
    assert ast.get_docstring(tree) or not text.strip(), "a file opens with one sentence saying what it is"
    assert inward_offences(module, tree) == []
    may_print = within(module, "cli")
    assert [
        sink for sink in sinks(file.name, tree) if not (may_print and sink.endswith("print prints"))
    ] == []
    assert "NotImplementedError" not in text and "TODO" not in text and "FIXME" not in text


@pytest.mark.parametrize("room", ["nn", "diffusion"])
def test_networks_and_mathematics_import_torch_numpy_and_nothing_else(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        used = {name.split(".")[0] for name, _ in imports_of(tree_of(file))} - {"sfumato", "__future__"}
        assert used <= LEAF_LIBRARIES, f"{file.name} imports {used - LEAF_LIBRARIES}"


OFFENCES = """
    import pickle
    import urllib.request
    from torch import hub
    torch.load("a")
    exec("x")
    model.load_state_dict(state, strict=False)
    subprocess.run("ls", shell=True)
    np.load("a.npy")
    archive.extractall("there")
    Image.open("a.png")
    print("hello")
    try:
        pass
    except:
        pass
"""


def test_the_sink_rule_finds_what_it_is_for() -> None:
    found = sinks("other.py", ast.parse(textwrap.dedent(OFFENCES)))
    for word in ("pickle", "urllib.request", "torch.load", "exec", "strict=False", "shell=True", "np.load",
                 "extractall", "Image.open", "print", "bare except"):  # fmt: skip
        assert any(word in line for line in found), word
    harmless = "model.eval()\nre.compile('a')\nnp.load(p, allow_pickle=False)\nzip(a, b, strict=False)"
    assert sinks("other.py", ast.parse(harmless)) == []


def test_the_import_rule_finds_what_it_is_for() -> None:
    outward = "def f():\n    from sfumato.training import loop\n"
    assert inward_offences("nn.unet", ast.parse(outward)) == ["line 2: training.loop"]
    assert inward_offences("diffusion.samplers", ast.parse("import sfumato.nn.unet")) == ["line 1: nn.unet"]
    assert inward_offences("model", ast.parse("from sfumato import training")) == ["line 1: training"]
    assert inward_offences("model", ast.parse("from sfumato import errors")) == []


# Runs in a fresh interpreter. The environment and the arguments raise when they are read, and every file that
# is opened is reported, but for code, which the import system must read.
WATCHED_IMPORT = """
    import importlib, json, os, sys
    touched = []

    class Untouchable:
        def __getattr__(self, name): raise AssertionError(f"read through .{name}")
        def __getitem__(self, key): raise AssertionError(f"read [{key!r}]")
        def __contains__(self, key): raise AssertionError(f"asked for {key!r}")
        def __iter__(self): raise AssertionError("iterated")
        def __len__(self): raise AssertionError("measured")

    def watch(event, arguments):
        if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
            touched.append(f"open {arguments[0]}")
        elif event.startswith(WATCHED):
            touched.append(event)

    WATCHED = ("socket.", "subprocess.", "os.mkdir", "os.remove", "os.rename", "os.putenv", "ctypes.")
    sys.addaudithook(watch)
    environment, arguments = os.environ, sys.argv
    os.environ, sys.argv = Untouchable(), Untouchable()
    import sfumato
    os.environ, sys.argv = environment, arguments
    mine = sorted(name for name in sys.modules if name.split(".")[0] in {"torch", "numpy", "PIL", "pydantic"})
    sys.stdout.write(json.dumps({"touched": touched, "heavy": mine, "version": sfumato.__version__}))
"""


def run_python(code: str, *, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    flags = ["-B", "-s"] if isolated else ["-B"]
    prefix = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
    command = [sys.executable, *flags, "-c", prefix + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_import_touches_nothing() -> None:
    done = run_python(WATCHED_IMPORT, isolated=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == {"touched": [], "heavy": [], "version": report["version"]}


def test_the_watch_sees_what_it_is_for() -> None:
    spying = WATCHED_IMPORT.replace("import sfumato\n", "import sfumato; open('/dev/null').close()\n", 1)
    assert json.loads(run_python(spying).stdout)["touched"] == ["open /dev/null"]
    reading = WATCHED_IMPORT.replace("import sfumato\n", "import sfumato; os.environ.get('HOME')\n", 1)
    assert "read through .get" in run_python(reading).stderr


def test_every_module_imports_and_none_brings_a_development_library() -> None:
    names = sorted(f"sfumato.{module_of(file)}".rstrip(".") for file in FILES if file.name != "__main__.py")
    code = f"""
        import importlib, json, sys
        for name in {names!r}:
            importlib.import_module(name)
        unwanted = {{"diffusers", "transformers", "scipy", "rich", "resvg_py", "dicebear", "huggingface_hub"}}
        sys.stdout.write(json.dumps(sorted(unwanted & {{name.split(".")[0] for name in sys.modules}})))
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    # cyclopts, which only the command line imports, is allowed its own rich
    assert json.loads(done.stdout) in ([], ["rich"])


def test_public_names_are_those_of_the_plan() -> None:
    import sfumato

    assert {"load", "generate", "stream", "Request", "Result", "StableDiffusion", "__version__"} == set(
        sfumato.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sfumato.nonsense  # type: ignore[attr-defined]  # noqa: B018
    assert set(sfumato.__all__) <= set(dir(sfumato))

"""Importing the package costs next to nothing, and still plain transformers loads compressed models afterwards."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fresh import Interpreter
from tests.tiny import MODELS
from transformers import BertTokenizer

import factorformer
from factorformer.cli.app import app
from factorformer.errors import EXTRAS
from factorformer.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]

HEAVY = ["datasets", "jaxtyping", "numpy", "onnxruntime", "scipy", "sklearn", "tokenizers", "torch", "transformers"]
"""Packages that take long to import, and those that bring others along."""

HELP = "import sys; from factorformer.cli import main; sys.argv[:] = ['factorformer', *'{}'.split(), '--help']; main()"


def run(code: str, *arguments: object) -> str:
    """What a program prints in a new interpreter."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str) -> set[str]:
    """The packages that a program has imported when it ends, whether it calls `sys.exit` or not."""
    at_end = "import atexit, sys; atexit.register(lambda: print('\\n', *sorted(sys.modules)))"
    return {module.partition(".")[0] for module in run(f"{at_end}\n{code}").splitlines()[-1].split()}


def test_importing_the_package_imports_nothing_heavy() -> None:
    found = imported("import factorformer")
    assert "factorformer" in found
    assert not found & {*HEAVY, "rich", "safetensors", "typer"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_help_page_imports_nothing_heavy(command: str) -> None:
    found = imported(HELP.format(command))
    assert "rich" in found, "there was no page"
    assert not found & {*HEAVY}


@pytest.fixture(scope="module")
def fresh() -> Iterator[Interpreter]:
    """With what transformers imports, but not itself."""
    with Interpreter("import huggingface_hub, numpy, safetensors.torch, tokenizers, torch") as interpreter:
        yield interpreter


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("import") / "small"
    model = MODELS["bert"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    model.save_pretrained(path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(path)
    return path


LEAST = """
import sys
sys.modules.update(dict.fromkeys(["accelerate", "datasets", "peft", "rich", "scipy", "sklearn", "typer"]))
import factorformer
from transformers import AutoModel, AutoModelForMaskedLM
AutoModel.from_pretrained(sys.argv[1])
loaded, auto = factorformer.load(sys.argv[1]), AutoModelForMaskedLM.from_pretrained(sys.argv[1])
assert type(loaded) is type(auto) and "right" in str(loaded.state_dict().keys())
heavy = ("bench", "cli", "compression", "export", "fitting", "planning", "recipes", "report", "tasks", "training")
assert not [name for name in sys.modules if name.startswith(tuple(f"factorformer.{part}" for part in heavy))]
from factorformer.cli import main
for code in ("import factorformer.tasks.data", "main()"):
    try:
        exec(code)
    except (ImportError, SystemExit) as error:
        print(error, file=sys.stderr)
print("loaded")
"""


def test_loading_needs_neither_training_nor_what_only_extras_bring(compressed: Path, fresh: Interpreter) -> None:
    done = fresh.run(LEAST, compressed)
    assert done.stdout == "loaded\n", done.stderr
    assert "'accelerate': pip install 'factorformer[train]'" in done.stderr
    assert "error: this needs the package 'typer': pip install 'factorformer[cli]'\n2\n" in done.stderr


FIRST = """
import warnings, factorformer
from factorformer.errors import FactorformerWarning
warnings.simplefilter("error", FactorformerWarning)
import factorformer.hf.{}
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "factorformer" in AUTO_QUANTIZER_MAPPING
"""


@pytest.mark.parametrize("module", ["attachment", "dense"])
def test_any_module_of_the_plug_in_may_be_imported_first(module: str, fresh: Interpreter) -> None:
    done = fresh.run(FIRST.format(module))
    assert done.returncode == 0, done.stderr


BROKEN = """
import sys, warnings
sys.modules["factorformer.structures"] = None
warnings.simplefilter("always")
if sys.argv[2] == "first":
    import factorformer, transformers.quantizers.auto
else:
    import transformers.quantizers.auto, factorformer
from transformers import BertConfig, BertModel
model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
try:
    factorformer.registration.attach(model)
except ImportError as error:
    print("raised", error.name)
"""


@pytest.mark.parametrize("order", ["first", "last"])
def test_what_fails_in_the_plugin_breaks_no_other_package(order: str, compressed: Path, fresh: Interpreter) -> None:
    done = fresh.run(BROKEN, compressed, order)
    assert done.stdout == "raised factorformer.structures\n", done.stderr
    assert re.search("factorformer.*: ModuleNotFoundError", done.stderr)


def test_extras_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"sklearn": "scikit-learn", "onnx_ir": "onnxscript", "sentence_transformers": "sentence-transformers"}
    for extra, modules in EXTRAS.items():
        brought = {re.split("[>=<]", line)[0] for line in project["optional-dependencies"][extra]}
        assert {names.get(module, module) for module in modules} <= brought, extra
        always = {re.split("[>=<]", line)[0] for line in project["dependencies"]}
        assert not {names.get(module, module) for module in modules} & always, extra


FACTORIZED = """
import sys
assert sum(type(module).__name__ == "FactorizedLinear" for module in model.modules()) > 0
assert sum(type(finder).__module__ == "factorformer.registration" for finder in sys.meta_path) <= 1
"""

PROGRAMS = {
    "before transformers": """
import factorformer
from transformers import AutoModel, pipeline
model = AutoModel.from_pretrained(directory)
assert len(pipeline("feature-extraction", directory)("a film")[0]) == 4
""",
    "after a class and a model": """
from transformers import AutoModel, BertConfig, BertModel
BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
import factorformer
BertModel.from_pretrained(directory)
model = AutoModel.from_pretrained(directory)
""",
    "before sentence-transformers": """
import factorformer
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(directory)
assert model.encode(["a film"]).shape == (1, 32)
""",
    "its own reader": """
import factorformer.hf.plugin
# transformers may be importing this module when it imports the plug-in.
assert "transformers.modeling_utils" not in sys.modules
from factorformer.hf.checkpoint import load
model = load(directory)
""",
    "an import that fails at first, then the registry by itself": """
import factorformer
sys.modules["transformers.quantizers.base"] = None
try:
    import transformers.quantizers.auto
    raise AssertionError("the registry was imported without its base")
except ImportError:
    del sys.modules["transformers.quantizers.base"]
import transformers.quantizers.auto as registry
assert "factorformer" in registry.AUTO_QUANTIZER_MAPPING
from importlib.machinery import SourceFileLoader
assert type(registry.__loader__) is type(registry.__spec__.loader) is SourceFileLoader
from transformers import AutoModel
model = AutoModel.from_pretrained(directory)
""",
}


@pytest.mark.parametrize("order", PROGRAMS)
def test_plain_transformers_loads_a_compressed_model(order: str, compressed: Path, fresh: Interpreter) -> None:
    done = fresh.run(f"import sys\ndirectory = sys.argv[1]\n{PROGRAMS[order]}\n{FACTORIZED}", compressed)
    assert done.returncode == 0, done.stderr


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(factorformer.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(a.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert seen == set(factorformer._HOMES.items())
    assert {name for name, _ in seen} | {"__version__"} == set(factorformer.__all__)
    assert set(factorformer.__all__) <= set(dir(factorformer))


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'factorformer' has no attribute 'compres'"):
        factorformer.compres  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'compres'"):
        exec("from factorformer import compres")


@pytest.mark.parametrize("old", MOVED)
def test_old_names_of_modules_import_the_module_itself(old: str) -> None:
    before = importlib.import_module(MOVED[old]).__spec__
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])
    assert importlib.import_module(MOVED[old]).__spec__ is before

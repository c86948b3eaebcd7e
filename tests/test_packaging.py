"""What setup.py packages, and which room may import which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "sycoca", "train", "bench", "tests")
ALLOWED = {
    "kernels": {"kernels"},
    "sycoca": {"sycoca", "kernels"},
    "train": {"train", "sycoca", "kernels"},
    "bench": {"bench", "train", "sycoca", "kernels"},
    "tests": set(ROOMS),
}
LIMITED = {"triton": {"kernels", "bench", "tests"}, "deepspeed": {"train", "bench", "tests"}}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below(room):
    for path in sources(room):
        for name in imports(path):
            top = name.split(".")[0]
            if top in ROOMS:
                assert top in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"
            if top in LIMITED:
                assert room in LIMITED[top], f"{path.relative_to(ROOT)} imports {name}"


def test_transformers_is_imported_where_it_is_wrapped_and_by_nothing_that_runs_without_it():
    wrapped = {"swin.py": True, "bert.py": True, "backbones.py": False}
    for room in ("kernels", "sycoca", "train", "bench"):
        for path in sources(room):
            if not any(name.split(".")[0] == "transformers" for name in imports(path)):
                continue
            assert room == "sycoca" and path.name in wrapped, path.relative_to(ROOT)
            body = ast.parse(path.read_text(encoding="utf-8")).body
            first = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert wrapped[path.name] == any("transformers" in ast.unparse(node) for node in first), path.name
    for path in sources("sycoca"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        first = " ".join(ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom))
        assert not re.search(r"sycoca\.(swin|bert)\b", first), path.name


def test_models_use_only_public_names_of_kernels():
    public = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    names = {
        element.value
        for node in ast.walk(public)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        for element in node.value.elts
    }
    assert names
    for room in ("sycoca", "train"):
        for path in sources(room):
            used = [name for name in imports(path) if name.split(".")[0] == "kernels"]
            assert all(name.removeprefix("kernels.") in names for name in used), (path.name, used)


def test_the_reference_imports_torch_alone():
    for path in sorted((ROOT / "kernels").glob("reference*.py")):
        tops = {name.split(".")[0] for name in imports(path)}
        assert tops <= {"torch", "math", "typing", "__future__"} | set(sys.stdlib_module_names), tops


def test_public_surface_imports_without_triton_and_without_models():
    probe = (
        "import sys; sys.modules['triton'] = None; import kernels; "
        "assert not {'sycoca', 'deepspeed'} & set(sys.modules); print(kernels.implementations('fused_itc_loss'))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "'cpu'" in done.stdout, done.stderr
    assert done.stderr == ""


def test_setup_packages_kernels_and_models_and_names_its_extras():
    probe = (
        "import runpy, setuptools\n"
        "setuptools.setup = lambda **k: print(sorted(k['packages']), sorted(k['extras_require']))\n"
        "runpy.run_path('setup.py')"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    packages, extras = re.findall(r"\[.*?\]", done.stdout)
    tops = {name.split(".")[0] for name in ast.literal_eval(packages)}
    assert tops == {"kernels", "sycoca"}, done.stderr
    assert {"gpu", "peers", "openclip", "dev"} <= set(ast.literal_eval(extras))

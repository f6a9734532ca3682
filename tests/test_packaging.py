"""The wheel holds both packages and works away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT))
    (built,) = out.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    packages = (ROOT / "vllm_quantkit", ROOT / "kernels" / "quantkit_kernels")
    expected = {
        str(file.relative_to(package.parent))
        for package in packages
        for pattern in ("*.py", "py.typed", "tiles/*.json", "gate.txt")
        for file in package.rglob(pattern)
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_imports_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(site), str(wheel))
    code = (
        "import vllm_quantkit, quantkit_kernels.wna16, vllm_quantkit.formats as f;"
        "[f.get_format(name) for name in f.FORMATS];"
        "print(vllm_quantkit.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.stdout.strip().startswith(str(site))


def test_entry_point_is_declared() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="quantkit")
    assert entry.value == "vllm_quantkit.plugin:register"

"""Builds the host runtime with CMake and installs the start-up hook; everything else is in pyproject.toml."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The four code folders of the repository are one Python package.
PACKAGE_ROOTS = {
    "npu_compiler": "npu_compiler",
    "npu_compiler.passes": "passes",
    "npu_compiler.fusion_kernels": "fusion_kernels",
    "npu_compiler.runtime": "runtime",
}

# The library that lays out the graph of `npu-compiler inspect`: MIT licence, which is installed beside it.
DAGRE = "https://registry.npmjs.org/@dagrejs/dagre/-/dagre-3.1.3.tgz"
DAGRE_SHA256 = "12441833c8af49e5a241d94bfd53159875965876b3f4f3214abafe1ed6a9ee4c"
DAGRE_FILES = {"package/dist/dagre.min.js": "dagre.min.js", "package/LICENSE": "dagre.LICENSE"}


def all_packages() -> list[str]:
    found = []
    for package, folder in PACKAGE_ROOTS.items():
        found.append(package)
        found += [f"{package}.{child}" for child in find_packages(folder)]
    return found


def package_folder(name: str) -> Path:
    """Where a package is installed. Importing torch to find out would load torch_npu, which needs what we build."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"npu-compiler: building the host runtime needs {name}; install it first (see README.md, Setup)"
        )
    return Path(spec.origin).parent


def fetch_dagre(folder: Path) -> None:
    """Puts dagre into `folder`, unless it is there. A page that is opened from disk can load nothing: it carries it."""
    if all((folder / name).exists() for name in DAGRE_FILES.values()):
        return
    try:
        archive = urllib.request.urlopen(DAGRE, timeout=60).read()
    except OSError as error:
        raise SystemExit(
            f"npu-compiler: can't download {DAGRE}: {error}; let this machine reach it, or put the archive's "
            f"{' and '.join(DAGRE_FILES)} into {folder} as {' and '.join(DAGRE_FILES.values())}"
        ) from error
    if hashlib.sha256(archive).hexdigest() != DAGRE_SHA256:
        raise SystemExit(f"npu-compiler: {DAGRE} is not the file it was: its SHA-256 differs from the one in setup.py")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for path, name in DAGRE_FILES.items():
            (folder / name).write_bytes(files.extractfile(path).read())


class BuildHostRuntime(build_ext):
    """Runs CMake; the libraries go beside the loader, as `npu_compiler/runtime/lib/*.so`, and the module `graph_inputs`
    beside its interface. Fetches dagre."""

    def build_extension(self, ext: Extension) -> None:
        in_tree = self.inplace or self.editable_mode
        modules = ROOT if in_tree else Path(self.build_lib)
        fetch_dagre(modules / "npu_compiler" / "inspect" / "page" / "static" / "vendor")
        package = ROOT / "runtime" if in_tree else Path(self.build_lib) / "npu_compiler" / "runtime"
        output = package / "lib"
        # A wheel has a CMake tree of its own: the one of an editable install must go on writing into the sources.
        build_dir = ROOT / "build" / ("runtime" if in_tree else "wheel")
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('NPU_COMPILER_BUILD_TYPE', 'Release')}",
            f"-DTORCH_DIR={package_folder('torch')}",
            f"-DTORCH_NPU_DIR={package_folder('torch_npu')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DHOST_RUNTIME_OUTPUT_DIR={output.resolve()}",
            f"-DGRAPH_INPUTS_OUTPUT_DIR={(modules / 'npu_compiler' / 'aclgraph').resolve()}",
        ]  # fmt: skip
        if shutil.which("ccache"):
            configure.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)

    def copy_extensions_to_source(self) -> None:
        """An editable build already wrote into the source tree."""

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class DistributionWithStartupHook(Distribution):
    """Lets an editable install place data_files too; setuptools asks for `has_data`, which its own class lacks."""

    def has_data(self) -> bool:
        return bool(self.data_files)


site_packages = Path(os.path.relpath(sysconfig.get_path("purelib"), sys.prefix))
setup(
    packages=all_packages(),
    package_dir=PACKAGE_ROOTS,
    package_data={"npu_compiler.inspect.page": ["static/*", "static/vendor/*"]},
    include_package_data=False,
    distclass=DistributionWithStartupHook,
    ext_modules=[Extension("npu_compiler.runtime.lib", [])],
    cmdclass={"build_ext": BuildHostRuntime},
    # Start-up hook: lets the loader choose the CANN libraries before torch_npu is loaded (runtime/loader.py).
    data_files=[(str(site_packages), ["runtime/npu_compiler_runtime.pth"])],
)

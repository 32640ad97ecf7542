"""Runs the image's build steps without docker: each stage is a folder, and network tools have stand-ins."""

import fnmatch
import importlib.metadata
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.conftest import TGI_PYTHON

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "tgi_patch" / "docker" / "Dockerfile"
# what the steps name by absolute paths
_ABSOLUTE = re.compile(r"(?<![\w./$}-])/(?=(usr/src|opt|preft|source|wheel)\b)")
_FIND = (
    "import importlib.util; print(importlib.util.find_spec('text_generation_server').submodule_search_locations[0])"
)
_UV = """#!{python}
import subprocess, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.tgi.server.image import stand_in_uv
stand_in_uv(sys.argv[1:])
"""
_PIP = """#!/bin/sh
export PIP_NO_BUILD_ISOLATION=false PIP_NO_INDEX=1
exec {python} -m pip "$@"
"""


def instructions() -> list[tuple[str, str]]:
    """Returns (instruction, arguments) of the Dockerfile in order, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a path out of the build: the last pattern that matches it or a parent decides."""
    ignored = False
    parts = path.split("/")
    parents = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        names = parts if plain.startswith("**/") else parents
        if any(fnmatch.fnmatch(name, plain.removeprefix("**/")) for name in names):
            ignored = not pattern.startswith("!")
    return ignored


def build_context() -> list[str]:
    """Returns the files that docker would send to the build, from those that git knows."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return [name for name in names if not is_ignored(name, patterns)]


def real_tgi() -> Path | None:
    """Returns the folder of TGI's Python package, found without importing it; None without a TGI environment."""
    if not TGI_PYTHON.exists():
        return None
    found = subprocess.run([str(TGI_PYTHON), "-c", _FIND], capture_output=True, text=True)
    return Path(found.stdout.strip()) if found.returncode == 0 else None


class Build:
    """Runs the Dockerfile's steps in order. Each stage is a folder that stands for its root.

    `uv` and `pip` are stand-ins that reach no network. TGI's environment is a venv with the packages of this one and
    TGI's real sources, which raise when they are imported, as TGI does on a machine without a GPU.
    """

    def __init__(self, folder: Path, tgi: Path):
        self.folder, self.tgi = folder, tgi
        self.stages: dict[str, Path] = {}
        self.root = folder
        self.environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder)}
        _write(folder / "bin" / "uv", _UV.format(python=sys.executable, root=str(ROOT)))
        _write(folder / "bin" / "pip", _PIP.format(python=sys.executable))

    def run(self) -> None:
        for name, rest in instructions():
            if name == "FROM":
                self._begin(rest)
            elif name == "COPY":
                self._copy(rest)
            elif name == "RUN":
                self.shell(rest)
            elif name == "ENV":
                self.environment |= dict([rest.split("=", 1)])

    def shell(self, command: str) -> str:
        """Runs a command of the image and returns what it printed."""
        command = _ABSOLUTE.sub(f"{self.root}/", command)
        done = subprocess.run(
            ["sh", "-c", command], env=self.environment, cwd=self.root, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _begin(self, rest: str) -> None:
        image, _, stage = rest.partition(" AS ")
        self.root = self.folder / (stage or "final")
        self.stages[stage] = self.root
        self.root.mkdir()
        if image == "${TGI}":
            _make_tgi(self.root, self.tgi)

    def _copy(self, rest: str) -> None:
        *options, source, target = rest.split()
        destination = self.root / target.lstrip("/")
        if options:
            shutil.copytree(self.stages[options[0].removeprefix("--from=")] / source.lstrip("/"), destination)
            return
        for name in build_context():
            if source in (".", name):
                file = destination / name if source == "." else destination
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, file)


def stand_in_uv(arguments: list[str]) -> None:
    """`uv venv ... PATH`, and `uv pip install ... --python PYTHON ...` of wheels and of packages that are here."""
    words = [word for word in arguments if word not in {"--no-cache", "--no-deps"}]
    python = Path(words.pop(words.index("--python") + 1))
    words.remove("--python")
    assert python.exists(), python
    if words[0] == "venv":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", words[1]], check=True)
        return
    assert words[:2] == ["pip", "install"], words
    assert "--no-deps" in arguments
    for word in words[2:]:
        if word.endswith(".whl"):
            command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
            subprocess.run([*command, word], check=True)
            continue
        name, version = word.split("==")
        assert version
        _link(importlib.metadata.distribution(name), _packages(python.parents[1]))


def _make_tgi(root: Path, tgi: Path) -> None:
    environment = root / "usr" / "src" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    target = _packages(environment)
    # a package of this project in the image can only come from the wheel, and one of the gateway's from its own list
    others = {"aiohttp", "aiosignal", "multidict", "yarl", "frozenlist", "propcache", "attr", "attrs"}
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name not in others and not path.name.startswith(("preft", "__editable__", "tgi_patch", "__pycache__")):
            (target / path.name).symlink_to(path)
    server = target / "text_generation_server"
    shutil.copytree(tgi, server, ignore=shutil.ignore_patterns("__pycache__"))
    own = server / "__init__.py"
    text = own.read_text() if own.exists() else ""
    own.write_text(text + '\nraise NotImplementedError("System cpu doesn\'t support flash/paged attention")\n')
    _write(environment / "bin" / "text-generation-server", "#!/bin/sh\nexit 1\n")


def _link(distribution: importlib.metadata.Distribution, target: Path) -> None:
    for name in {Path(str(file)).parts[0] for file in distribution.files or [] if not str(file).startswith(".")}:
        if not (target / name).exists() and name != "__pycache__":
            (target / name).symlink_to(Path(str(distribution.locate_file(name))))


def _packages(environment: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)

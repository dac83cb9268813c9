"""Finding a ComfyUI, and talking to a server of it that runs this pack and nothing else."""

import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from .offline.sitecustomize import TRIED_FILE

ROOT = Path(__file__).parents[1]
HOW_TO_GET_IT = "no ComfyUI found: set COMFYUI_PATH to a checkout, or get one with 'comfy install' (comfy-cli)"
HOW_TO_GET_ITS_PYTHON = (
    "ComfyUI found at {path}, but not its requirements: install its requirements.txt here, "
    "or set COMFYUI_PYTHON to the Python that has them"
)


def find() -> Path | None:
    """COMFYUI_PATH, the ComfyUI in whose custom_nodes we are, or comfy-cli's workspace."""
    candidates = [
        os.environ.get("COMFYUI_PATH"),
        *(p.parent for p in Path(os.path.abspath(ROOT)).parents if p.name == "custom_nodes"),
    ]
    if comfy := shutil.which("comfy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])):
        which = subprocess.run([comfy, "--skip-prompt", "which"], capture_output=True, text=True, env=quiet_environment())
        candidates += [word.strip("'\"") for word in which.stdout.split() if os.sep in word]
    candidates.append(Path.home() / "comfy" / "ComfyUI")
    return next((Path(c) for c in candidates if c and (Path(c) / "main.py").exists()), None)


def python(comfyui: Path) -> str | None:
    """The Python that has ComfyUI's requirements."""
    if chosen := os.environ.get("COMFYUI_PYTHON"):
        return chosen
    if importlib.util.find_spec("comfyui_frontend_package"):
        return sys.executable
    places = [comfyui / venv / bin_folder for venv in (".venv", "venv") for bin_folder in ("bin/python", "Scripts/python.exe")]
    return next((str(place) for place in places if place.exists()), None)


def quiet_environment() -> dict[str, str]:
    return os.environ | {"DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}


def offline_environment(tried: Path) -> dict[str, str]:
    """For a Python that reaches no other machine and writes to a file what it tried."""
    path = os.pathsep.join([str(ROOT / "tests" / "offline"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return quiet_environment() | {"PYTHONPATH": path, TRIED_FILE: str(tried)}


class Server:
    """A ComfyUI server on a base folder of its own; use as a context manager."""

    def __init__(self, comfyui: Path, python: str, base: Path, *options: str):
        self.base, self.output = base, base / "output"
        (base / "custom_nodes").mkdir(parents=True)
        (base / "custom_nodes" / "distill-nodes").symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [python, "main.py", "--cpu", "--disable-api-nodes", "--listen", "127.0.0.1", "--port", str(self.port),
                   "--base-directory", str(base), "--database-url", "sqlite:///:memory:",
                   "--cache-ram", "0.1", *options, *shlex.split(os.environ.get("COMFYUI_OPTIONS", ""))]  # fmt: skip  # GB: what tests beside it need is no reason to forget
        self.log, self._tried = base / "server.log", base / "tried.log"
        with open(self.log, "w") as log:
            environment = offline_environment(self._tried)
            self.process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=log, env=environment)

    def __enter__(self):
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        assert not self.tried(), self.tried()

    def tried(self) -> str:
        """Other machines it tried to reach, one a line."""
        return self._tried.read_text() if self._tried.exists() else ""

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=10) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else {}

    def queue(self, prompt: dict) -> str:
        return self.post("prompt", {"prompt": prompt})["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = 600) -> "Result":
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if history := self.get(f"history/{prompt_id}"):
                return Result(history[prompt_id])
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)
        raise TimeoutError(f"prompt {prompt_id} took over {timeout_s} s")

    def run(self, prompt: dict) -> "Result":
        return self.wait(self.queue(prompt))


class Result:
    """What a prompt came to."""

    def __init__(self, entry: dict):
        self.outputs = entry["outputs"]
        self.messages = dict(entry["status"]["messages"])

    @property
    def succeeded(self) -> bool:
        return "execution_success" in self.messages

    @property
    def error(self) -> str:
        return self.messages["execution_error"]["exception_message"].strip()

    @property
    def interrupted(self) -> bool:
        return "execution_interrupted" in self.messages

    @property
    def cached(self) -> set[str]:
        return set(self.messages["execution_cached"]["nodes"])

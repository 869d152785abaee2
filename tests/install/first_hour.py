"""The first hour of a new user, from nothing: ``make test-install``.

Builds the wheel; lets pip install it with each extra into environments of its own, with the newest and with the oldest
versions that the wheel allows; installs the CPU server; serves, generates, chats; runs the examples' first steps. It
checks exit codes and first lines, and prints how long each step took. Needs a package index and about 6 GB of disk.

Not installed: the extra ``sglang`` (its requirements are several gigabytes of CUDA; only its own requirement is looked
up), and torch's lowest version (package indexes have it with CUDA only): every environment has the pinned torch.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from environments import (
    NOT_INSTALLED,
    ROOT,
    Environments,
    build_wheel,
    check_wheel,
    pip,
    requirements,
    user_environment,
)

QUESTION = "What is the capital of France?"
EVERY_NAME = "import torchrl_sglang as t; [getattr(t, name) for name in t.__all__]; print(len(t.__all__), 'names')"
# What each extra is for, in one line that needs no server.
FIRST_STEPS = {
    "": "import torchrl_sglang",
    "agents": "import torchrl_sglang.agents.generation, torchrl_sglang.agents.http.app, torchrl_sglang.agents.gateway",
    "images": "import io, PIL.Image; from torchrl_sglang.chat.data_urls import media_url; "
    "print(media_url(PIL.Image.new('RGB', (2, 2)), 'image')[:10])",
    "lora": "import peft; from torchrl_sglang.testing import make_tiny_model; import tempfile, transformers as t; "
    "m = t.AutoModelForCausalLM.from_pretrained(make_tiny_model(tempfile.mkdtemp() + '/m')); "
    "print(type(peft.get_peft_model(m, peft.LoraConfig(target_modules=['q_proj']))).__name__)",
    "ray": "import ray; from torchrl_sglang.ray_servers import launch_on_ray",
    "recipes": "from torchrl_sglang import recipes; recipes.make_task",
    "router": "from torchrl_sglang.config import RouterConfig; from torchrl_sglang.server import SGLangRouter; "
    "r = SGLangRouter(RouterConfig()).start(); print(r.url); r.stop()",
    "smollm2": "import accelerate, gguf",
}


class FirstHour:
    """The steps, in order; each prints a line with its duration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        self.environment = user_environment(self.home)
        self.started = time.monotonic()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        print(f"{time.monotonic() - start:6.0f} s  {what}", flush=True)

    def run(self, words: Sequence[str | Path], *, code: int = 0, stdin: str = "", timeout_s: float = 1500) -> str:
        """Run a command as the new user; returns both outputs. Another exit code, or a traceback, ends this program."""
        done = subprocess.run(
            [*map(str, words)],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.home,
            env=self.environment,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != code or "Traceback" in done.stdout:
            command = " ".join(map(str, words))
            raise SystemExit(
                f"{command}\nended with exit code {done.returncode}, expected {code}:\n{done.stdout[-6000:]}"
            )
        return done.stdout

    def expect(self, said: str, *patterns: str) -> None:
        for pattern in patterns:
            if not re.search(pattern, said):
                raise SystemExit(f"{pattern!r} is not in the output:\n{said[-6000:]}")

    # -------------------------------------------------------------------------------------------------------- versions

    def extras(self, environments: Environments, only: Sequence[str] | None = None) -> None:
        """Each extra (or ``only`` some) alone, newest and oldest: pip resolves it, first step and all names work."""
        required = requirements(environments.wheel)
        for extra in only or ("", *(name for name in required if name and name not in NOT_INSTALLED)):
            for lowest in (False, True):
                label = f"{extra or 'no extra'}, {'lowest' if lowest else 'highest'} versions"
                with self.step(f"pip install: {label}"):
                    name = f"{extra or 'base'}-{'lowest' if lowest else 'highest'}"
                    python = environments.install(name, [extra] if extra else [], lowest=lowest)
                    self.run([python, "-c", FIRST_STEPS[extra]])
                    self.expect(self.run([python, "-c", EVERY_NAME]), r"\d+ names")
                shutil.rmtree(environments.folder / name)
        with self.step("the requirement of the extra sglang exists"):
            (requirement,) = required["sglang"]
            pip(Path(sys.executable), "download", "--quiet", "--no-deps", "--dest", self.folder / "sglang", requirement)

    # ------------------------------------------------------------------------------------------------------- the hour

    def before_the_server(self, command: Path) -> None:
        with self.step("help and version"):
            self.expect(self.run([command, "--help"]), "install-cpu-server")
            self.expect(self.run([command, "version"]), "sglang +not installed: torchrl-sglang install-cpu-server")
        with self.step("without a server, each command says what to do"):
            said = self.run([command, "doctor"], code=1)
            self.expect(said, r"FAIL +server's Python", "install-cpu-server")
            said = self.run([command, "generate", "Hi", "--model", "SmolLM2"], code=2)
            self.expect(said, "no Python with SGLang was found", "install-cpu-server")

    def serve_and_generate(self, command: Path) -> None:
        with self.step("install-cpu-server"):
            self.expect(self.run([command, "install-cpu-server"]), "ready .*/cpu-server/bin/python")
        with self.step("generate: the first sentence (downloads and converts SmolLM2)"):
            said = self.run([command, "generate", "--model", "SmolLM2", "--chat", QUESTION, "--temperature", "0"])
            self.expect(said, "The capital of France is Paris", "importing SGLang")
        print(f"{time.monotonic() - self.started:6.0f} s  so far, from nothing to the first sentence", flush=True)
        with self.step("doctor"):
            self.expect(self.run([command, "doctor"]), "all checks passed")

    def with_a_server(self, command: Path, oldest: Path) -> None:
        """One server for the rest: generate, chat, and a step of training with the oldest versions."""
        with self.step("serve"):
            log = (self.folder / "serve.log").open("w")
            words = [command, "serve", "SmolLM2", "--quiet"]
            server = subprocess.Popen(
                [*map(str, words)], stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment
            )
            assert server.stdout is not None
            ready = server.stdout.readline()
            self.expect(ready + Path(log.name).read_text(), "^ready http://127.0.0.1:30000")
        try:
            with self.step("generate -n 2, chat and doctor with the running server"):
                said = self.run([command, "generate", "--chat", QUESTION, "-n", "2", "--max-new-tokens", "8"])
                self.expect(said, "--- response 1 of 2 ---\n.+\n--- response 2 of 2 ---\n.+")
                said = self.run([command, "chat", "--temperature", "0"], stdin=f"{QUESTION}\n/exit\n")
                self.expect(said, "Paris")
                self.expect(self.run([command, "doctor", "http://127.0.0.1:30000"]), "all checks passed")
            with self.step("grpo.py, one step, with the lowest versions"):
                words = [f"engine.url={ready.split()[1]}", "run.folder=lowest", "train.steps=1", "train.questions=1"]
                said = self.run([oldest, ROOT / "examples" / "grpo.py", *words])
                self.expect(said, r"step +1 \| reward", "Report, metrics and weights are in lowest/")
        finally:
            server.terminate()
            server.wait(60)
            log.close()

    def train(self, python: Path) -> None:
        with self.step("grpo_minimal.py, two steps"):
            code = (ROOT / "examples" / "grpo_minimal.py").read_text()
            assert "STEPS, BATCH, ANSWERS = 16" in code
            script = self.home / "my_task.py"
            script.write_text(code.replace("STEPS, BATCH, ANSWERS = 16", "STEPS, BATCH, ANSWERS = 2"))
            self.expect(self.run([python, script]), r"weights v1  reward 0\.\d+", r"weights v2  reward 0\.\d+")
        print(f"{time.monotonic() - self.started:6.0f} s  so far, from nothing to the first trained step", flush=True)
        with self.step("grpo.py, two steps"):
            recipe = ROOT / "examples" / "grpo.py"
            said = self.run([python, recipe, "train.steps=2"])
            self.expect(said, r"step +2 \| reward", "Report, metrics and weights are in outputs/quickstart/")
            assert "\r" not in said, "a log file gets no carriage returns"
        with self.step("a second run, and a mistyped option, are refused"):
            self.expect(self.run([python, recipe, "train.steps=2"], code=1), "--resume outputs/quickstart")
            self.expect(self.run([python, recipe, "--step", "2"], code=2), "key=value: train.steps=2")


def main() -> None:
    """Run all steps in a temporary folder, which is removed at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["extras", "hour"], help="one half: the versions of each extra, or the hour")
    parser.add_argument("--extra", action="append", choices=FIRST_STEPS, help="of all extras only this one; repeatable")
    args = parser.parse_args()
    only = "extras" if args.extra else args.only
    with tempfile.TemporaryDirectory(prefix="torchrl-sglang-install-") as name:
        hour = FirstHour(Path(name))
        with hour.step("build the wheel"):
            wheel = build_wheel(hour.folder)
            check_wheel(wheel)
        with hour.step("pip install: torch"):
            environments = Environments(hour.folder, wheel)
        if only != "extras":
            with hour.step("pip install: torchrl-sglang[recipes]"):
                python = environments.install("user", ["recipes"])
            command = python.with_name("torchrl-sglang")
            hour.before_the_server(command)
            hour.serve_and_generate(command)
            hour.train(python)
            hour.with_a_server(command, environments.install("oldest", ["recipes"], lowest=True))
        if only != "hour":
            hour.extras(environments, args.extra)
        print(f"{time.monotonic() - hour.started:6.0f} s  in all; the first hour works")


if __name__ == "__main__":
    main()

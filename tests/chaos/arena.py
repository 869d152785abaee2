"""One fleet with its trainer, and the disturbances that befall them: drawn from a seed, counted."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.seats import Seat
from tests.fake_sglang import Fault
from tests.loop.forked_processes import Forked, ProcessFactory, wait_until

__all__ = ["Arena"]

TRANSPORTS = ("shared", "disk", "auto", "per_server", "http")
UPDATE_PATHS = (
    *("/init_weights_update_group", "/pause_generation", "/begin_weight_update", "/update_weights_from_distributed"),
    *(
        "/update_weights_from_disk",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/update_weight_version",
        "/continue_generation",
    ),
    *("/weights_checker", "/model_info", "/v1/loads"),
)
END_TIMEOUT_S = 400.0


class Arena:
    """A fleet, one trainer after the other, and what happens to them.

    Args:
        name: kind of the servers, ``fake`` or ``real``.
        seats: the servers.
        processes: forks the trainers.
        model: the servers' checkpoint.
        folder: an empty folder for the journals.
        seed: draws the disturbances.
        pause_s: shortest and longest time between two disturbances, in seconds.
        has_faults: whether the servers can be made to refuse, die and drop at a point of a request.
        restart_every_s: shortest time between two restarts of servers, for servers that take long to start.

    Attributes:
        events: time, kind and target of every disturbance.
        trainer_pids: the process of each trainer.
    """

    def __init__(
        self,
        name: str,
        seats: Sequence[Seat],
        processes: ProcessFactory,
        *,
        model: Path,
        folder: Path,
        seed: int,
        pause_s: tuple[float, float],
        has_faults: bool,
        restart_every_s: float,
    ) -> None:
        self.name = name
        self.seats = list(seats)
        self.folder = folder
        self.events: list[tuple[float, str, str]] = []
        self.trainer_pids: list[int] = []
        self._processes = processes
        self._model = model
        self._seed = seed
        self._pause_s = pause_s
        self._random = random.Random(seed)
        self._lives = 0
        self._dead: set[str] = set()
        self._restart_every_s = restart_every_s
        self._next_restart_at = 0.0
        self._pending: list[tuple[float, Callable[[], None]]] = []
        self._trainer: Forked | None = None
        self._makers: dict[str, Callable[[Seat], None]] = {
            "killed, restarted later": self._kill,
            "restarted by others": lambda seat: seat.restart(),
            "frozen": self._freeze,
            "trainer killed and replaced": lambda _: self._replace_trainer(),
            "disk full": lambda _: self._fill_disk(),
            "cut off": lambda seat: self._disturb_network(seat, "refuse"),
            "silent": lambda seat: self._disturb_network(seat, "silent"),
            "slow": lambda seat: self._disturb_network(seat, "slow"),
        }
        if has_faults:
            self._makers |= {
                "update refused": lambda seat: seat.arm(self._fault("refuse")),
                "died in an update": lambda seat: seat.arm(self._fault("die")),
                "dropped in an update": lambda seat: seat.arm(self._fault("drop")),
                "slow at a request": lambda seat: seat.arm(Fault(path="*", action="slow", seconds=0.5, times=4)),
                "half a reply": lambda seat: seat.arm(Fault(path="/generate", action="half_reply")),
            }
        for sub in ("versions", "weights"):
            (folder / sub).mkdir(parents=True)

    def run(self, seconds: float) -> None:
        """Start a trainer, disturb for ``seconds``, end all disturbances, and wait for the trainer to finish."""
        start = time.monotonic()
        self._next_restart_at = start + self._restart_every_s / 2
        self._start_trainer()
        kinds: list[str] = []
        next_at = start + 2.0
        while (now := time.monotonic()) < start + seconds:
            for due in [each for each in self._pending if each[0] <= now]:
                self._pending.remove(due)
                due[1]()
            self._restart_the_dead()
            if now >= next_at:
                kinds = kinds or self._random.sample(sorted(self._makers), len(self._makers))  # each as often as others
                self._disturb(kinds.pop(), now - start)
                next_at = time.monotonic() + self._random.uniform(*self._pause_s)
            time.sleep(0.02)
        self._end_disturbances()
        (self.folder / "stop").touch()
        assert self._trainer is not None
        trainer = self._trainer
        wait_until(lambda: not trainer.is_running, f"the trainer of {self.name} does not end", END_TIMEOUT_S)

    @property
    def counts(self) -> Counter[str]:
        """How often each disturbance happened."""
        return Counter(kind for _, kind, _ in self.events)

    def close(self) -> None:
        """End everything that still runs."""
        if self._trainer is not None:
            self._trainer.kill()
        for seat in self.seats:
            seat.close()

    # ------------------------------------------------------------------ disturbances

    def _disturb(self, kind: str, at_s: float) -> None:
        seats = self.seats
        if "restarted" in kind:
            if time.monotonic() < self._next_restart_at or self._dead:
                return
            self._next_restart_at = time.monotonic() + self._restart_every_s
        if kind in ("cut off", "silent", "slow"):
            seats = [seat for seat in seats if seat.proxy is not None]
        seat = self._random.choice(seats)
        self.events.append((round(at_s, 2), kind, seat.url))
        self._makers[kind](seat)

    def _later(self, low_s: float, high_s: float, action: Callable[[], None]) -> None:
        self._pending.append((time.monotonic() + self._random.uniform(low_s, high_s), action))

    def _kill(self, seat: Seat) -> None:
        self._dead.add(seat.url)
        seat.kill()
        self._later(0.5, 5.0, lambda: self._restart(seat))

    def _freeze(self, seat: Seat) -> None:
        seat.freeze()
        self._later(0.5, 8.0, seat.thaw)

    def _disturb_network(self, seat: Seat, mode: Any) -> None:
        proxy = seat.proxy
        assert proxy is not None
        proxy.set(mode, delay_s=self._random.choice([0.02, 0.2]))
        self._later(0.5, 6.0, lambda: proxy.set("open"))

    def _fill_disk(self) -> None:
        flag = self.folder / "disk-full"
        flag.touch()
        self._later(1.0, 5.0, lambda: flag.unlink(missing_ok=True))

    def _fault(self, action: Any) -> Fault:
        path = self._random.choice(UPDATE_PATHS)
        at = "handled" if path == "/v1/loads" or action == "drop" else self._random.choice(["arrived", "handled"])
        return Fault(path=path, action=action, at="arrived" if action == "refuse" else at)

    def _restart_the_dead(self) -> None:
        """A fault ends a server at some time; whoever supervises it starts it again."""
        for seat in self.seats:
            if not seat.is_running and seat.url not in self._dead:
                self._dead.add(seat.url)
                self._later(0.5, 5.0, lambda seat=seat: self._restart(seat))

    def _restart(self, seat: Seat) -> None:
        self._dead.discard(seat.url)
        seat.restart()

    def _end_disturbances(self) -> None:
        for _, action in self._pending:
            action()
        self._pending.clear()
        for seat in self.seats:
            seat.thaw()
            seat.settle()
            if not seat.is_running:
                seat.restart()
                seat.settle()
        (self.folder / "disk-full").unlink(missing_ok=True)

    # ------------------------------------------------------------------ the trainer

    def _start_trainer(self) -> None:
        settings = {
            "kind": self.name,
            "urls": [seat.url for seat in self.seats],
            "model": str(self._model),
            "folder": str(self.folder),
            "life": self._lives,
            "seed": self._seed,
            "transport": TRANSPORTS[self._lives % len(TRANSPORTS)],
        }
        self._lives += 1
        self._trainer = self._processes.start_function("tests.chaos.trainer:train", settings)
        self.trainer_pids.append(self._trainer.pid)

    def _replace_trainer(self) -> None:
        assert self._trainer is not None
        self._trainer.kill()
        self._start_trainer()

"""One life of a trainer: rollouts in threads, GRPO-like steps, and a push after each; until a file tells it to stop.

It treats errors as a user's loop does: a batch that failed is asked again, and after a failed push comes the next step.
Everything else that it raises is a finding.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.chaos.journal import Journal, read_journals
from tests.chaos.limits import CLIENT, GENERATE_S, sync_config
from tests.fake_sglang.model import read_checkpoint, signature
from torchrl_sglang import SamplingParams, SGLangError, WeightSync, WeightSyncError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["prompt_ids", "train"]

_BATCHES = 3  # threads that send batches
_BATCH_SIZE = 6
_STREAMS = 1
_TRAIN_ON = 12
_SMALL_FILE = 50_000  # bytes; a full disk for a checkpoint of 460 kB
_SETTLE_S = 90.0


def prompt_ids(number: int) -> list[int]:
    """The tokens of a prompt, of different lengths; no two numbers have the same."""
    tail = random.Random(number).choices(range(3, 300), k=number % 9)
    return [1, 3 + number % 250, 3 + number // 250 % 250, *tail]


class Prompts:
    """The numbers of the prompts: which are answered, which under way, which come next. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        asked, answered = set[int](), set[int]()
        for record in read_journals(folder):
            if record["kind"] == "asked":
                asked |= set(record["prompts"])
            elif record["kind"] == "answers":
                answered |= {answer["prompt"] for answer in record["answers"]}
        self._again = deque(sorted(asked - answered))
        self._next = max(asked, default=-1) + 1
        self._under_way = 0
        self.no_more = False

    def take(self, most: int) -> list[int]:
        """Some prompts, those first that were asked before."""
        with self._lock:
            taken = [self._again.popleft() for _ in range(min(most, len(self._again)))]
            if not self.no_more and not taken:
                taken = list(range(self._next, self._next + most))
                self._next += most
            self._under_way += len(taken)
            return taken

    def answered(self, numbers: list[int]) -> None:
        """They have their answers."""
        with self._lock:
            self._under_way -= len(numbers)

    def failed(self, numbers: list[int]) -> None:
        """They have none, and are asked again."""
        with self._lock:
            self._under_way -= len(numbers)
            self._again.extend(numbers)

    @property
    def all_done(self) -> bool:
        """Whether no prompt is left, now that there are no more."""
        with self._lock:
            return self.no_more and not self._again and not self._under_way


class Trainer:
    """See :func:`train`."""

    def __init__(
        self, *, kind: str, urls: list[str], model: str, folder: str, life: int, seed: int, transport: str
    ) -> None:
        self.folder = Path(folder)
        self.prompts = Prompts(self.folder)
        self.journal = Journal(self.folder / f"journal-{life:04}.jsonl")
        self.random = random.Random(f"{seed}/{life}")
        self.pool = SGLangPool([SGLangClient(url, CLIENT) for url in urls])
        self.urls = list(urls)
        self.transport = transport
        self.sync = WeightSync(self.pool, sync_config(transport, self.folder / "weights", kind=kind))
        self.checkpoint = read_checkpoint(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        torch.manual_seed(seed + 1000 * life)
        self.recent: deque[tuple[list[int], list[int]]] = deque(maxlen=_TRAIN_ON)

    def run(self) -> None:
        """Work until the file ``stop`` appears; then answer every prompt, heal every server, and close."""
        self.journal.write("life", transport=self.transport, owner=self.sync.owner)
        workers = [threading.Thread(target=self._batches, args=(i,), daemon=True) for i in range(_BATCHES)]
        workers += [threading.Thread(target=self._streams, daemon=True) for _ in range(_STREAMS)]
        while not self._has_connected():
            time.sleep(0.2)
        for worker in workers:
            worker.start()
        members = threading.Thread(target=self._change_members, daemon=True)
        if hasattr(self.pool, "add"):
            members.start()
        while not self._is_to_stop:
            self._step()
            time.sleep(self.random.uniform(0.05, 0.6))
        start = time.monotonic()
        if members.ident is not None:
            members.join()
        while not (self._step() and self._all_serve()) and time.monotonic() < start + _SETTLE_S:
            time.sleep(0.5)
        settled_s = time.monotonic() - start
        self.prompts.no_more = True
        while not self.prompts.all_done and time.monotonic() < start + 2 * _SETTLE_S:
            time.sleep(0.05)
        serving = [self._serves(client) for client in self.pool.clients]
        self.sync.close()
        self.pool.close()
        self.journal.write(
            "end",
            settled_s=settled_s,
            all_answered=self.prompts.all_done,
            serving=serving,
            quarantined=dict(self.pool.quarantined),
        )

    # ------------------------------------------------------------------ rollouts

    def _batches(self, index: int) -> None:
        choose = random.Random(f"{self.random.random()}/{index}")
        while True:
            numbers = self._take(_BATCH_SIZE)
            if not numbers:
                return
            sampling = SamplingParams(max_new_tokens=choose.randint(1, 32), temperature=1.0, ignore_eos=True)
            with self._asking(numbers, "generate") as answer:
                ids_B_T = [prompt_ids(number) for number in numbers]
                replies = self.pool.generate(ids_B_T, sampling, timeout_s=GENERATE_S)
                answer(replies)

    def _streams(self) -> None:
        sampling = SamplingParams(max_new_tokens=12, temperature=1.0, ignore_eos=True)
        while True:
            numbers = self._take(1)
            if not numbers:
                return
            with self._asking(numbers, "stream") as answer:
                *_, last = self.pool.stream(prompt_ids(numbers[0]), sampling, timeout_s=GENERATE_S)
                answer([last])

    def _take(self, most: int) -> list[int]:
        while not self.prompts.all_done:
            numbers = self.prompts.take(most)
            if numbers:
                return numbers
            time.sleep(0.05)
        return []

    @contextmanager
    def _asking(self, numbers: list[int], what: str) -> Iterator[Callable[[list[GenerateReply]], None]]:
        """Write down that prompts are asked; then what came of it: the block's answers, or its error."""
        answers: list[GenerateReply] = []
        self.journal.write("asked", prompts=numbers)
        start, error = time.monotonic(), None
        try:
            yield answers.extend
        except SGLangError as caught:
            error = caught
        except BaseException:
            self.journal.write("crash", traceback=traceback.format_exc())
            raise
        seconds = time.monotonic() - start
        self.journal.write("wait", what=what, seconds=seconds, error=error and f"{type(error).__name__}: {error}")
        if error is not None:
            self.prompts.failed(numbers)
            time.sleep(0.1)
            return
        if len(answers) != len(numbers):
            self.journal.write("crash", traceback=f"{len(answers)} replies to {len(numbers)} prompts")
        self.journal.write("answers", answers=[_answer(n, reply) for n, reply in zip(numbers, answers, strict=False)])
        self.prompts.answered(numbers)
        self.recent += [(prompt_ids(n), reply.output_ids) for n, reply in zip(numbers, answers, strict=False)]

    # ------------------------------------------------------------------ members

    @property
    def _is_to_stop(self) -> bool:
        return (self.folder / "stop").exists()

    def _all_serve(self) -> bool:
        return not self.pool.quarantined and len(self.pool.clients) == len(self.urls)

    def _change_members(self) -> None:
        """Take a server out and in again, over and over; in the end, all are in."""
        choose = random.Random(f"{self.random.random()}/members")
        out: list[str] = []
        while not self._is_to_stop:
            time.sleep(choose.uniform(0.5, 4.0))
            if not out and len(self.urls) > 2:
                url = choose.choice(self.urls)
                drain = choose.random() < 0.7
                if self._change("remove", url, lambda url=url, d=drain: self.pool.remove(url, drain=d, timeout_s=5)):
                    out.append(url)
            elif out and self._change("add", out[0], lambda: self.pool.add(out[0])):
                out.pop()
        start = time.monotonic()
        while out and time.monotonic() < start + _SETTLE_S:
            if self._change("add", out[0], lambda: self.pool.add(out[0])):
                out.pop()
            else:
                time.sleep(0.5)

    def _change(self, what: str, url: str, call: Callable[[], object]) -> bool:
        start, error = time.monotonic(), None
        try:
            call()
        except SGLangError as caught:
            error = f"{type(caught).__name__}: {caught}"
        except BaseException:
            self.journal.write("crash", traceback=traceback.format_exc())
            raise
        self.journal.write("wait", what=what, url=url, seconds=time.monotonic() - start, error=error)
        return error is None

    # ------------------------------------------------------------------ training

    def _has_connected(self) -> bool:
        try:
            self.sync.reach(CLIENT.update_timeout_s)
        except SGLangError as error:
            self.journal.write("not connected", error=f"{type(error).__name__}: {error}")
            return False
        return True

    def _step(self) -> bool:
        """One optimizer step and a push; whether the push succeeded."""
        self._train_step()
        version = WeightVersion(number=self.pool.state.weights.next_version, owner=self.sync.owner)
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        torch.save(state, self.folder / "versions" / f"{version}.pt")
        self.journal.write(
            "version", version=str(version), signature=signature({name: state[name] for name in self.checkpoint})
        )
        is_full = self.transport == "disk" and (self.folder / "disk-full").exists()
        start, error = time.monotonic(), None
        try:
            with self._full_disk() if is_full else nullcontext():
                self.sync.push(self.model, version=version.number)
        except SGLangError as caught:
            error = caught
        self.journal.write(
            "push",
            version=str(version),
            seconds=time.monotonic() - start,
            disk_full=is_full,
            error=error and f"{type(error).__name__}: {error}",
            server_weights=error.server_weights if isinstance(error, WeightSyncError) else {},
        )
        return error is None

    def _train_step(self) -> None:
        """REINFORCE with random advantages, and some noise: every version differs from every other."""
        loss = torch.zeros(())
        for prompt, output in list(self.recent)[-4:]:
            ids = torch.tensor([prompt + output])
            scores = self.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            loss = loss - self.random.gauss(0, 1) * scores.gather(1, ids[0, len(prompt) :, None]).mean()
        if loss.requires_grad:
            loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad.clamp(-1, 1)
                    parameter.grad = None
                parameter += 0.02 * parameter.std().nan_to_num(0.0) * torch.randn_like(parameter)

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        """This process can write no large file; its other threads write none meanwhile."""
        with ExitStack() as stack:
            stack.enter_context(self.journal.lock)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL_FILE, limits[1]))
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            yield

    def _serves(self, client: SGLangClient) -> str:
        """The version with which a server answers at the end, or why it does not."""
        try:
            (reply,) = SGLangPool([client]).generate([[1, 5]], SamplingParams(max_new_tokens=2), timeout_s=GENERATE_S)
        except SGLangError as error:
            return f"{type(error).__name__}: {error}"
        return reply.weight_version


def _answer(number: int, reply: GenerateReply) -> dict[str, Any]:
    spans = [[span.version, span.start, span.end] for span in reply.weight_spans if span.end > span.start]
    return {
        "prompt": number,
        "ids": reply.output_ids,
        "logprobs": reply.output_logprobs,
        "spans": spans or [[reply.weight_version, 0, len(reply.output_ids)]],
        "server": reply.server,
        "finish": reply.finish_reason,
    }


def train(settings: dict[str, Any], report: Callable[[Any], None]) -> None:
    """Run one life of a trainer; called in a process of its own.

    Args:
        settings: ``kind`` and ``urls`` of the servers, ``model`` folder, ``folder`` of the run, number of this
            ``life``, ``seed`` and ``transport``.
        report: called at the end.
    """
    torch.set_num_threads(1)
    with (Path(settings["folder"]) / f"log-{settings['life']:04}.txt").open("w") as log:
        os.dup2(log.fileno(), 2)
    trainer = Trainer(**settings)
    try:
        trainer.run()
    except BaseException:
        trainer.journal.write("crash", traceback=traceback.format_exc())
        raise
    del trainer  # this process ends by os._exit, which runs no finalizer
    gc.collect()
    report("done")

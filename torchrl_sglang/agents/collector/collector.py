"""``AgentCollector``: runs agents through a gateway, and yields their conversations as a TorchRL collector does."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from torchrl_sglang.agents.collector.failures import RunFailure
from torchrl_sglang.agents.collector.groups import Groups, GroupSettings
from torchrl_sglang.agents.collector.loop_thread import LoopThread
from torchrl_sglang.agents.collector.rows import Role, RowReward, make_batch
from torchrl_sglang.agents.collector.runners import RunAgent, make_runner
from torchrl_sglang.agents.collector.session_runs import SessionRuns
from torchrl_sglang.agents.collector.task_stream import TaskStream
from torchrl_sglang.agents.gateway import AgentGateway
from torchrl_sglang.agents.remote_gateway import RemoteGateway
from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.errors import ConfigError

__all__ = ["AgentCollector"]


class AgentCollector(BaseCollector):
    """Runs an agent on tasks, several times on each, and yields what its model sampled, for training.

    An agent is any program with an OpenAI client. For each run the collector makes a session at the gateway and gives
    its ``base_url`` and ``api_key`` to the agent; the gateway records the tokens. A batch has complete groups only: all
    ``group_size`` runs of a task. A group is replaced by the next task if one of its runs fails (it raises, times out,
    gives no finite reward, or samples nothing), or if all its rewards are equal. :meth:`stats` counts them, and
    :attr:`failures` says what happened.

    Args:
        gateway: a running gateway, of this process or a :class:`RemoteGateway`. It stays open at :meth:`shutdown`.
        run_agent: an async or plain function ``(task, base_url, api_key) -> reward``, or a command line. A reward is a
            finite number, or ``{"reward": number, "info": {...}}``; a function that returns ``None`` posts it to
            ``.../reward``. Async functions share one event loop, plain functions have a thread each. In a command line
            ``{base_url}``, ``{api_key}`` and ``{task}`` are replaced, without a shell; its reward is the last line of
            its output, unless it posts one. All its processes are killed at its end.
        tasks: any iterable of tasks. Each run of a function gets one with copies of its dicts, lists and sets. Tasks of
            a command are strings, or are written as JSON.
        group_size: runs of each task.
        concurrency: most runs at a time.
        timeout_s: longest time of one run, and of ``row_reward`` and ``role`` for it. A plain function can't be
            interrupted: its session ends, and its thread lives until the function returns.
        groups_per_batch: groups of each yielded batch.
        epochs: passes over ``tasks``; ``None`` never ends. A sequence is shuffled in each pass after :meth:`set_seed`.
        total_frames: end when so many rows were yielded; -1 ends with the tasks.
        retries: how often a failed run is run again before its group is replaced.
        skip_equal: replace groups whose rewards are all equal, which give no advantage.
        max_skips: most groups that are replaced one after the other; then collecting ends with an error.
        max_failures: most groups that fail one after the other; then collecting ends with an error.
        ahead: batches that are run beyond those taken. 0: nothing runs while the trainer trains. 1 or more: collecting
            continues, and tokens are at most ``ahead`` updates old, if there is one update per batch.
        max_staleness: most weight updates since a group's oldest token was sampled; older groups are replaced.
        row_reward: the reward of one row, as a function of its :class:`Trajectory`, which has the run's ``reward``,
            ``info`` and ``tags``; ``None`` gives each row its run's reward.
        role: the part that a row played in its run, such as ``"solver"``, as a function of its trajectory:
            :func:`group_advantages` and ``skip_equal`` compare rewards of one role.
        weight_sync_schemes: ``{"policy": scheme}``, for :meth:`update_policy_weights_`.

    Attributes:
        group_size: runs of each task.
        groups_per_batch: groups of each batch.

    Raises:
        ConfigError: a bad argument, or a gateway that is not running.
        SGLangError: as ``scheme.connect()``.

    Yields:
        A ragged, lazily stacked TensorDict of shape ``(B,)``: one row per trajectory, group by group and run by run.
        ``B`` is ``groups_per_batch * group_size``, or more where a session's conversation has branches: each of its
        leaves is a row and has the session's reward, unless ``row_reward`` gives it another. The last batch may have
        fewer groups.

        * ``tokens``, ``masks``, ``log_probs``, ``text``: as :class:`SGLangWrapper` writes them. The prompt ends before
          the row's first token that is trained on. ``masks.all_assistant_mask`` marks sampled tokens, each in one row
          of a session only; log-probs are NaN elsewhere, which the losses of TorchRL 0.14 leave out.
        * ``generation``: ``weight_version`` per response token, -1 where it was not sampled; ``policy_version``, the
          oldest of them; ``truncated``: the last answer reached its length limit; ``temperature``, NaN if several.
        * ``("next", "reward")``: float32, ``(B, 1, 1)``; ``("next", "done")``: bool, ``(B, 1)``; ``("next", "right")``
          if every run's info has a bool ``right``.
        * ``turn``: int64, the number of the answer in its conversation per token of ``tokens.full``, -1 where none is
          trained on; ``role``: text.
        * ``group_id``: int64, the number of the task; ``position``: the task's own ``"position"``, if it has one;
          ``member``: the run's number in its group; ``query``: the task as text; ``session``, ``info``, ``messages``
          (JSON).

    Examples:
        >>> async def run_agent(task, base_url, api_key):                               # doctest: +SKIP
        ...     client = AsyncOpenAI(base_url=base_url, api_key=api_key)
        ...     said = await client.chat.completions.create(model="any", messages=[...])
        ...     return float(task["answer"] in said.choices[0].message.content)
        >>> scheme = SGLangWeightSyncScheme(servers)                                    # doctest: +SKIP
        >>> with AgentGateway(servers) as gateway, AgentCollector(                      # doctest: +SKIP
        ...     gateway, run_agent, tasks, group_size=8, weight_sync_schemes={"policy": scheme}
        ... ) as collector:
        ...     for batch in collector:
        ...         train_step(actor, group_advantages(batch))
        ...         collector.update_policy_weights_(actor)
    """

    def __init__(
        self,
        gateway: AgentGateway | RemoteGateway,
        run_agent: RunAgent,
        tasks: Iterable[Any],
        *,
        group_size: int = 8,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        groups_per_batch: int = 4,
        epochs: int | None = 1,
        total_frames: int = -1,
        retries: int = 0,
        skip_equal: bool = True,
        max_skips: int = 64,
        max_failures: int = 16,
        ahead: int = 0,
        max_staleness: int | None = None,
        row_reward: RowReward | None = None,
        role: Role | None = None,
        weight_sync_schemes: Mapping[str, WeightSyncScheme] | None = None,
    ) -> None:
        for name, value in (("group_size", group_size), ("concurrency", concurrency), ("max_skips", max_skips)):
            require_number(name, value, whole=True, at_least=1)
        for name, value in (("groups_per_batch", groups_per_batch), ("max_failures", max_failures)):
            require_number(name, value, whole=True, at_least=1)
        require_number("timeout_s", timeout_s, above=0)
        require_number("retries", retries, whole=True, at_least=0)
        require_number("ahead", ahead, whole=True, at_least=0)
        require_number("max_staleness", max_staleness, optional=True, whole=True, at_least=0)
        require_number("total_frames", total_frames, whole=True, at_least=-1)
        require(
            group_size > 1 or not skip_equal,
            "group_size=1 has no rewards to compare, and skip_equal=True would replace every group: set "
            "skip_equal=False",
        )
        if not getattr(gateway, "is_running", False):
            raise ConfigError(
                f"gateway must be a running AgentGateway or a RemoteGateway, got {type(gateway).__name__}: use "
                "`with AgentGateway(...) as gateway`, or gateway.start()"
            )
        super().__init__()
        self.group_size = group_size
        self.groups_per_batch = groups_per_batch
        self.total_frames = total_frames
        self.requested_frames_per_batch = self.frames_per_batch = group_size * groups_per_batch
        self._frames = 0
        self._batches = 0
        self._gateway = gateway
        self._tasks = TaskStream(tasks, epochs=epochs)
        settings = GroupSettings(
            group_size=group_size,
            groups_per_batch=groups_per_batch,
            concurrency=concurrency,
            retries=retries,
            skip_equal=skip_equal,
            max_skips=max_skips,
            max_failures=max_failures,
            ahead=ahead,
            max_staleness=max_staleness,
        )
        pools = self._pools = [
            scheme.pool for scheme in (weight_sync_schemes or {}).values() if hasattr(scheme, "pool")
        ]

        def weight_version() -> int:  # holds no collector, so that one can be freed
            return max(pool.weight_version for pool in pools) if pools else gateway.weight_version

        self._weight_version = weight_version
        runs = SessionRuns(gateway, make_runner(run_agent), timeout_s=timeout_s, row_reward=row_reward, role=role)
        self._groups = Groups(runs.run, self._tasks, settings, weight_version=weight_version)
        self._loop = LoopThread(self._groups)
        self._stop: Any = weakref.finalize(self, self._loop.stop)
        self._weight_sync_schemes = dict(weight_sync_schemes) if weight_sync_schemes else None
        for model_id, scheme in (self._weight_sync_schemes or {}).items():
            if not scheme.initialized_on_sender:
                scheme.init_on_sender(model_id=model_id, context=self)
            if not scheme.synchronized_on_sender:
                scheme.connect()

    # ------------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[TensorDictBase]:
        return self.iterator()

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yield batches; see the class. Leaving the loop and iterating again goes on with the next batch.

        Raises:
            AgentsFailedError: too many groups one after the other gave nothing to train on.
            SGLangError: the gateway failed.
        """
        while self.total_frames < 0 or self._frames < self.total_frames:
            self._check_adapters()
            self._call_hook("pre_collect_hook")
            groups = self._loop.call(self._groups.take)
            if not groups:
                return
            batch = make_batch(groups, decode=self._gateway.decode)
            self._frames += len(batch)
            self._batches += 1
            self._call_hook("post_collect_hook", batch)
            yield batch

    def _call_hook(self, name: str, *args: Any) -> None:
        hook = getattr(self, name, None)  # TorchRL 0.12's collectors have none
        if hook is not None:
            hook(*args)

    def __len__(self) -> int:
        """Number of batches, known with ``total_frames`` only."""
        if self.total_frames < 0:
            raise TypeError("the collector ends with its tasks, and has no length")  # list() wants a TypeError
        return -(self.total_frames // -self.requested_frames_per_batch)

    # ------------------------------------------------------------------ weights

    def update_policy_weights_(
        self, policy_or_weights: Any = None, *, weights: Any = None, policy: Any = None, **kwargs: Any
    ) -> None:
        """Send weights to the servers; agents that run meanwhile notice nothing.

        Args:
            policy_or_weights: a module, a nested TensorDict, or a flat dict of tensors.
            weights: the same by name.
            policy: the same by name.
            kwargs: ``worker_ids``, ``model_id`` and ``weights_dict``, as TorchRL's collectors take them.

        Raises:
            ConfigError: the collector has no ``weight_sync_schemes``, or has sent an adapter that the gateway does not
                know of.
            SGLangError: as :meth:`WeightSync.push`.
        """
        if not self._weight_sync_schemes:
            raise ConfigError(
                "the collector has no weight_sync_schemes: pass {'policy': SGLangWeightSyncScheme(servers)} to it"
            )
        super().update_policy_weights_(policy_or_weights, weights=weights, policy=policy, **kwargs)
        self._check_adapters()

    def _check_adapters(self) -> None:
        """Refuse adapters that the gateway does not know of: its agents would go on with the model under them.

        Raises:
            ConfigError: there is such an adapter.
        """
        for pool in self._pools:
            if pool.state.weights.adapter is not None and not self._gateway.uses(pool):
                raise ConfigError(
                    "the trainer has sent a LoRA adapter through servers of its own, and the gateway has others: its "
                    "agents would sample without the adapter. Make the gateway from the same servers, "
                    "AgentGateway(servers), or send merged weights (SyncConfig(transport='auto'))"
                )

    @property
    def policy_version(self) -> int:
        """Version of the weights on the servers: of what the scheme has sent, else the newest that is known."""
        return self._weight_version()

    def get_policy_version(self) -> int:
        """Version of the weights on the servers."""
        return self.policy_version

    # ------------------------------------------------------------------ numbers

    @property
    def failures(self) -> list[RunFailure]:
        """The latest 100 runs that failed, oldest first."""
        return list(self._groups.failures)

    def stats(self) -> dict[str, int | float | bool]:
        """Numbers since the beginning.

        Returns:
            As TorchRL's collectors ``frames`` (rows), ``batches``, ``requested_frames_per_batch``, ``policy_version``
            and, with ``total_frames``, that and ``completed``; then ``groups`` that were yielded, ``runs`` that ended,
            ``failed_runs``, ``failed_runs_KIND`` for every :data:`FailureKind` that occurred (such as
            ``failed_runs_timeout``), ``skipped_groups``, and of these ``skipped_failed``, ``skipped_equal``,
            ``skipped_stale``.
        """
        counts = self._groups.counts
        found: dict[str, int | float | bool] = {
            "frames": self._frames,
            "batches": self._batches,
            "requested_frames_per_batch": self.requested_frames_per_batch,
            "policy_version": self.policy_version,
            "groups": counts.groups,
            "runs": counts.runs,
            "failed_runs": counts.failed_runs.total(),
            "skipped_groups": counts.skipped.total(),
            "skipped_failed": counts.skipped["failed"],
            "skipped_equal": counts.skipped["equal"],
            "skipped_stale": counts.skipped["stale"],
        }
        found |= {f"failed_runs_{kind.replace(' ', '_')}": number for kind, number in counts.failed_runs.items()}
        if self.total_frames >= 0:
            found |= {"total_frames": self.total_frames, "completed": self._frames >= self.total_frames}
        return found

    # ------------------------------------------------------------------ state

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Shuffle each pass over ``tasks`` in an order that the seed determines.

        Args:
            seed: the seed.
            static_seed: return the same seed.

        Returns:
            The seed for the next collector.

        Raises:
            ConfigError: the first batch was taken already.
        """
        require_number("seed", seed, whole=True, at_least=0)
        self._tasks.seed(seed)
        return seed if static_seed else seed + 1

    def state_dict(self) -> OrderedDict[str, Any]:
        """What a new collector of the same tasks needs to go on.

        Groups that are under way, or finished and not yet yielded, are run again.
        """
        return OrderedDict(
            frames=self._frames, iter=self._batches, groups=self._groups.counts.groups, tasks=self._tasks.state_dict()
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another collector of the same tasks was.

        Raises:
            ConfigError: the first batch was taken already, or it is no state of this class.
        """
        missing = sorted({"frames", "iter", "groups", "tasks"} - set(state_dict))
        require(not missing, f"this is no state_dict of an AgentCollector: it has no {missing}")
        self._tasks.load_state_dict(state_dict["tasks"])
        self._frames, self._batches = state_dict["frames"], state_dict["iter"]
        self._groups.counts.groups = state_dict["groups"]

    # ------------------------------------------------------------------ end

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """End all runs: processes are killed, sessions deleted. The gateway and the servers keep running.

        Args:
            timeout: seconds to wait for it; 30 by default.
            close_env: not used; there is no environment.
            raise_on_error: not used; it raises nothing.
        """
        self._loop.stop(timeout)
        self._stop()

    def __enter__(self) -> AgentCollector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

"""Turns of one conversation go to the server that has its prefix, unless that is gone or has too much to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import ConfigError, SamplingParams
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.affinity import Affinity
from torchrl_sglang.pool.balancing import LoadTracker
from torchrl_sglang.protocol.version import WeightVersion

Make = Callable[..., FakeServer]
A, B, C = (SGLangClient(f"http://127.0.0.1:{port}") for port in (1, 2, 3))
SHORT = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)


def conversation(number: int, length: int = 40) -> list[int]:
    return [7 * number + index for index in range(length)]


def tracker(*clients: SGLangClient) -> LoadTracker:
    return LoadTracker(lambda: clients)


def placed(
    load: LoadTracker, clients: list[SGLangClient], prompts: list[list[int]], keys_B: list[str] | None = None
) -> dict[int, str]:
    with load.assign(clients, prompts, range(len(prompts)), 1, keys_B) as shares:
        return {index: client.url for client, share in shares for index in share}


def test_a_prompt_that_continues_an_earlier_one_goes_where_that_went() -> None:
    load = tracker(A, B)
    prompts = [conversation(number) for number in range(8)]
    first = placed(load, [A, B], prompts)
    assert Counter(first.values()) == {A.url: 4, B.url: 4}
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    longer = [[*prompts[number], 300, 301, 302] for number in order]
    second = placed(load, [A, B], longer)
    assert [second[position] for position in range(8)] == [first[number] for number in order]


def test_prompts_that_only_begin_alike_are_spread() -> None:
    """A system prompt that all share must not put everything on one server."""
    load = tracker(A, B)
    system = conversation(1, 64)
    placed(load, [A, B], [[*system, 1, 2, 3, *conversation(2)]])
    spread = placed(load, [A, B], [[*system, 9, number, 5] for number in range(8)])
    assert Counter(spread.values()) == {A.url: 4, B.url: 4}


def test_the_sequences_that_grew_out_of_one_prompt_spread_over_servers_that_have_nothing_to_do() -> None:
    load = tracker(A, B)
    prompt = conversation(1)
    load.affinity.note(A.url, prompt)
    grown = placed(load, [A, B], [[*prompt, number] for number in range(8)])
    assert Counter(grown.values()) == {A.url: 5, B.url: 3}


def test_a_server_with_too_much_to_do_is_left_out() -> None:
    load = tracker(A, B)
    load.affinity.note(A.url, conversation(1))
    with load.count([(A, list(range(20)))], 1):
        assert placed(load, [A, B], [conversation(1)]) == {0: B.url}
    load.affinity.note(A.url, conversation(2))
    with load.count([(A, list(range(3)))], 1):
        assert placed(load, [A, B], [conversation(2)]) == {0: A.url}


def test_a_conversation_goes_on_elsewhere_when_its_server_is_gone() -> None:
    load = tracker(A, B, C)
    load.affinity.note(A.url, conversation(1))
    assert placed(load, [B, C], [conversation(1)])[0] in (B.url, C.url)


def test_keys_name_conversations_whose_tokens_do_not_show_it() -> None:
    load = tracker(A, B)
    first = placed(load, [A, B], [[1], [2]], keys_B=["one", "two"])
    assert len(set(first.values())) == 2
    second = placed(load, [A, B], [[20], [10]], keys_B=["two", "one"])
    assert second == {0: first[1], 1: first[0]}


def test_pick_chooses_for_requests_that_the_caller_sends() -> None:
    load = tracker(A, B)
    with load.assign_one([A, B]) as busy:
        chosen = load.pick(key="a session")
        assert chosen is not busy
    assert [load.pick(key="a session") for _ in range(3)] == [chosen] * 3
    assert load.pick(ids_T=conversation(1)) is load.pick(ids_T=[*conversation(1), 5])
    with load.count([(chosen, list(range(9)))], 1):
        assert load.pick(key="a session") is not chosen


def test_new_weights_make_all_prefixes_worthless() -> None:
    affinity = Affinity()
    affinity.note(A.url, conversation(1), key="k")
    affinity.weights_are(WeightVersion(number=0))
    assert affinity.find(conversation(1)) == A.url
    affinity.weights_are(WeightVersion(number=1))
    assert affinity.find(conversation(1)) is None
    assert affinity.find([1], key="k") is None


def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrl_sglang.pool.affinity._MAX_ENTRIES", 10)
    affinity = Affinity()
    for number in range(50):
        affinity.note(A.url, conversation(number))
    assert affinity.find(conversation(49)) == A.url
    assert affinity.find(conversation(10)) is None
    assert len(affinity._server) == 10


def test_turns_of_real_requests_find_their_prefix(make: Make) -> None:
    """What the servers report as cached; without affinity half of it."""
    pool = SGLangPool([SGLangClient(make().url), SGLangClient(make().url)])
    conversations = [conversation(number) for number in range(8)]
    replies = pool.generate(conversations, SHORT)
    homes = [reply.server for reply in replies]
    for turn in range(3):
        conversations = [[*ids, *reply.output_ids, 5, turn] for ids, reply in zip(conversations, replies, strict=True)]
        order = sorted(range(8), key=lambda number: (number * 5 + turn) % 8)
        answers = pool.generate([conversations[number] for number in order], SHORT)
        replies = [answers[order.index(number)] for number in range(8)]
        assert [reply.server for reply in replies] == homes
    gone = homes[0]
    pool.remove(gone)
    others = pool.generate([[*ids, 9] for ids in conversations], SHORT)
    assert gone not in {reply.server for reply in others}


def test_keys_reach_the_balancer_and_their_number_is_checked(make: Make) -> None:
    pool = SGLangPool([SGLangClient(make().url), SGLangClient(make().url)])
    keys = ["x", "y"]
    first = [reply.server for reply in pool.generate([[1], [2]], SHORT, keys=keys)]
    second = [reply.server for reply in pool.generate([[5], [6]], SHORT, keys=keys[::-1])]
    assert second == first[::-1]
    (reply,) = list(pool.stream([9], SHORT, key="x"))[-1:]
    assert reply.server == first[0]
    with pytest.raises(ConfigError, match="keys needs one entry per prompt"):
        pool.generate([[1], [2]], SHORT, keys=["x"])

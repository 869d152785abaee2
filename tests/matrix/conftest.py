"""One server per family, started when its first test runs and shared by its tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.matrix.combinations import CASES, Case
from tests.matrix.families import FAMILIES, Family, make_model, randomize
from tests.matrix.templates import TEMPLATES, Template
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang import SGLangClient, SGLangPool
from torchrl_sglang.server import SGLangServer


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A family's model on a server.

    Attributes:
        case: the row of the matrix.
        folder: the checkpoint.
        model: the same weights in transformers, float32; tests that send other weights change it first.
        tokenizer: as loaded from the checkpoint.
        pool: the server.
    """

    case: Case
    folder: Path
    model: Any
    tokenizer: Any
    pool: SGLangPool

    @property
    def family(self) -> Family:
        return FAMILIES[self.case.family]

    @property
    def template(self) -> Template:
        return TEMPLATES[self.case.template]

    def change_weights(self, seed: int) -> None:
        """Give the model other weights, in place."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            randomize(self.model, self.family)


def lora_flags(family: Family) -> tuple[str, ...]:
    """What a server needs to take the family's adapters."""
    if not family.lora_targets:
        return ()
    return (
        *("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *family.lora_targets),
        *("--lora-backend", "torch_native", "--max-loras-per-batch", "2"),
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id=family, marks=() if case.in_make_test else pytest.mark.slow)
        for family, case in CASES.items()
        if not FAMILIES[family].refused
    ],
)
def served(
    request: pytest.FixtureRequest,
    special_server: Callable[..., SGLangServer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    case: Case = request.param
    family = FAMILIES[case.family]
    tokenizer = make_tokenizer(case.tokenizer, TEMPLATES[case.template].source)
    # The folder's name has no word from which TorchRL would choose a chat template.
    folder = make_model(
        family,
        tokenizer,
        tmp_path_factory.mktemp("checkpoint") / "served",
        seed=len(case.family),
        vocab_size=len(tokenizer) + case.extra_rows,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    server = special_server(model=str(folder), extra_args=lora_flags(family))
    with closing(SGLangPool([SGLangClient(server.url)])) as pool:
        pool.connect()
        yield Served(case=case, folder=folder, model=model, tokenizer=AutoTokenizer.from_pretrained(folder), pool=pool)

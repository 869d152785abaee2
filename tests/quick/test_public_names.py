"""What a user sees of the package without reading code: signatures, names, and how little an import loads."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import torchrl_sglang
from torchrl_sglang import SGLangWrapper
from torchrl_sglang.rollout.settings import RolloutSettings


def test_the_policys_signature_names_every_argument_with_its_default() -> None:
    parameters = inspect.signature(SGLangWrapper).parameters
    assert "kwargs" not in parameters
    assert list(parameters)[:3] == ["model", "tokenizer", "input_mode"]
    defaults = RolloutSettings()
    for name in list(parameters)[1:]:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default in (getattr(defaults, name), None)
    assert parameters["max_resumes"].default == defaults.max_resumes


def test_the_policys_signature_is_what_its_docstring_describes() -> None:
    described = re.findall(r"^        (\w+): ", inspect.getdoc(SGLangWrapper) or "", re.MULTILINE)
    described += re.findall(r"^    (\w+): ", inspect.getdoc(SGLangWrapper) or "", re.MULTILINE)
    assert set(inspect.signature(SGLangWrapper).parameters) <= set(described)


def test_every_public_name_is_listed_and_can_be_imported() -> None:
    assert set(torchrl_sglang.__all__) <= set(dir(torchrl_sglang))
    assert "__version__" in dir(torchrl_sglang)
    for name in torchrl_sglang.__all__:
        assert getattr(torchrl_sglang, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SGLangWraper'"):
        torchrl_sglang.SGLangWraper  # noqa: B018


@pytest.mark.parametrize("name", ["ServerConfig", "SGLangWrapper", "AsyncSGLang", "ConfigError", "SyncReport"])
def test_a_lazily_imported_class_pickles_by_its_own_module(name: str) -> None:
    found = getattr(torchrl_sglang, name)
    assert pickle.loads(pickle.dumps(found)) is found

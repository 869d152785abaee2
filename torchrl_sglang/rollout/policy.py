"""``SGLangWrapper``: the policy. A TensorDict with prompts goes in, one with responses comes out."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tensordict import NestedKey, TensorDict, TensorDictBase, lazy_stack, set_list_to_stack, unravel_key
from torchrl.modules.llm.policies import LLMWrapperBase

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import load_tokenizer
from torchrl_sglang.pool import Servers, resolve_pool
from torchrl_sglang.rollout.assemble import generated_rows, scored_rows
from torchrl_sglang.rollout.batching import Batcher
from torchrl_sglang.rollout.exactness import warn_of_truncation, with_sampling_mask
from torchrl_sglang.rollout.outputs import Padding, stack_rows
from torchrl_sglang.rollout.prompts import (
    Prompts,
    prefer_given_tokens,
    read_history,
    read_text,
    read_tokens,
)
from torchrl_sglang.rollout.serve import RequestBatcher, generate_prompts, score_sequences, truncate_left
from torchrl_sglang.rollout.settings import RolloutSettings

__all__ = ["SGLangWrapper"]


class SGLangWrapper(LLMWrapperBase):
    """TorchRL policy that generates (or scores) with SGLang servers.

    Interchangeable with :class:`~torchrl.modules.llm.vLLMWrapper`: the same arguments, input keys, output keys and
    TensorClasses. What it tells beyond that lies under ``generation_key``, see :class:`Generation`.

    Where TorchRL's two wrappers disagree this follows vLLMWrapper: the prompt part of ``LogProbs.full`` is NaN unless
    asked for, ``LogProbs.full`` is left out when there is a sample dimension, ``Masks.all_assistant_mask`` marks the
    response, the first response token has its log-prob. It departs from vLLMWrapper in five places. Text mode fills in
    the prompt's tokens and the masks, as tokens mode does. Padded log-probs end in 0, not in the padding token's id. An
    attention mask, or ``Tokens.padded``, decides what is padding, so a padding id that was sampled stays. The content
    of an answer in ``ChatHistory`` lacks the special token that ended it, which the chat template writes. And
    ``ChatHistory.response`` has a message dimension, as the class asks for.

    Args:
        model: an :class:`~torchrl_sglang.AsyncSGLang`, an :class:`~torchrl_sglang.SGLangPool`, or the URL(s) of
            running servers.

    Keyword Args:
        tokenizer: a Hugging Face tokenizer, or the name of one; ``None`` takes the served model's.
        input_mode: ``"history"`` (:class:`~torchrl.data.llm.History`), ``"text"`` (strings) or ``"tokens"`` (ids).
        input_key: where the input is; ``None`` is ``(input_mode, "prompt")`` when generating, ``(input_mode, "full")``
            when scoring.
        attention_mask_key: in tokens mode, where an attention mask says which ids are padding.
        generate: generate responses; ``False`` gives the log-probs of sequences that are already there.
        return_log_probs: also return log-probs; always when scoring.
        generate_kwargs: how tokens are drawn, in the names of TorchRL, Hugging Face, vLLM or SGLang, see
            :meth:`SamplingParams.from_kwargs`; and ``logprobs`` (like ``return_log_probs``) and ``prompt_logprobs``
            (also report those of the prompt, for which the server gives up its prefix cache). Without
            ``prompt_logprobs`` the prompt part of ``LogProbs.full`` is NaN, as with vLLMWrapper.
        tokenizer_kwargs: passed to the tokenizer in text mode, e.g. ``add_special_tokens=False``.
        pad_output: return dense tensors, prompts padded on the left and responses on the right, instead of ragged ones.
        pad_model_input: not possible; servers take ragged input.
        inplace: ``True`` writes into the input TensorDict (the default), ``False`` returns a new one with the outputs
            alone (the default with several samples), ``"empty"`` writes into an empty one of the input's type.
        device: where output tensors go when the input TensorDict has no device of its own.
        layout: only ``torch.strided``; ask the output for nested tensors where you need them.
        num_samples: responses per prompt; the output has one batch dimension more. ``None`` is one without it.
        chat_template_name: one of TorchRL's chat templates, instead of the tokenizer's.
        chat_template: a chat template, instead of the tokenizer's.
        history_key: where the :class:`~torchrl.modules.llm.ChatHistory` goes.
        text_key: where the :class:`~torchrl.modules.llm.Text` goes.
        tokens_key: where the :class:`~torchrl.modules.llm.Tokens` go.
        masks_key: where the :class:`~torchrl.modules.llm.Masks` go.
        log_probs_key: where the :class:`~torchrl.modules.llm.LogProbs` go.
        generation_key: where the :class:`Generation` goes; ``None`` leaves it out.
        policy_version_key: where the oldest weight version of each sequence goes (int64, one per sequence), for
            TorchRL's ``PolicyAgeFilter``; ``None`` leaves it to :attr:`Generation.policy_version`.
        batching: merge calls made by several threads at the same time into one request.
        min_batch_size: with batching, wait for this many prompts (default 1)...
        max_batch_size: ...and send no more than this many at once.
        batching_timeout: seconds after which a waiting call is sent with fewer.
        prefer_tokens: in history mode, take the ids at ``(tokens_key, "prompt")`` and ``"full"`` as the truth where
            they belong to the conversation, and tokenize only what it has gained since.
        on_overlong: what to do with a prompt that does not fit: ``"raise"``, or ``"truncate_left"`` to keep its end.
        on_error: what to do with a prompt that can't be served: ``"raise"``, or ``"mask"`` to return its row with an
            empty response and :attr:`Generation.error` set, and the others' results unharmed.
        progress: show tokens done and tokens per second while a batch runs.
        max_resumes: how often a response that a weight update interrupted is continued from its tokens.
        exact_log_probs: under top-p, top-k or min-p, record the log-prob of each token among those that were left to
            choose from (:attr:`Generation.support`), instead of the one before truncation.

    Raises:
        ConfigError: an argument that can't be honoured; it is also a ``ValueError``.

    Examples:
        >>> import torch
        >>> from torchrl_sglang.testing.echo_pool import EchoPool
        >>> policy = SGLangWrapper(EchoPool(), input_mode="tokens", generate_kwargs={"max_new_tokens": 2})
        >>> prompts = {("tokens", "prompt"): torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
        >>> td = policy(TensorDict(prompts, batch_size=1))
        >>> td["tokens", "full"].tolist(), list(td["generation"].finish_reason)
        ([[5, 6, 7, 7, 6]], ['length'])
    """

    def __init__(self, model: Servers, **kwargs: Any) -> None:
        super().__init__()
        self.settings = RolloutSettings.from_kwargs(**kwargs)
        self.pool = resolve_pool(model)
        """The servers."""
        self.model = self.pool if isinstance(model, (str, list, tuple)) else model
        if isinstance(model, (str, list, tuple)):
            self.pool.connect()
        self._batcher: RequestBatcher | None = None
        self._expose_settings()

    def _expose_settings(self) -> None:
        """The attributes that TorchRL, and code written for its wrappers, reads."""
        settings = self.settings
        for name in (
            *("input_mode", "attention_mask_key", "generate", "pad_output", "layout", "prefer_tokens"),
            *("chat_template_name", "chat_template", "generate_kwargs", "tokenizer_kwargs"),
            *(
                "history_key",
                "text_key",
                "tokens_key",
                "masks_key",
                "log_probs_key",
                "generation_key",
                "policy_version_key",
            ),
        ):
            setattr(self, name, getattr(settings, name))
        self.inplace = settings.writes_inplace
        self.num_samples = settings.samples
        self.return_log_probs = settings.returns_log_probs
        self.sampling_params = settings.sampling
        self.in_keys = [settings.source_key]
        self.input_key = settings.source_key
        self.out_keys = settings.out_keys
        self._min_batch_size = settings.min_batch_size
        if settings.min_batch_size is None and (settings.batching or settings.max_batch_size is not None):
            self._min_batch_size = 1
        self._max_batch_size = settings.max_batch_size
        self._batching_timeout = settings.batching_timeout
        if self._min_batch_size is not None:
            self._batcher = Batcher(
                min_items=self._min_batch_size, max_items=self._max_batch_size, wait_s=self._batching_timeout
            )

    # ------------------------------------------------------------------ what it stands on

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use.

        Raises:
            ConfigError: the served model's tokenizer can't be read from this machine; pass ``tokenizer=``.
        """
        given = self.settings.tokenizer
        if given is None:
            owned = getattr(self.model, "tokenizer", None)
            given = owned if owned is not None else load_tokenizer(self.pool.info.tokenizer_path)
        elif isinstance(given, str):
            given = load_tokenizer(given)
        if given is not self.settings.tokenizer:
            self.settings = self.settings.changed(tokenizer=given)
        return given

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Use another tokenizer from now on."""
        self.settings = self.settings.changed(tokenizer=tokenizer)

    @property
    def padding_value(self) -> int:
        """The id that fills padded tensors: the tokenizer's padding token, else its end-of-sequence token."""
        value = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if value is None else value)

    def get_new_version(self, **kwargs: Any) -> SGLangWrapper:
        """A copy on the same servers with some arguments changed; everything not named stays.

        A custom ``input_key`` belongs to one input mode and to generating or scoring: it is forgotten when these
        change.

        Raises:
            ConfigError: as the constructor.
        """
        model = kwargs.pop("model", self.model)
        settings = self.settings.changed(**kwargs)
        return type(self)(model, **{f.name: getattr(settings, f.name) for f in fields(settings)})

    def cleanup_batching(self, *, flush: bool = False) -> None:
        """End what waits for company: with ``flush`` it runs now, else its callers get a ``CancelledError``."""
        batcher = self.__dict__.get("_batcher")  # __del__ comes here even when the constructor has failed
        if batcher is not None:
            batcher.flush() if flush else batcher.cancel()

    def get_batching_state(self) -> dict[str, Any]:
        """How many prompts wait, and whether a batch runs."""
        if self._batcher is None:
            return {"batching_enabled": False}
        return {
            "batching_enabled": True,
            "min_batch_size": self._min_batch_size,
            "max_batch_size": self._max_batch_size,
            "timeout": self._batching_timeout,
            **self._batcher.state,
        }

    def __getstate__(self) -> dict[str, Any]:
        # A collector's weak reference and a batcher's lock stay behind: a copy in another process has its own.
        return {**self.__dict__, "_collector": None, "_batcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._expose_settings()

    # ------------------------------------------------------------------ a batch

    @set_list_to_stack(True)
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        logits_only: bool = False,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Generate (or score) a batch of any batch shape.

        Args:
            tensordict: holds the prompts at ``input_key``.
            tensordict_out: written instead of what ``inplace`` says.
            logits_only: not possible: servers return no logits.
            **kwargs: generation arguments that replace those of the constructor for this call.

        Returns:
            The TensorDict that was written, of the input's batch shape, with ``num_samples`` appended if set.

        Raises:
            ConfigError: a prompt that can't be served, naming its index; nothing was sent.
            ServerError: a server failed.
        """
        if logits_only:
            raise NotImplementedError("SGLang servers return log-probs of tokens, not logits")
        shape = tensordict.batch_size
        flat = lazy_stack([tensordict]) if not shape else tensordict if len(shape) == 1 else tensordict.reshape(-1)
        sampling = self.settings.sampling.updated(**kwargs) if kwargs else self.settings.sampling
        if sampling.n != self.settings.sampling.n:
            raise ConfigError("the number of samples is part of the output's shape: set num_samples, not n per call")
        if flat.shape[0]:
            rows = self._generate(self._read(flat), sampling) if self.generate else self._score(self._read(flat))
            out = stack_rows(rows, [*shape, self.num_samples] if self.num_samples is not None else shape)
        else:
            out = TensorDict(batch_size=[*shape, *([] if self.num_samples is None else [self.num_samples])])
        device = tensordict.device or self.settings.device
        return self._write(out if device is None else out.to(device), tensordict, tensordict_out)

    def _read(self, flat: TensorDictBase) -> Prompts:
        settings, key = self.settings, self.settings.source_key
        if settings.input_mode == "text":
            return read_text(flat, key, self.tokenizer, settings.text_kwargs)
        if settings.input_mode == "tokens":
            return self._read_tokens(flat, key)
        prompts = read_history(
            flat,
            key,
            self.tokenizer,
            settings.template_kwargs,
            add_generation_prompt=settings.generate,
            assistant_mask=not settings.generate,
        )
        if not (settings.generate and settings.prefer_tokens):
            return prompts
        keys = [unravel_key((settings.tokens_key, name)) for name in ("prompt", "full")]
        given = [self._read_tokens(flat, k) for k in keys if flat.get(k, None, as_list=True) is not None]
        return prefer_given_tokens(prompts, given, self.tokenizer, settings.template_kwargs) if given else prompts

    def _read_tokens(self, flat: TensorDictBase, key: NestedKey) -> Prompts:
        return read_tokens(
            flat,
            key,
            mask_keys=(self.attention_mask_key, unravel_key((self.masks_key, "all_attention_mask"))),
            padding=lambda: (self.padding_value, self.tokenizer.eos_token_id),
            assistant_key=None if self.generate else unravel_key((self.masks_key, "all_assistant_mask")),
        )

    def _padding(self, prompts: Prompts) -> Padding:
        if not self.pad_output:
            return Padding(enabled=False)
        return Padding(enabled=True, value=self.padding_value, prompt_width=prompts.width or 0)

    def _generate(self, prompts: Prompts, sampling: SamplingParams) -> list[TensorDict]:
        settings = self.settings
        if settings.exact_log_probs:
            sampling = with_sampling_mask(sampling, self.pool.vocab_size)
        elif sampling.truncates and self.return_log_probs:
            warn_of_truncation()
        if settings.on_overlong == "truncate_left":
            prompts = truncate_left(prompts, self.pool, sampling)
        answers = generate_prompts(
            self.pool,
            prompts,
            sampling,
            mask_errors=settings.on_error == "mask",
            max_resumes=settings.max_resumes,
            return_logprobs=self.return_log_probs,
            prompt_logprobs=settings.asks_prompt_log_probs,
            progress=settings.progress,
            batcher=self._batcher,
        )
        tokenizer = None if self.input_mode == "tokens" else self.tokenizer
        return generated_rows(answers, settings, sampling, self._padding(answers.prompts), tokenizer)

    def _score(self, prompts: Prompts) -> list[TensorDict]:
        answers = score_sequences(self.pool, prompts, mask_errors=self.settings.on_error == "mask")
        return scored_rows(answers, self.settings, self._padding(prompts))

    def _write(self, out: TensorDictBase, source: TensorDictBase, target: TensorDictBase | None) -> TensorDictBase:
        if target is None:
            if self.inplace is False:
                return out
            target = source if self.inplace is True else source.empty()
        target = target.exclude(*self.out_keys, inplace=True)
        return target.update(out, keys_to_update=self.out_keys)

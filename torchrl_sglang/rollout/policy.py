"""``SGLangWrapper``: the policy, which reads prompts from a TensorDict and writes the servers' responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tensordict import NestedKey, TensorDict, TensorDictBase, lazy_stack, set_list_to_stack, unravel_key
from torchrl.modules.llm.policies import LLMWrapperBase

from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import load_tokenizer
from torchrl_sglang.pool import Servers, resolve_pool
from torchrl_sglang.pool.earlier_weights import warn_of_earlier_weights
from torchrl_sglang.rollout.attributes import WrapperAttributes
from torchrl_sglang.rollout.batching import Batcher
from torchrl_sglang.rollout.empty_batch import empty_rows
from torchrl_sglang.rollout.messages import named_template
from torchrl_sglang.rollout.outputs import generated_rows, scored_rows
from torchrl_sglang.rollout.prompts import (
    Prompts,
    prefer_given_tokens,
    read_history,
    read_text,
    read_tokens,
)
from torchrl_sglang.rollout.requests import RequestBatcher, generate_prompts, score_sequences, truncate_left
from torchrl_sglang.rollout.resuming import stop_strings
from torchrl_sglang.rollout.sampling_mask import warn_of_truncation, with_sampling_mask
from torchrl_sglang.rollout.settings import RolloutSettings
from torchrl_sglang.rollout.signature import policy_signature
from torchrl_sglang.rollout.tensorclasses import Padding, stack_rows

__all__ = ["SGLangWrapper"]


class SGLangWrapper(WrapperAttributes, LLMWrapperBase):
    """TorchRL policy that generates (or scores) with SGLang servers.

    It has the arguments, input keys, output keys, attributes and TensorClasses of
    :class:`~torchrl.modules.llm.vLLMWrapper`, so one replaces the other. Attributes are read-only;
    :meth:`get_new_version` makes a policy with other values.

    Where TorchRL's two wrappers differ, this one follows vLLMWrapper: the prompt part of ``LogProbs.full`` is NaN
    unless ``prompt_logprobs`` is set, ``LogProbs.full`` is left out when there is a sample dimension,
    ``Masks.all_assistant_mask`` marks the response, the first response token has its log-prob. It differs from
    vLLMWrapper in six places. A conversation is rendered with the tokenizer's own chat template. Text mode writes the
    prompt's tokens and the masks, as tokens mode does. Padded log-probs are filled with 0, not with the padding token's
    id. An attention mask, or ``Tokens.padded``, decides what is padding, so a sampled token that has the padding id is
    kept. The content of an answer in ``ChatHistory`` lacks the special token that ended it, because the chat template
    writes that token. ``ChatHistory.response`` has a message dimension, as the class requires.

    ``out_keys`` equals vLLMWrapper's for the same arguments, so code that compares or selects ``out_keys`` works
    unchanged; the :class:`Generation` at ``generation_key`` is written too, and stays in the TensorDict that the policy
    writes in place (the default). A collector whose policy has ``inplace=False`` or ``"empty"`` copies ``out_keys``
    only: there, declare the entry with ``policy.out_keys = [*policy.out_keys, "generation"]`` (a ``policy_version_key``
    is always declared, since setting it asks for that entry).

    Args:
        model: an :class:`~torchrl_sglang.AsyncSGLang`, an :class:`~torchrl_sglang.SGLangPool`, or the URL(s) of
            running servers.

    Keyword Args:
        tokenizer: a Hugging Face tokenizer, or the name of one; ``None`` takes the served model's.
        input_mode: ``"history"`` (:class:`~torchrl.data.llm.History`), ``"text"`` (strings) or ``"tokens"`` (ids).
        input_key: where the input is; ``None`` is ``(input_mode, "prompt")`` when generating, ``(input_mode, "full")``
            when scoring.
        attention_mask_key: in tokens mode, where an attention mask says which ids are padding.
        generate: generate responses; ``False`` computes the log-probs of given sequences.
        return_log_probs: also return log-probs; always when scoring.
        generate_kwargs: how tokens are drawn, in the names of TorchRL, Hugging Face, vLLM or SGLang, see
            :meth:`SamplingParams.from_kwargs`; and ``logprobs`` (like ``return_log_probs``) and ``prompt_logprobs``
            (also report those of the prompt; the server then does not use its prefix cache). Without
            ``prompt_logprobs`` the prompt part of ``LogProbs.full`` is NaN, as with vLLMWrapper.
        tokenizer_kwargs: passed to the tokenizer in text mode, e.g. ``add_special_tokens=False``. A text that begins
            with BOS does not get a second one, and a prompt does not get the EOS that some tokenizers add.
        pad_output: return dense tensors, prompts padded on the left and responses on the right, instead of ragged ones.
        pad_model_input: not supported; servers take ragged input.
        inplace: ``True`` writes into the input TensorDict (the default), ``False`` returns a new one with the outputs
            alone (the default with several samples), ``"empty"`` writes into an empty one of the input's type.
        device: device of the output tensors when the input TensorDict has none.
        layout: only ``torch.strided``; read the output with ``td.get(key, as_nested_tensor=True)`` for nested tensors.
        num_samples: responses per prompt; the output has one batch dimension more. ``None`` is one response without
            that dimension.
        chat_template_name: one of the tokenizer's chat templates if it has several, or one of TorchRL's.
        chat_template: a chat template, instead of the tokenizer's. Without these two, the prompt of a conversation is
            what ``tokenizer.apply_chat_template`` gives; TorchRL's wrappers choose a template of TorchRL's by the name
            of the tokenizer's path.
        template_kwargs: in history mode, variables of the chat template, such as ``enable_thinking=False``, ``tools``
            (JSON schemas or functions) and ``documents``.
        history_key: where the :class:`~torchrl.modules.llm.ChatHistory` is written.
        text_key: where the :class:`~torchrl.modules.llm.Text` is written.
        tokens_key: where the :class:`~torchrl.modules.llm.Tokens` are written.
        masks_key: where the :class:`~torchrl.modules.llm.Masks` are written.
        log_probs_key: where the :class:`~torchrl.modules.llm.LogProbs` are written.
        generation_key: where the :class:`Generation` is written; ``None`` leaves it out.
        policy_version_key: where the oldest weight version of each sequence is written (int64, one per sequence), for
            TorchRL's ``PolicyAgeFilter``; ``None`` leaves it to :attr:`Generation.policy_version`.
        batching: merge calls made by several threads at the same time into one request.
        min_batch_size: with batching, send when this many prompts wait (default 1).
        max_batch_size: with batching, send at most this many prompts at once.
        batching_timeout: seconds after which a waiting call is sent with fewer prompts.
        prefer_tokens: in history mode, use the ids at ``(tokens_key, "prompt")`` and ``"full"`` where they belong to
            the conversation, and tokenize only the part that the conversation has gained since. Where the chat template
            renders an earlier answer otherwise than it was generated (some drop its thinking), the prompt is what the
            template renders, with a warning; ``"always"`` keeps the generated tokens there too.
        on_overlong: what to do with a prompt that does not fit: ``"raise"``, or ``"truncate_left"`` to keep its end.
        on_error: what to do with a prompt that can't be served: ``"raise"``, or ``"mask"`` to return its row with an
            empty response and :attr:`Generation.error` set, and the other prompts' responses as usual.
        progress: show the number of generated tokens and tokens per second while a batch runs.
        max_resumes: how often a response that a weight update interrupted is continued from its tokens.
        exact_log_probs: under top-p, top-k or min-p, record the log-prob of each token within the truncated
            distribution (:attr:`Generation.support`), instead of the one before truncation.

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

    __signature__ = policy_signature()  # of the constructor: help, editors and the API page show it

    def __init__(self, model: Servers, **kwargs: Any) -> None:
        super().__init__()
        self.settings = RolloutSettings.from_kwargs(**kwargs)
        self.pool = resolve_pool(model)
        """The servers."""
        self.model = self.pool if isinstance(model, (str, list, tuple)) else model
        if isinstance(model, (str, list, tuple)):
            self.pool.connect()
            warn_of_earlier_weights(self.pool)
        # TensorDictModuleBase holds these two, because select_out_keys() changes them.
        self.in_keys = [self.settings.source_key]
        self.out_keys = self.settings.out_keys
        self._batcher = self._make_batcher()

    def _make_batcher(self) -> RequestBatcher | None:
        settings = self.settings
        if settings.min_batch is None:
            return None
        return Batcher(
            min_items=settings.min_batch, max_items=settings.max_batch_size, wait_s=settings.batching_timeout
        )

    # ------------------------------------------------------------------ tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use.

        Raises:
            ConfigError: the served model's tokenizer can't be read from this machine; pass ``tokenizer=``.
        """
        given = self.settings.tokenizer
        if given is None:
            owned = getattr(self.model, "tokenizer", None)
            given = owned if owned is not None else self._load_served_tokenizer()
        elif isinstance(given, str):
            given = load_tokenizer(given)
        if given is not self.settings.tokenizer:
            self.set_tokenizer(given)
        return given

    def _load_served_tokenizer(self) -> Any:
        # nn.Module reports an AttributeError raised in a property as "no attribute 'tokenizer'".
        info = getattr(self.pool, "info", None)
        if info is None:
            raise ConfigError(f"a {type(self.pool).__name__} does not say which model it serves: pass tokenizer=")
        return load_tokenizer(str(info.tokenizer_path), revision=info.revision)

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Use another tokenizer from now on."""
        self.settings = self.settings.changed(tokenizer=tokenizer)

    @property
    def padding_value(self) -> int:
        """The id that fills padded tensors: the tokenizer's padding token, else its end-of-sequence token.

        A padding token that is outside the served vocabulary is not used: a trainer can't embed it.

        Raises:
            ConfigError: the tokenizer has neither.
        """
        vocab_size = getattr(self.pool, "vocab_size", None)
        for value in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if value is not None and value >= 0 and (vocab_size is None or value < vocab_size):
                return int(value)
        raise ConfigError(
            "the tokenizer has no padding token and no end-of-sequence token inside the served vocabulary, so there is "
            "nothing to pad with: set tokenizer.pad_token, or use pad_output=False"
        )

    def _padding_ids(self) -> tuple[int | None, int | None, int | None]:
        """Padding token (else EOS), EOS and BOS, by which padding is told in a tensor without a mask."""
        tokenizer = self.tokenizer
        pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        return pad_id if pad_id is not None else eos_id, eos_id, getattr(tokenizer, "bos_token_id", None)

    def _renderer(self, variables: Mapping[str, Any] | None) -> ChatRenderer:
        settings = self.settings
        template = settings.chat_template
        if template is None and settings.chat_template_name is not None:
            template = named_template(settings.chat_template_name, self.tokenizer)
        variables = {**settings.template_kwargs, **(variables or {})}
        return ChatRenderer(self.tokenizer, chat_template=template, variables=variables)

    # ------------------------------------------------------------------ copies

    def get_new_version(self, **kwargs: Any) -> SGLangWrapper:
        """A copy on the same servers with some arguments changed; the others keep their values.

        A custom ``input_key`` belongs to one input mode and to generating or scoring, so it is reset when one of these
        changes.

        Raises:
            ConfigError: as the constructor.
        """
        model = kwargs.pop("model", self.model)
        settings = self.settings.changed(**kwargs)
        return type(self)(model, **{f.name: getattr(settings, f.name) for f in fields(settings)})

    def __getstate__(self) -> dict[str, Any]:
        # The collector's weak reference and the batcher's lock can't be pickled; a copy gets a batcher of its own.
        return {**self.__dict__, "_collector": None, "_batcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._batcher = self._make_batcher()

    # ------------------------------------------------------------------ merged calls of several threads

    def cleanup_batching(self, *, flush: bool = False) -> None:
        """End the calls that wait for a batch: with ``flush`` they run now, else they raise ``CancelledError``."""
        batcher = self.__dict__.get("_batcher")  # __del__ calls this even when the constructor has failed
        if batcher is not None:
            batcher.flush() if flush else batcher.cancel()

    def get_batching_state(self) -> dict[str, Any]:
        """The batching settings, how many prompts wait, and whether a batch runs."""
        if self._batcher is None:
            return {"batching_enabled": False}
        return {
            "batching_enabled": True,
            "min_batch_size": self.settings.min_batch,
            "max_batch_size": self.settings.max_batch_size,
            "timeout": self.settings.batching_timeout,
            **self._batcher.state,
        }

    # ------------------------------------------------------------------ output keys

    def select_out_keys(self, *out_keys: NestedKey) -> SGLangWrapper:
        """Write only these keys; ``generation_key`` may be among them although ``out_keys`` does not list it."""
        named = {unravel_key(key) for key in out_keys}
        self.out_keys = [*self.out_keys, *(key for key in self._undeclared_keys() if key in named)]
        super().select_out_keys(*out_keys)
        return self

    def _undeclared_keys(self) -> list[NestedKey]:
        keys = [unravel_key(key) for key in self.settings.undeclared_keys]
        return [key for key in keys if key not in self.out_keys]

    # ------------------------------------------------------------------ one batch

    @set_list_to_stack(True)
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        logits_only: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Generate (or score) a batch of any batch shape.

        Args:
            tensordict: holds the prompts at ``input_key``.
            tensordict_out: the TensorDict to write, whatever ``inplace`` is.
            logits_only: not supported: servers return no logits.
            template_kwargs: variables of the chat template for this call, over those of the constructor.
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
        sampling = self.settings.sampling.updated(**kwargs) if kwargs else self.settings.sampling
        if sampling.n != self.settings.sampling.n:
            raise ConfigError("the number of samples is part of the output's shape: set num_samples, not n per call")
        if shape.numel():
            flat = lazy_stack([tensordict]) if not shape else tensordict if len(shape) == 1 else tensordict.reshape(-1)
            prompts = self._read(flat, template_kwargs)
            settings = self.settings.with_decoding(kwargs)
            rows = self._generate(prompts, sampling, settings) if self.generate else self._score(prompts)
            out = stack_rows(rows, [*shape, self.num_samples] if self.num_samples is not None else shape)
        else:
            samples = [] if self.num_samples is None else [self.num_samples]
            out = empty_rows(
                self.settings, sampling, [*shape, *samples], self._padding(Prompts(ids_B_T=[])), self._text_tokenizer()
            )
        device = tensordict.device or self.settings.device
        return self._write(out if device is None else out.to(device), tensordict, tensordict_out)

    def _read(self, flat: TensorDictBase, template_kwargs: Mapping[str, Any] | None) -> Prompts:
        settings, key = self.settings, self.settings.source_key
        if template_kwargs and settings.input_mode != "history":
            raise ConfigError(f"template_kwargs: there is no chat template in {settings.input_mode} mode")
        if settings.input_mode == "text":
            return read_text(flat, key, self.tokenizer, settings.text_kwargs, open_end=settings.generate)
        if settings.input_mode == "tokens":
            return self._read_tokens(flat, key)
        prompts = read_history(
            flat,
            key,
            self._renderer(template_kwargs),
            add_generation_prompt=settings.generate,
            assistant_mask=not settings.generate,
        )
        if not (settings.generate and settings.prefer_tokens):
            return prompts
        keys = [unravel_key((settings.tokens_key, name)) for name in ("prompt", "full")]
        given = [self._read_tokens(flat, k) for k in keys if flat.get(k, None, as_list=True) is not None]
        rewritten = settings.prefer_tokens == "always"
        return prefer_given_tokens(prompts, given, rewritten=rewritten) if given else prompts

    def _read_tokens(self, flat: TensorDictBase, key: NestedKey) -> Prompts:
        return read_tokens(
            flat,
            key,
            mask_keys=(self.attention_mask_key, unravel_key((self.masks_key, "all_attention_mask"))),
            padding=self._padding_ids,
            assistant_key=None if self.generate else unravel_key((self.masks_key, "all_assistant_mask")),
        )

    def _padding(self, prompts: Prompts) -> Padding:
        if not self.pad_output:
            return Padding(enabled=False)
        return Padding(enabled=True, value=self.padding_value, prompt_width=prompts.width or 0)

    def _generate(self, prompts: Prompts, sampling: SamplingParams, settings: RolloutSettings) -> list[TensorDict]:
        sampling = sampling.for_vocabulary(self.pool.vocab_size)
        if settings.exact_log_probs:
            sampling = with_sampling_mask(sampling, self.pool.vocab_size)
        elif sampling.truncates and settings.writes_log_probs:
            warn_of_truncation()
        if settings.on_overlong == "truncate_left":
            prompts = truncate_left(prompts, self.pool, sampling)
        answers = generate_prompts(
            self.pool,
            prompts,
            sampling,
            mask_errors=settings.on_error == "mask",
            max_resumes=settings.max_resumes,
            return_logprobs=settings.writes_log_probs,
            prompt_logprobs=settings.writes_prompt_log_probs,
            progress=settings.progress,
            batcher=self._batcher,
            stops=lambda: stop_strings(sampling, lambda: self.tokenizer),
        )
        return generated_rows(answers, settings, sampling, self._padding(answers.prompts), self._text_tokenizer())

    def _text_tokenizer(self) -> Any:
        return self.tokenizer if self.settings.writes_text else None

    def _score(self, prompts: Prompts) -> list[TensorDict]:
        answers = score_sequences(self.pool, prompts, mask_errors=self.settings.on_error == "mask")
        return scored_rows(answers, self.settings, self._padding(prompts))

    def _write(self, out: TensorDictBase, source: TensorDictBase, target: TensorDictBase | None) -> TensorDictBase:
        if target is None:
            if self.inplace is False:
                return out
            target = source if self.inplace is True else source.empty()
        keys = [*self.out_keys, *self._undeclared_keys()]
        target = target.exclude(*keys, inplace=True)
        return target.update(out, keys_to_update=keys)

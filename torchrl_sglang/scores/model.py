"""``RewardModel``: a sequence classifier on SGLang servers that scores texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchrl_sglang.chat_templates import ChatRenderer, check_template_kwargs
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.config.checking import require_number
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import load_tokenizer
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.protocol.limits import check_prompts
from torchrl_sglang.protocol.scores import build_scores, parse_scores
from torchrl_sglang.text_tokens import encode_texts

__all__ = ["RewardModel"]

Text = str | Sequence[Mapping[str, Any]]


class RewardModel:
    """A reward model served by one or several SGLang servers.

    Launch the server with ``--is-embedding``, e.g. ``ServerConfig(model=..., extra_args=("--is-embedding",))``; the
    checkpoint is a ``...ForSequenceClassification`` or another that SGLang lists as a reward model. It can be
    pickled.

    Args:
        servers: the URL of a server, or of several that serve the same model: texts are distributed among them.
        tokenizer: the reward model's tokenizer; by default loaded from the server's ``tokenizer_path``.
        label: index of the output that is the score; needed when the model's head has more than one.
        chat_template: a chat template, instead of the tokenizer's.
        template_kwargs: variables of the chat template, such as ``tools``.
        client: time-outs and keys.

    Raises:
        ConfigError: a label that is no index, a server that generates text, or servers of different models.
        ServerError: a server can't be reached.

    Examples:
        >>> rewards = RewardModel("http://127.0.0.1:30000")  # doctest: +SKIP
        >>> rewards.get_scores(["2 + 2 = 4", "2 + 2 = 5"])  # doctest: +SKIP
        [3.1, -2.4]
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        tokenizer: Any = None,
        *,
        label: int | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        client: ClientConfig | None = None,
    ) -> None:
        require_number("label", label, whole=True, optional=True, at_least=0)
        self.chat_template = chat_template
        self.template_kwargs = check_template_kwargs(template_kwargs)
        urls = [servers] if isinstance(servers, str) else list(servers)
        if not urls:
            raise ConfigError("a reward model needs at least one server")
        self.clients = tuple(SGLangClient(url, client) for url in urls)
        self.label = label
        infos = [each.connect() for each in self.clients]
        for info in infos:
            if info.is_generation:
                raise ConfigError(
                    f"{info.url} serves {info.model_path!r} for generating text: launch it with --is-embedding to "
                    "score texts"
                )
            if (info.architectures, info.vocab_size) != (infos[0].architectures, infos[0].vocab_size):
                raise ConfigError(f"{infos[0].url} and {info.url} serve different models")
        self.tokenizer = (
            tokenizer if tokenizer is not None else load_tokenizer(infos[0].tokenizer_path, infos[0].revision)
        )

    def get_scores(
        self,
        texts: Sequence[Text],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> list[float]:
        """Score texts.

        Args:
            texts: strings, tokenized with the tokenizer's own special tokens, except those that a text has already; or
                conversations (lists of messages, with their tool calls), rendered with its chat template.
            template_kwargs: variables of the chat template for these texts; they replace single ones of the model's.
            timeout_s: seconds to wait instead of ``ClientConfig.generate_timeout_s``.

        Returns:
            The model's output for each text, unscaled: the logit of ``AutoModelForSequenceClassification``.

        Raises:
            ConfigError: a text of another type or too long, or a head with several outputs and no ``label``.
            ServerError: a server failed.
        """
        if isinstance(texts, str):
            raise ConfigError("texts must be a list, also for one text")
        ids_B_T = self._encode(texts, template_kwargs)
        if not ids_B_T:
            return []
        info = self.clients[0].info
        check_prompts(
            ids_B_T,
            max_new_tokens=0,
            vocab_size=info.vocab_size,
            max_prompt_tokens=info.max_prompt_tokens,
            context_length=info.context_length,
        )
        size = -(-len(ids_B_T) // len(self.clients))
        shares = {
            client.url: (client, ids_B_T[start : start + size])
            for client, start in zip(self.clients, range(0, len(ids_B_T), size), strict=False)
        }
        outcomes = side_by_side({url: _request(client, share, timeout_s) for url, (client, share) in shares.items()})
        return [self._score(outputs_L) for url in shares for outputs_L in outcomes[url].unwrap()]

    def _encode(self, texts: Sequence[Text], template_kwargs: Mapping[str, Any] | None) -> list[list[int]]:
        variables = {**self.template_kwargs, **(template_kwargs or {})}
        renderer = None
        ids_B_T = []
        for index, text in enumerate(texts):
            if isinstance(text, str):
                ids_B_T += encode_texts(self.tokenizer, [text])
                continue
            if not isinstance(text, Sequence) or not all(isinstance(message, Mapping) for message in text):
                raise ConfigError(f"text {index} must be a string or a list of messages, got {type(text).__name__}")
            if renderer is None:
                renderer = ChatRenderer(self.tokenizer, chat_template=self.chat_template, variables=variables)
            try:
                messages = [message for message in text if isinstance(message, Mapping)]
                ids_B_T.append(renderer.encode(renderer.render(messages, add_generation_prompt=False)))
            except ConfigError as error:
                raise ConfigError(f"text {index}: {error}") from error
        return ids_B_T

    def _score(self, outputs_L: Sequence[float]) -> float:
        if self.label is None and len(outputs_L) != 1:
            raise ConfigError(f"the reward model has {len(outputs_L)} outputs: set label= to the index of the score")
        label = self.label or 0
        if not 0 <= label < len(outputs_L):
            raise ConfigError(f"label={label}, but the reward model has {len(outputs_L)} outputs")
        return outputs_L[label]


def _request(
    client: SGLangClient, ids_B_T: list[list[int]], timeout_s: float | None
) -> Callable[[], list[list[float]]]:
    def call() -> list[list[float]]:
        answer = client.send(build_scores(ids_B_T), timeout_s=timeout_s)
        return parse_scores(answer, num_expected=len(ids_B_T), server=client.url)

    return call

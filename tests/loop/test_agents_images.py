"""Agents that show images to a vision model: what a real server saw is what is recorded."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.loop.test_chat import embedded, few_threads, vision_model  # noqa: F401
from torchrl_sglang import AgentGateway
from torchrl_sglang.agents.types import Trajectory
from torchrl_sglang.server import SGLangServer

pytestmark = pytest.mark.slow
IMAGE_TOKENS = 4


def post(session: Any, path: str, body: dict[str, Any]) -> Any:
    headers = {"authorization": f"Bearer {session.api_key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{session.base_url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return answer.read()


def data_url(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def log_probs(folder: Path, leaf: Trajectory, images: list[Any]) -> torch.Tensor:
    """Log-probs of all tokens but the first, from transformers' own parts; each image's tokens are one group."""
    token = transformers.AutoConfig.from_pretrained(folder).image_token_index
    # back to one placeholder per image; no two images of these tests follow each other
    ids_T = [i for i, before in zip(leaf.token_ids, (None, *leaf.token_ids), strict=False) if not i == before == token]
    language, embedded_T = embedded(folder, ids_T, images)
    with torch.no_grad():
        scores = language(inputs_embeds=embedded_T[None]).logits.float().log_softmax(-1)
    ids = torch.tensor([leaf.token_ids])
    return scores[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]


def test_a_conversation_about_images_is_recorded_as_the_server_saw_it(
    special_server: Callable[..., SGLangServer],
    vision_model: Path,  # noqa: F811
) -> None:
    from torchrl_sglang.testing.vision import VISION_SERVER_ARGS, VISION_SERVER_DTYPE

    pillow = pytest.importorskip("PIL.Image")
    sides = pillow.linear_gradient("L").resize((40, 40)).convert("RGB")
    rings = pillow.radial_gradient("L").resize((40, 40)).convert("RGB")
    server = special_server(model=str(vision_model), dtype=VISION_SERVER_DTYPE, extra_args=VISION_SERVER_ARGS)
    with AgentGateway(server.url) as gateway:
        session = gateway.create_session()
        shown = {"type": "image_url", "image_url": {"url": data_url(sides)}}
        talk: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "What is it? "}, shown]}]
        body = {"model": "m", "messages": talk, "max_tokens": 6, "temperature": 0}
        first = json.loads(post(session, "/chat/completions", body))
        (leaf,) = gateway.trajectories(session.id)
        placeholder = transformers.AutoConfig.from_pretrained(vision_model).image_token_index
        assert leaf.token_ids.count(placeholder) == IMAGE_TOKENS
        assert first["usage"]["prompt_tokens"] == leaf.loss_mask.index(1)

        second = {"type": "image_url", "image_url": {"url": data_url(rings)}}
        talk += [first["choices"][0]["message"], {"role": "user", "content": [{"type": "text", "text": "Or"}, second]}]
        events = post(session, "/chat/completions", {**body, "messages": talk, "stream": True}).decode()
        assert events.endswith("data: [DONE]\n\n")
        leaves = gateway.trajectories(session.id)
        assert len(leaves) == 1
        assert leaves[0].token_ids.count(placeholder) == 2 * IMAGE_TOKENS
        assert leaves[0].images == (data_url(sides), data_url(rings))
        recorded = torch.tensor(leaves[0].log_probs[1:])
        mask = torch.tensor(leaves[0].loss_mask[1:]).bool()
        gap = (log_probs(vision_model, leaves[0], [sides, rings]) - recorded)[mask].abs().max()
        assert gap < 0.02, "half precision"
        blind = (log_probs(vision_model, leaves[0], [rings, sides]) - recorded)[mask].abs().max()
        assert blind > 5 * gap, "the images matter"

        # without a limit, and with two new images at once, whose tokens this model's server does not tell apart
        more = gateway.create_session()
        unlimited = {"model": "m", "messages": talk[:1], "temperature": 0}
        post(more, "/chat/completions", unlimited)
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(more, "/chat/completions", {**body, "messages": [{"role": "user", "content": [shown, second]}]})
        assert refused.value.code == 400
        assert "one new image per request" in json.load(refused.value)["error"]["message"]

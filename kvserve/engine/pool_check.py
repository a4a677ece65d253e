"""HTTP 400 for requests that the pool can never hold, before an answer has begun.

The scheduler refuses them whichever way they come (kvserve.engine.connector), but vLLM's server then says no more than
HTTP 500. How long a prompt is and how much it may generate is known once vLLM has rendered the request.

Seam: `app.state.serving_render`, vLLM's own rendering of a request into token ids and sampling parameters. It is asked
only where a limit is so loose that some request under it would not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from kvserve.accounting.admission import Admission, always_fits
from kvserve.engine.log import logger
from kvserve.policies.limits import request_limit

RENDERED: Mapping[str, tuple[type, str]] = {
    "/v1/chat/completions": (ChatCompletionRequest, "render_chat_request"),
    "/v1/completions": (CompletionRequest, "render_completion_request"),
    "/v1/messages": (AnthropicMessagesRequest, "render_messages_request"),
    "/v1/responses": (ResponsesRequest, "render_responses_request"),
}  # other routes leave it to the scheduler


async def pool_refusal(content: Mapping[str, Any], own: Mapping[str, Any], route: str, state: Any) -> str | None:
    """Why the pool can never hold a request; None where it can, or where only the scheduler can say.

    Args:
        content: the request's JSON.
        own: its arguments that are kvserve's, which can be followed.
        state: as of RequestLimits; its `usable_blocks` are those of the pool, None where they are not known, and its
            `serving_render` is vLLM's.
    """
    if route not in RENDERED or not state.usable_blocks or not state.policy.eviction:
        return None
    limit = request_limit(state.policy.eviction, state.policy, own)
    if always_fits(state.layout, limit, state.max_model_len, state.usable_blocks):
        return None
    for prompt_len, max_tokens in await _rendered(content, route, state.serving_render):
        admission = Admission(state.layout, limit, prompt_len, max_tokens, state.max_model_len)
        if prompt_len < state.max_model_len and not admission.fits(state.usable_blocks):
            return admission.refusal(state.usable_blocks, ", ".join(sorted(own)))
    return None


async def _rendered(content: Mapping[str, Any], route: str, serving_render: Any) -> list[tuple[int, int]]:
    """Of each prompt its length and how much it may generate; none where the request is wrong: vLLM says so itself."""
    request_class, method = RENDERED[route]
    try:
        rendered = await getattr(serving_render, method)(request_class(**content))
        prompts = rendered if isinstance(rendered, list) else [rendered]
        return [(len(prompt.token_ids), prompt.sampling_params.max_tokens) for prompt in prompts]
    except Exception as error:
        logger.debug("the request cannot be rendered: %s", error)
        return []

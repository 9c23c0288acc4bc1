"""Requests and answers of the OpenAI API, as far as we have them. Unknown fields are ignored.

What a field means together with another is checked where it is used.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from flashmoe.server import limits

Number = Annotated[StrictFloat | StrictInt, Field(allow_inf_nan=False)]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=limits.LONGEST_STOP)]
Seed = Annotated[StrictInt, Field(ge=0, le=2**63 - 1 - limits.MOST_CHOICES)]
Tokens = Annotated[StrictInt, Field(ge=1, le=2**31)]
TopLogprobs = Annotated[StrictInt, Field(ge=0, le=limits.MOST_LOGPROBS)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.:-]+$")]
TokenId = Annotated[StrictInt, Field(ge=0, le=2**31)]


def bounded(least: float, most: float) -> Any:
    """A finite number in a range."""
    return Field(default=None, ge=least, le=most, allow_inf_nan=False)


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Request):
    include_usage: StrictBool | None = None


class Sampling(_Request):
    """What both kinds of requests have in common."""

    model: Annotated[StrictStr, Field(max_length=256)] | None = None  # any name is taken: there is one model
    temperature: StrictFloat | StrictInt | None = bounded(0, 100)
    top_p: StrictFloat | StrictInt | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: Annotated[StrictInt, Field(ge=0, le=2**31)] | None = None
    min_p: StrictFloat | StrictInt | None = bounded(0, 1)
    repetition_penalty: StrictFloat | StrictInt | None = bounded(0.01, 100)
    frequency_penalty: StrictFloat | StrictInt | None = bounded(-2, 2)
    presence_penalty: StrictFloat | StrictInt | None = bounded(-2, 2)
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.MOST_STOPS)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=limits.MOST_CHOICES)] | None = None
    max_tokens: Tokens | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Any] | None = None  # refused unless empty


# Chat


class ContentPart(_Request):
    type: StrictStr
    text: StrictStr | None = None


class FunctionCall(_Request):
    name: Name
    arguments: StrictStr | dict[str, Any] = "{}"


class ToolCall(_Request):
    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | list[ContentPart] | None = None
    name: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MOST_TOOLS)] | None = None
    tool_call_id: StrictStr | None = None


class Function(_Request):
    name: Name
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(_Request):
    type: Literal["function"]
    function: Function


class FunctionName(_Request):
    name: StrictStr


class NamedTool(_Request):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Request):
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(_Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MOST_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=limits.MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class CalledTool(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


# Completions

Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Sampling):
    prompt: (
        StrictStr
        | Ids
        | Annotated[list[StrictStr], Field(min_length=1, max_length=limits.MOST_ANSWERS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=limits.MOST_ANSWERS)]
    )
    echo: StrictBool | None = None
    logprobs: TopLogprobs | None = None
    suffix: StrictStr | None = None  # refused
    best_of: StrictInt | None = None  # refused but for 1


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


# The rest


class TokenizeRequest(_Request):
    content: StrictStr
    add_special: StrictBool = False


class DetokenizeRequest(_Request):
    tokens: list[TokenId]


class TokenList(BaseModel):
    tokens: list[int]


class Text(BaseModel):
    content: str


class ModelMeta(BaseModel):
    model_type: str
    n_ctx: int
    n_vocab: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    meta: ModelMeta


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail

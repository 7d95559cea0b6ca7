"""How models write their reasoning: a table of plain data, and which entry a chat template belongs to."""

from __future__ import annotations

from quire.text.formats import ReasoningFormat, named

REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(
        "openai_gptoss",
        "<|channel|>analysis<|message|>",
        ("<|end|>", "<|return|>"),
        signs=("<|channel|>analysis", "<|channel|>"),
        aliases=("gpt_oss", "openai"),
        then="<|start|>assistant",
        answer="<|channel|>final<|message|>",
    ),
    ReasoningFormat(
        "cohere_command3",
        "<|START_THINKING|>",
        ("<|END_THINKING|>",),
        signs=("<|START_THINKING|>",),
        aliases=("cohere_command4",),
        answer="<|START_RESPONSE|>",
    ),
    ReasoningFormat("gemma4", "<|channel>thought\n", ("<channel|>",), signs=("<|channel>",)),
    ReasoningFormat(
        "granite", "Here is my thought process:", ("Here is my response:",), signs=("Here is my thought process:",)
    ),
    ReasoningFormat(
        "kimi_k3",
        "<|open|>think<|sep|>",
        ("<|close|>think<|sep|>",),
        signs=("<|open|>think<|sep|>",),
        answer="<|open|>response<|sep|>",
    ),
    ReasoningFormat(
        "plamo3",
        "<|plamo:begin_think:plamo|>",
        ("<|plamo:end_think:plamo|>",),
        signs=("<|plamo:begin_think:plamo|>",),
    ),
    ReasoningFormat("hy_v3_opensource", "<think:opensource>", ("</think:opensource>",), signs=("<think:opensource>",)),
    ReasoningFormat("mistral", "[THINK]", ("[/THINK]",), signs=("[THINK]",)),
    ReasoningFormat("seed_oss", "<seed:think>", ("</seed:think>",), signs=("<seed:think>",)),
    ReasoningFormat(
        "qwen3",
        "<think>",
        ("</think>",),
        signs=("<think>", "</think>"),
        aliases=(
            "glm45",
            "glm47",
            "deepseek_v3",
            "hunyuan_a13b",
            "ernie45",
            "mimo",
            "olmo3",
            "kimi_k2",
            "hy_v3",
            "hy_v4",
            "poolside_v1",
        ),
    ),
    ReasoningFormat("deepseek_r1", "<think>", ("</think>",), implied=True, aliases=("minimax_m2", "step3")),
)


def reasoning_format(name: str) -> ReasoningFormat:
    """The format of that name. ConfigError names the known ones."""
    return named(REASONING_FORMATS, name, "reasoning_parser")


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """The way of reasoning that a chat template knows, if any."""
    return next((item for item in REASONING_FORMATS if any(sign in template for sign in item.signs)), None)

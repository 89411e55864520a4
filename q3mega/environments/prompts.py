"""What the prompts of all environments share."""

BOX_REQUESTS = (
    r"Put the answer in \boxed{}.",
    r"Give your final answer in \boxed{}.",
    r"End with the answer in \boxed{}.",
)


def user_message(text: str) -> list[dict[str, str]]:
    """The messages of a chat that a user begins."""
    return [{"role": "user", "content": text}]
